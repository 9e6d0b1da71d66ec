"""Classification: the share of photographs whose best label is the true one.

Dimensions: n photographs.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig
from bitneck.intervals import wilson
from bitneck_models.data.photos import LabelledPhoto, labelled_photos
from bitneck_models.measure.intervals import mean_interval
from bitneck_models.measure.meter import Meter, Metric
from bitneck_models.measure.sweeps import CODECS, SWEEP, BaselineSweep

__all__ = ["Top1", "Top1Meter"]


class Top1Meter(Meter):
    """Counts right answers; see `bitneck_models.measure.meter.Meter`."""

    def __init__(self) -> None:
        self._right: list[bool] = []

    def add(self, answer: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count one photograph."""
        self._right.append(bool(answer == truth))

    def accuracy(self) -> float:
        """Top-1."""
        return sum(self._right) / len(self._right)

    def fields(self, uncompressed: Self, agreement: float) -> dict[str, Any]:
        """``top1``, ``agreement`` and their Wilson intervals; ``top1_lost_interval`` from the paired differences.

        The paired interval is much narrower than the difference of the two intervals.
        """
        n = len(self._right)
        lost = np.array(uncompressed._right, dtype=np.float64) - np.array(self._right, dtype=np.float64)
        return {
            "top1": self.accuracy(),
            "top1_interval": wilson(self.accuracy(), n),
            "agreement": agreement,
            "agreement_interval": wilson(agreement, n),
            "top1_lost_interval": mean_interval(lost),
        }


class Top1(Metric[LabelledPhoto]):
    """Top-1 of classification; see `bitneck_models.measure.meter.Metric`."""

    key = "top1"
    title = "top-1"
    columns = ("top-1 (95 %)",)
    sweep = BaselineSweep(codecs=CODECS, training_free=SWEEP, batch=50)

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        if ignore:
            raise InvalidConfig("--ignore-index is for segmentation; this network is for classification")
        del labels

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[LabelledPhoto]:
        """See `labelled_photos`."""
        return labelled_photos(folder, wnids, labels)

    def path(self, photo: LabelledPhoto) -> Path:
        """The photograph's file."""
        return photo.path

    def truth(self, photo: LabelledPhoto) -> NDArray[np.integer]:
        """The index of its class, ()."""
        return np.array(photo.label)

    def truth_folder(self, photo: LabelledPhoto) -> Path:
        """The photograph's folder."""
        return photo.path.parent

    def answer(self, output: NDArray[np.float32]) -> NDArray[np.integer]:
        """The index of the best label, ()."""
        return np.array(output.argmax())

    def meter(self) -> Top1Meter:
        """A meter that has counted nothing."""
        return Top1Meter()

    def cells(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Top-1 and its interval."""
        low, high = fields["top1_interval"]
        return (f"{fields['top1']:.4f} ({low:.3f} to {high:.3f})",)

    def summary(self, accuracy: float, details: Mapping[str, Any], images: int) -> str:
        """A line about the uncompressed network."""
        del details
        return f"uncompressed: {accuracy:.4f} on {images} photographs"
