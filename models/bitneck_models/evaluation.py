"""A bundle on labelled photographs, every one through real bytes: encode, then decode.

The numerics are those of edge and cloud (`bitneck.chain`), so payloads and symbols are the ones that would travel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.frames import seal_frame, wire_bytes
from bitneck.image import load_photo, preprocess
from bitneck_models.complexity import PointComplexity, point_complexity
from bitneck_models.photos import LabelledPhoto
from bitneck_models.zoo import MeasuredLadder, MeasuredPoint

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

    def ladder(self, dataset: str) -> MeasuredLadder:
        """For the zoo entry: what its next bundle will say of its points."""
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
    ladder = manifest.ladder
    chain = SegmentChain(bundle)
    encoders = {p.id: PointEncoder(bundle, p) for p in ladder}
    decoders = {p.id: PointDecoder(bundle, p) for p in ladder}
    rows: dict[str, list[tuple[float, ...]]] = {p.id: [] for p in ladder}
    crcs = dict.fromkeys(rows, 0)
    right: list[bool] = []
    for count, photo in enumerate(photos, start=1):
        features = [preprocess(load_photo(photo.path), manifest.input)]
        for index in range(len(chain)):
            features.append(chain.run(features[-1], index, index + 1))
        teacher = int(features[-1].argmax())
        right.append(teacher == photo.label)
        for point in ladder:
            head = chain.head_length(point.split)
            encoded = encoders[point.id].encode(features[head])
            decoder = decoders[point.id]
            f_hat = decoder.decode(decoder.dequantize(encoded.payload)[None])
            student = int(chain.run(f_hat, head, len(chain)).argmax())
            frame = seal_frame(seq=count, point=point.id, payload=encoded.payload)
            ideal_bits = encoders[point.id].codec.tables.ideal_bits(encoded.symbols)
            crcs[point.id] = google_crc32c.extend(crcs[point.id], encoded.symbols.astype("<i4").tobytes())
            rows[point.id].append(
                (student == photo.label, student == teacher, len(encoded.payload), ideal_bits, wire_bytes(frame))
            )
        progress(count, len(photos))
    pixels, n = manifest.input.pixels, len(photos)
    results = []
    for point in ladder:
        columns = np.array(rows[point.id], dtype=np.float64)  # (n, 5)
        top1, agreement, payload, ideal_bits, wire = (float(value) for value in columns.mean(axis=0))
        low, high = (float(value) for value in np.percentile(columns[:, 2], [5, 95]))
        results.append(
            PointResult(
                id=point.id,
                split=point.split,
                top1=top1,
                top1_interval=wilson(top1, n),
                agreement=agreement,
                agreement_interval=wilson(agreement, n),
                top1_lost_interval=mean_interval(np.array(right, dtype=np.float64) - columns[:, 0]),
                payload_bytes_mean=payload,
                payload_bytes_p5=low,
                payload_bytes_p95=high,
                ideal_bytes_mean=ideal_bits / 8,
                bpp_payload=payload * 8 / pixels,
                bpp_wire=wire * 8 / pixels,
                symbols_crc32c=f"{crcs[point.id]:08x}",
                complexity=point_complexity(bundle.root, manifest, point),
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
