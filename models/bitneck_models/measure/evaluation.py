"""A bundle for classification on labelled photographs, every one through real bytes.

`bitneck_models.measure.passes` is how.

`bitneck_models.measure.map_evaluation` is for segmentation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck_models.data.photos import LabelledPhoto
from bitneck_models.measure.complexity import PointComplexity, point_complexity
from bitneck_models.measure.passes import RateMeter, photo_passes
from bitneck_models.zoo.records import MeasuredLadder, MeasuredPoint

__all__ = ["Evaluation", "PointResult", "evaluate", "mean_interval", "wilson"]

_Z = 1.959964
"""Of a normal distribution: 95 % lies within as many standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """One operating point on the photographs.

    Attributes:
        id: operating point.
        split: split point.
        top1: share whose best label is the true one.
        top1_interval: its 95 % confidence interval (Wilson).
        agreement: share whose best label is the uncompressed network's.
        agreement_interval: its 95 % confidence interval (Wilson).
        top1_lost_interval: 95 % confidence interval of the uncompressed network's top-1 minus this one's, from the
            paired differences; much narrower than the difference of the two intervals.
        payload_bytes_mean: coded bytes.
        payload_bytes_p5: their 5th percentile.
        payload_bytes_p95: their 95th percentile.
        ideal_bytes_mean: estimated bytes, the ideal code length under the point's own tables.
        bpp_payload: payload bits per input pixel.
        bpp_wire: bits per input pixel of the message on the stream.
        symbols_crc32c: of all symbols in order, as little-endian int32; for one photograph it is what
            ``bitneck-edge run`` and ``encode`` print.
        complexity: parameters and multiply-adds of head, encoder, decoder and tail.
    """

    id: str
    split: str
    top1: float
    top1_interval: tuple[float, float]
    agreement: float
    agreement_interval: tuple[float, float]
    top1_lost_interval: tuple[float, float]
    payload_bytes_mean: float
    payload_bytes_p5: float
    payload_bytes_p95: float
    ideal_bytes_mean: float
    bpp_payload: float
    bpp_wire: float
    symbols_crc32c: str
    complexity: PointComplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The uncompressed network, and every operating point in order of rate."""

    bundle_id: str
    images: int
    top1: float
    points: tuple[PointResult, ...]

    def to_dict(self) -> dict[str, object]:
        """The JSON document of ``bitneck-models evaluate --json``."""
        return {
            "bundle_id": self.bundle_id,
            "images": self.images,
            "uncompressed": {"top1": self.top1},
            "points": [asdict(point) for point in self.points],
        }

    def ladder(self, dataset: str, digests: Mapping[str, str]) -> MeasuredLadder:
        """For the zoo entry: what its next bundle will say of its points.

        Args:
            dataset: its name.
            digests: of the measured points' tables, from `bitneck_models.zoo.entry.tables_digests`.
        """
        return MeasuredLadder(
            dataset=dataset,
            images=self.images,
            measured=datetime.now(tz=UTC).date(),
            uncompressed_accuracy=self.top1,
            points={
                p.id: MeasuredPoint(
                    payload_bytes=p.payload_bytes_mean,
                    bpp_payload=p.bpp_payload,
                    accuracy=p.top1,
                    agreement=p.agreement,
                    tables_digest=digests[p.id],
                )
                for p in self.points
            },
        )


def evaluate(
    bundle: Bundle,
    photos: Sequence[LabelledPhoto],
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Measure a bundle.

    Args:
        bundle: both halves.
        photos: at least one.
        progress: called with (photographs done, all).

    Raises:
        ImageError: a photograph cannot be read.
        BundleError, ModelFailure: the bundle cannot be used.
    """
    manifest = bundle.manifest
    meters = {p.id: RateMeter() for p in manifest.ladder}
    rows: dict[str, list[tuple[bool, bool]]] = {p.id: [] for p in manifest.ladder}
    right: list[bool] = []
    passes = photo_passes(bundle, [photo.path for photo in photos])
    for count, (photo, passed) in enumerate(zip(photos, passes, strict=True), start=1):
        teacher = int(passed.output.argmax())
        right.append(teacher == photo.label)
        for point, at_point in passed.points():
            student = int(at_point.output.argmax())
            meters[point.id].add(at_point)
            rows[point.id].append((student == photo.label, student == teacher))
        progress(count, len(photos))
    n = len(photos)
    results = []
    for point in manifest.ladder:
        columns = np.array(rows[point.id], dtype=np.float64)  # (n, 2)
        top1, agreement = (float(value) for value in columns.mean(axis=0))
        results.append(
            PointResult(
                id=point.id,
                split=point.split,
                top1=top1,
                top1_interval=wilson(top1, n),
                agreement=agreement,
                agreement_interval=wilson(agreement, n),
                top1_lost_interval=mean_interval(np.array(right, dtype=np.float64) - columns[:, 0]),
                complexity=point_complexity(bundle.root, manifest, point),
                **meters[point.id].result(manifest.input.pixels),
            )
        )
    results.sort(key=lambda r: (r.payload_bytes_mean, r.id))
    return Evaluation(bundle_id=bundle.bundle_id, images=n, top1=sum(right) / n, points=tuple(results))


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval).

    Args:
        share: observed, 0 to 1.
        count: of trials, >= 1.
    """
    z2 = _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % confidence interval of a mean, by the normal approximation.

    Args:
        values: (n,).
    """
    mean, error = float(values.mean()), float(values.std() / math.sqrt(len(values)))
    return mean - _Z * error, mean + _Z * error
