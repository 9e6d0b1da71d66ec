"""Photographs without labels: the share of the answers that are the uncompressed network's.

It says how much compression changes, whatever the network itself is worth, so it needs no labels.

Dimensions: n photographs, K classes, H x W the network's input.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.class_map import best_classes
from bitneck.intervals import wilson
from bitneck_models.data.photos import unlabelled_photos
from bitneck_models.measure.intervals import mean_interval
from bitneck_models.measure.meter import Meter, Metric
from bitneck_models.measure.sweeps import CODECS, SWEEP, BaselineSweep

__all__ = ["Agreement", "AgreementMeter"]


class AgreementMeter(Meter):
    """Compares answers with those of the uncompressed network; see `bitneck_models.measure.meter.Meter`."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def add(self, answer: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count one photograph."""
        self._shares.append(float((answer == truth).mean()))

    def accuracy(self) -> float:
        """Mean share of the labels, or of the pixels, that agree."""
        return sum(self._shares) / len(self._shares)

    def fields(self, uncompressed: Self, agreement: float) -> dict[str, Any]:
        """``agreement`` and its interval: Wilson's for labels, of the mean over the photographs for class maps."""
        del uncompressed
        whole = set(self._shares) <= {0.0, 1.0}
        interval = wilson(agreement, len(self._shares)) if whole else mean_interval(np.array(self._shares))
        return {"agreement": agreement, "agreement_interval": interval}


class Agreement(Metric[Path]):
    """Agreement with the uncompressed network, for any task; see `bitneck_models.measure.meter.Metric`."""

    key = "agreement"
    title = "agreement"
    columns = ("agreement, 95 % interval",)
    sweep = BaselineSweep(codecs=CODECS, training_free=SWEEP, batch=8)

    def __init__(self, labels: Sequence[str] = (), ignore: Collection[int] = ()) -> None:
        del labels, ignore

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[Path]:
        """Every photograph in the folder and below it."""
        del wnids, labels
        return unlabelled_photos([folder])

    def path(self, photo: Path) -> Path:
        """The photograph itself."""
        return photo

    def truth(self, photo: Path) -> None:
        """There is none."""
        del photo

    def truth_folder(self, photo: Path) -> Path:
        """The photograph's folder."""
        return photo.parent

    def answer(self, output: NDArray[np.float32]) -> NDArray[np.integer]:
        """The index of the best label, (), or the best class of every pixel, (H, W)."""
        return np.array(output.argmax()) if output.ndim == 1 else best_classes(output)

    def meter(self) -> AgreementMeter:
        """A meter that has counted nothing."""
        return AgreementMeter()

    def cells(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """The interval of the agreement."""
        low, high = fields["agreement_interval"]
        return (f"{low:.3f} to {high:.3f}",)

    def summary(self, accuracy: float, details: Mapping[str, Any], images: int) -> str:
        """What the agreement is with."""
        del accuracy, details
        return f"agreement is with the uncompressed network, on {images} photographs without labels"
