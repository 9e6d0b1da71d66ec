"""Classification: the share of photographs whose best label is the true one.

Dimensions: n photographs.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig
from bitneck_models.data.photos import LabelledPhoto, labelled_photos
from bitneck_models.measure.intervals import mean_interval, wilson
from bitneck_models.measure.meter import Photo

__all__ = ["Top1", "Top1Meter"]


class Top1Meter:
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

    def details(self) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def check(self, folder: str) -> None:
        """Every label says something."""


class Top1:
    """Top-1 of classification; see `bitneck_models.measure.meter.Metric`."""

    key = "top1"
    title = "top-1"
    columns = ("top-1 (95 %)",)

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        if ignore:
            raise InvalidConfig("indices to ignore are for segmentation; this network is for classification")
        self._labels = labels

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[Photo]:
        """See `labelled_photos`."""
        return labelled_photos(folder, wnids, labels)

    def path(self, photo: Photo) -> Path:
        """The photograph's file."""
        assert isinstance(photo, LabelledPhoto)
        return photo.path

    def truth(self, photo: Photo) -> NDArray[np.integer]:
        """The index of its class, ()."""
        assert isinstance(photo, LabelledPhoto)
        return np.array(photo.label)

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
