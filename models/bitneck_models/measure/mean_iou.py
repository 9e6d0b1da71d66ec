"""Segmentation: the mean over the classes of the intersection over union.

Intersection over union comes from ONE confusion matrix over all photographs. The mean is over the classes that occur in
the class maps or in the answers. An answer is resized to the size of its class map, each pixel the nearest; class maps
are never resized, and their void pixels count nowhere.

Dimensions: n photographs, K classes, H x W the network's input, h x w a class map, B resamples.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.coding.class_map import best_classes, encode_map
from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import class_iou, confusion, load_class_map, mapped_photos, mean_iou
from bitneck_models.measure.intervals import percentile_interval, resamples
from bitneck_models.measure.meter import Meter, Metric
from bitneck_models.measure.sweeps import MAP_CODECS, MAP_SWEEP, BaselineSweep

__all__ = ["MeanIou", "MeanIouMeter"]


class MeanIouMeter(Meter):
    """Counts the classes of pixels; see `bitneck_models.measure.meter.Meter`."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._matrices: list[NDArray[np.int64]] = []
        self._map_bytes = 0

    def add(self, answer: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        """Count an answer (H, W) and its class map (h, w)."""
        classes = answer.astype(np.uint8)
        size = truth.shape[1], truth.shape[0]
        resized = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))  # (h, w)
        self._matrices.append(confusion(truth, resized, len(self._labels)))
        self._map_bytes += len(encode_map(classes))

    def accuracy(self) -> float:
        """Mean IoU."""
        return mean_iou(self._total())

    def fields(self, uncompressed: Self, agreement: float) -> dict[str, Any]:
        """``mean_iou``, intervals from a bootstrap over the photographs, ``iou`` of each class, and more.

        ``mean_iou_lost_interval`` is of the difference on the same resamples: much narrower than the difference of the
        two intervals. ``map_bytes_mean`` is the answer's class map, coded as the cloud sends it.
        """
        ours, theirs = self._resampled(), uncompressed._resampled()
        return {
            "mean_iou": self.accuracy(),
            "mean_iou_interval": percentile_interval(ours),
            "mean_iou_lost_interval": percentile_interval(theirs - ours),
            "iou": self._iou(),
            "pixel_accuracy": self._pixel_accuracy(),
            "agreement": agreement,
            "map_bytes_mean": self._map_bytes / len(self._matrices),
        }

    def details(self) -> dict[str, Any]:
        """Interval, classes, pixels and map bytes of the uncompressed network, as in `fields`."""
        return {
            "mean_iou_interval": percentile_interval(self._resampled()),
            "iou": self._iou(),
            "pixel_accuracy": self._pixel_accuracy(),
            "map_bytes_mean": self._map_bytes / len(self._matrices),
        }

    def check(self, folder: str) -> None:
        """Refuse class maps that are void everywhere."""
        if not self._total().any():
            raise InvalidConfig(f"{folder}: every pixel of every class map is void")

    def _total(self) -> NDArray[np.int64]:
        total: NDArray[np.int64] = np.stack(self._matrices).sum(axis=0)  # (K, K)
        return total

    def _resampled(self) -> NDArray[np.float64]:
        """Mean IoU of each resample, (B,)."""
        matrices = np.stack(self._matrices)  # (n, K, K)
        n, k, _ = matrices.shape
        sums = resamples(n).astype(np.float64) @ matrices.reshape(n, k * k).astype(np.float64)  # (B, K * K)
        found = class_iou(sums.reshape(-1, k, k))  # (B, K)
        known = ~np.isnan(found)
        means: NDArray[np.float64] = np.where(known, found, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        return means

    def _pixel_accuracy(self) -> float:
        """Share of the pixels that are not void whose class is right."""
        total = self._total()
        return float(np.trace(total) / total.sum())

    def _iou(self) -> dict[str, float | None]:
        """Intersection over union of each class by name; None for a class that occurs nowhere."""
        values = class_iou(self._total()).tolist()
        return {label: None if np.isnan(iou) else iou for label, iou in zip(self._labels, values, strict=True)}


class MeanIou(Metric[tuple[Path, Path]]):
    """Mean IoU of segmentation; see `bitneck_models.measure.meter.Metric`."""

    key = "mean_iou"
    title = "mean IoU"
    columns = ("mean IoU (95 %)", "pixels", "map bytes")
    sweep = BaselineSweep(codecs=MAP_CODECS, training_free=MAP_SWEEP, batch=8)

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        self._labels = labels
        self._ignore = ignore

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[tuple[Path, Path]]:
        """See `mapped_photos`."""
        del wnids, labels
        return mapped_photos(folder)

    def path(self, photo: tuple[Path, Path]) -> Path:
        """The photograph's file."""
        return photo[0]

    def truth(self, photo: tuple[Path, Path]) -> NDArray[np.integer]:
        """Its class map, (h, w) uint8."""
        return load_class_map(photo[1], len(self._labels), self._ignore)

    def truth_folder(self, photo: tuple[Path, Path]) -> Path:
        """The folder of its class map."""
        return photo[1].parent

    def answer(self, output: NDArray[np.float32]) -> NDArray[np.integer]:
        """The best class of every pixel, (H, W) uint8."""
        return best_classes(output)

    def meter(self) -> MeanIouMeter:
        """A meter that has counted nothing."""
        return MeanIouMeter(self._labels)

    def cells(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Mean IoU with its interval, the share of right pixels, bytes of the answer."""
        low, high = fields["mean_iou_interval"]
        return (
            f"{fields['mean_iou']:.4f} ({low:.3f} to {high:.3f})",
            f"{fields['pixel_accuracy']:.4f}",
            f"{fields['map_bytes_mean']:.0f}",
        )

    def summary(self, accuracy: float, details: Mapping[str, Any], images: int) -> str:
        """A line about the uncompressed network."""
        return (
            f"uncompressed: mean IoU {accuracy:.4f}, pixels {details['pixel_accuracy']:.4f} "
            f"on {images} photographs; a class map has {details['map_bytes_mean']:.0f} bytes"
        )
