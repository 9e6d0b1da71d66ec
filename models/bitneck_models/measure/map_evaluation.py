"""A bundle for segmentation on photographs with class maps, every one through real bytes.

`bitneck_models.measure.passes` is how.

Intersection over union comes from ONE confusion matrix over all photographs, and its mean is over the classes that
occur in the class maps or in the answers. An answer is resized to its class map's size, each pixel the nearest; class
maps are never resized, and their void pixels count nowhere.

Dimensions: n photographs, K classes, H x W the network's input, B resamples.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.class_map import best_classes, encode_map
from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import class_iou, confusion, load_class_map, mean_iou
from bitneck_models.measure.complexity import PointComplexity, point_complexity
from bitneck_models.measure.passes import RateMeter, photo_passes
from bitneck_models.zoo.records import MeasuredLadder, MeasuredPoint

__all__ = ["MapEvaluation", "MapPointResult", "evaluate_maps"]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPointResult:
    """One operating point on the photographs.

    Attributes:
        id: operating point.
        split: split point.
        mean_iou: mean over the classes of the intersection over union.
        mean_iou_interval: its 95 % confidence interval, from a bootstrap over the photographs.
        mean_iou_lost_interval: likewise of the uncompressed network's mean IoU minus this one's, on the same resamples;
            much narrower than the difference of the two intervals.
        iou: of each class by name; None for one that occurs nowhere.
        pixel_accuracy: share of the pixels that are not void whose class is right.
        agreement: share of the input's pixels whose class is the uncompressed network's.
        payload_bytes_mean: coded bytes.
        payload_bytes_p5: their 5th percentile.
        payload_bytes_p95: their 95th percentile.
        ideal_bytes_mean: estimated bytes, the ideal code length under the point's own tables.
        bpp_payload: payload bits per input pixel.
        bpp_wire: bits per input pixel of the message on the stream.
        map_bytes_mean: of the answer's class map, coded as the cloud sends it back.
        symbols_crc32c: of all symbols in order, as little-endian int32; for one photograph it is what
            ``bitneck-edge run`` and ``encode`` print.
        complexity: parameters and multiply-adds of head, encoder, decoder and tail.
    """

    id: str
    split: str
    mean_iou: float
    mean_iou_interval: tuple[float, float]
    mean_iou_lost_interval: tuple[float, float]
    iou: dict[str, float | None]
    pixel_accuracy: float
    agreement: float
    payload_bytes_mean: float
    payload_bytes_p5: float
    payload_bytes_p95: float
    ideal_bytes_mean: float
    bpp_payload: float
    bpp_wire: float
    map_bytes_mean: float
    symbols_crc32c: str
    complexity: PointComplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class MapEvaluation:
    """The uncompressed network, and every operating point in order of rate."""

    bundle_id: str
    images: int
    mean_iou: float
    mean_iou_interval: tuple[float, float]
    iou: dict[str, float | None]
    pixel_accuracy: float
    map_bytes_mean: float
    points: tuple[MapPointResult, ...]

    def to_dict(self) -> dict[str, object]:
        """The JSON document of ``bitneck-models evaluate --json``."""
        return {
            "bundle_id": self.bundle_id,
            "images": self.images,
            "uncompressed": {"mean_iou": self.mean_iou},
            "uncompressed_details": {
                "mean_iou_interval": self.mean_iou_interval,
                "iou": self.iou,
                "pixel_accuracy": self.pixel_accuracy,
                "map_bytes_mean": self.map_bytes_mean,
            },
            "points": [asdict(point) for point in self.points],
        }

    def ladder(self, dataset: str, digests: Mapping[str, str]) -> MeasuredLadder:
        """As `bitneck_models.measure.evaluation.Evaluation.ladder`; accuracy is mean IoU."""
        return MeasuredLadder(
            dataset=dataset,
            images=self.images,
            measured=datetime.now(tz=UTC).date(),
            uncompressed_accuracy=self.mean_iou,
            points={
                p.id: MeasuredPoint(
                    payload_bytes=p.payload_bytes_mean,
                    bpp_payload=p.bpp_payload,
                    accuracy=p.mean_iou,
                    agreement=p.agreement,
                    tables_digest=digests[p.id],
                )
                for p in self.points
            },
        )


class _MapMeter:
    """The answers of the uncompressed network, or of one operating point."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._matrices: list[NDArray[np.int64]] = []
        self._map_bytes = 0

    def add(self, classes: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Count an answer (H, W) and its class map (h, w)."""
        size = truth.shape[1], truth.shape[0]
        answer = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))  # (h, w)
        self._matrices.append(confusion(truth, answer, self._number))
        self._map_bytes += len(encode_map(classes))

    @property
    def map_bytes_mean(self) -> float:
        """Coded bytes of an answer."""
        return self._map_bytes / len(self._matrices)

    def matrices(self) -> NDArray[np.int64]:
        """One confusion matrix for each photograph, (n, K, K)."""
        return np.stack(self._matrices)


def evaluate_maps(
    bundle: Bundle,
    photos: Sequence[tuple[Path, Path]],
    *,
    ignore: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> MapEvaluation:
    """Measure a bundle.

    Args:
        bundle: both halves, for segmentation.
        photos: each with the file of its class map, at least one.
        ignore: indices that are void; without them each one that is no class.
        progress: called with (photographs done, all).

    Raises:
        InvalidConfig: no photographs, or a class map that cannot be read, has other indices, or is void everywhere.
        ImageError: a photograph cannot be read.
        BundleError, ModelFailure: the bundle cannot be used.
    """
    if not photos:
        raise InvalidConfig("no photographs to measure the bundle on")
    manifest, labels = bundle.manifest, bundle.labels()
    number = len(labels)
    rates = {p.id: RateMeter() for p in manifest.ladder}
    maps = {p.id: _MapMeter(number) for p in manifest.ladder}
    agreed = dict.fromkeys(maps, 0)
    whole = _MapMeter(number)
    passes = photo_passes(bundle, [photo for photo, _ in photos])
    for count, ((_, path), passed) in enumerate(zip(photos, passes, strict=True), start=1):
        truth = load_class_map(path, number, ignore)
        teacher = best_classes(passed.output)  # (H, W)
        whole.add(teacher, truth)
        for point, at_point in passed.points():
            student = best_classes(at_point.output)  # (H, W)
            rates[point.id].add(at_point)
            maps[point.id].add(student, truth)
            agreed[point.id] += int((student == teacher).sum())
        progress(count, len(photos))
    reference = whole.matrices()  # (n, K, K)
    if not reference.any():
        raise InvalidConfig(f"{photos[0][1].parent}: every pixel of every class map is void")
    n = len(photos)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)  # (B, n)
    uncompressed = _resampled(reference, draws)  # (B,)
    results = []
    for point in manifest.ladder:
        matrices = maps[point.id].matrices()
        resampled = _resampled(matrices, draws)
        results.append(
            MapPointResult(
                id=point.id,
                split=point.split,
                mean_iou=mean_iou(matrices.sum(axis=0)),
                mean_iou_interval=_interval(resampled),
                mean_iou_lost_interval=_interval(uncompressed - resampled),
                iou=_named(labels, matrices.sum(axis=0)),
                pixel_accuracy=_pixel_accuracy(matrices),
                agreement=agreed[point.id] / (n * manifest.input.pixels),
                map_bytes_mean=maps[point.id].map_bytes_mean,
                complexity=point_complexity(bundle.root, manifest, point),
                **rates[point.id].result(manifest.input.pixels),
            )
        )
    results.sort(key=lambda r: (r.payload_bytes_mean, r.id))
    return MapEvaluation(
        bundle_id=bundle.bundle_id,
        images=n,
        mean_iou=mean_iou(reference.sum(axis=0)),
        mean_iou_interval=_interval(uncompressed),
        iou=_named(labels, reference.sum(axis=0)),
        pixel_accuracy=_pixel_accuracy(reference),
        map_bytes_mean=whole.map_bytes_mean,
        points=tuple(results),
    )


def _resampled(matrices: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean IoU of each resample, (B,); matrices (n, K, K), draws (B, n) how often each photograph is in it."""
    n, k, _ = matrices.shape
    sums = draws.astype(np.float64) @ matrices.reshape(n, k * k).astype(np.float64)  # (B, K * K)
    found = class_iou(sums.reshape(-1, k, k))  # (B, K)
    known = ~np.isnan(found)
    means: NDArray[np.float64] = np.where(known, found, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return means


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _pixel_accuracy(matrices: NDArray[np.int64]) -> float:
    total = matrices.sum(axis=0)
    return float(np.trace(total) / total.sum())


def _named(labels: Sequence[str], matrix: NDArray[np.int64]) -> dict[str, float | None]:
    values = class_iou(matrix).tolist()
    return {label: None if np.isnan(value) else value for label, value in zip(labels, values, strict=True)}
