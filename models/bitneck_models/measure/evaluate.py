"""Measures a bundle on photographs with known answers, through real bytes: one loop for every task.

`bitneck_models.measure.passes` takes photographs through the bundle; `bitneck_models.measure.meter` says what a task
defines.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck.manifest import Precision
from bitneck_models.measure.complexity import PointComplexity, point_complexity
from bitneck_models.measure.each import EachPhoto, photos_crc32c
from bitneck_models.measure.meter import Metric, metric_for
from bitneck_models.measure.passes import Rate, RateMeter, photo_passes
from bitneck_models.zoo.records import MeasuredLadder, MeasuredPoint

__all__ = ["Evaluation", "PointResult", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """One operating point on the photographs.

    Attributes:
        id: operating point.
        split: split point.
        accuracy: the task's measure, 0 to 1.
        agreement: share of the answers (labels, or pixels) that are the uncompressed network's.
        fields: accuracy and agreement with their intervals, under the task's own names; see `Meter.fields`.
        rate: bytes and bits per input pixel.
        complexity: parameters and multiply-adds of head, encoder, decoder and tail.
        each: results of each photograph, if they were asked for.
    """

    id: str
    split: str
    accuracy: float
    agreement: float
    fields: Mapping[str, Any]
    rate: Rate
    complexity: PointComplexity
    each: EachPhoto | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {"id": self.id, "split": self.split}
        kept = {} if self.each is None else {"each": self.each.to_dict()}
        return known | dict(self.fields) | asdict(self.rate) | {"complexity": asdict(self.complexity)} | kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The uncompressed network, and every operating point in order of rate.

    Attributes:
        bundle_id: of the bundle.
        images: number of photographs.
        metric: metric of the bundle's task.
        accuracy: of the uncompressed network.
        details: further figures of the uncompressed network; see `Meter.details`.
        points: in order of rate.
        photos_crc32c: which photographs, and in which order; see `bitneck_models.measure.each.photos_crc32c`.
    """

    bundle_id: str
    images: int
    metric: Metric[Any] = field(repr=False, compare=False)
    accuracy: float
    details: Mapping[str, Any]
    points: tuple[PointResult, ...]
    photos_crc32c: str

    def to_dict(self) -> dict[str, object]:
        """The JSON document of ``bitneck-models evaluate --json``."""
        document: dict[str, object] = {
            "bundle_id": self.bundle_id,
            "images": self.images,
            "photos_crc32c": self.photos_crc32c,
            "uncompressed": {self.metric.key: self.accuracy},
        }
        if self.details:
            document["uncompressed_details"] = dict(self.details)
        return document | {"points": [point.to_dict() for point in self.points]}

    def ladder(self, dataset: str, digests: Mapping[str, str]) -> MeasuredLadder:
        """For the zoo entry: what its next bundle says of its points.

        Args:
            dataset: its name.
            digests: of the measured points' tables, from `bitneck_models.zoo.entry.tables_digests`.
        """
        return MeasuredLadder(
            dataset=dataset,
            images=self.images,
            measured=datetime.now(tz=UTC).date(),
            uncompressed_accuracy=self.accuracy,
            points={
                p.id: MeasuredPoint(
                    payload_bytes=p.rate.payload_bytes_mean,
                    bpp_payload=p.rate.bpp_payload,
                    accuracy=p.accuracy,
                    agreement=p.agreement,
                    tables_digest=digests[p.id],
                )
                for p in self.points
            },
        )


def evaluate(
    bundle: Bundle,
    photos: Sequence[Any],
    *,
    ignore: Collection[int] = (),
    metric: Metric[Any] | None = None,
    precision: Precision = "float32",
    each: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Measure a bundle.

    Args:
        bundle: both halves.
        photos: at least one, each with its truth, as the task's `Metric.photos` gives them.
        ignore: segmentation: indices in class maps that are void. By default, all indices that are no class.
        metric: what to measure; by default the task's. `bitneck_models.measure.agreement.Agreement` needs no truths.
        precision: see `photo_passes`.
        each: keep the results of each photograph too.
        progress: called with (photographs done, all).

    Raises:
        InvalidConfig: no photographs, a truth that cannot be read, truths that give nothing to compare with, or `each`
            where an answer is not one label.
        ImageError: a photograph cannot be read.
        BundleError, ModelFailure: the bundle cannot be used.
    """
    if not photos:
        raise InvalidConfig("no photographs to measure the bundle on")
    manifest = bundle.manifest
    if each and manifest.task != "classification":
        raise InvalidConfig(
            f"results of each photograph are kept for classification; this bundle is for {manifest.task}"
        )
    metric = metric or metric_for(manifest.task, bundle.labels(), ignore)
    rates = {p.id: RateMeter() for p in manifest.ladder}
    meters = {p.id: metric.meter() for p in manifest.ladder}
    agreed = dict.fromkeys(meters, 0)
    rows: dict[str, list[tuple[int, bool, bool]]] = {p.id: [] for p in manifest.ladder}
    compared = 0
    uncompressed = metric.meter()
    passes = photo_passes(bundle, [metric.path(photo) for photo in photos], precision)
    for count, (photo, passed) in enumerate(zip(photos, passes, strict=True), start=1):
        teacher = metric.answer(passed.output)  # () or (H, W)
        known = metric.truth(photo)
        truth = teacher if known is None else known
        uncompressed.add(teacher, truth)
        compared += teacher.size
        for point, at_point in passed.points():
            student = metric.answer(at_point.output)
            rates[point.id].add(at_point)
            meters[point.id].add(student, truth)
            agreed[point.id] += int((student == teacher).sum())
            if each:
                rows[point.id].append((at_point.payload_bytes, bool(student == truth), bool(student == teacher)))
        progress(count, len(photos))
    uncompressed.check(str(metric.truth_folder(photos[0])))
    points = []
    for point in manifest.ladder:
        meter, agreement = meters[point.id], agreed[point.id] / compared
        points.append(
            PointResult(
                id=point.id,
                split=point.split,
                accuracy=meter.accuracy(),
                agreement=agreement,
                fields=meter.fields(uncompressed, agreement),
                rate=rates[point.id].rate(manifest.input.pixels),
                complexity=point_complexity(bundle.root, manifest, point),
                each=EachPhoto.of(rows[point.id]) if each else None,
            )
        )
    points.sort(key=lambda p: (p.rate.payload_bytes_mean, p.id))
    return Evaluation(
        bundle_id=bundle.bundle_id,
        images=len(photos),
        metric=metric,
        accuracy=uncompressed.accuracy(),
        details=uncompressed.details(),
        points=tuple(points),
        photos_crc32c=photos_crc32c([metric.path(photo) for photo in photos]),
    )
