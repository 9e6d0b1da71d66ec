"""A bundle on labelled photographs, every one through real bytes: encode, then decode.

The numerics are those of edge and cloud (`bitneck.chain`), so payloads and symbols are the ones that would travel.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import google_crc32c
import numpy as np

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.frames import seal_frame, wire_bytes
from bitneck.image import load_photo, preprocess
from bitneck_models.photos import LabelledPhoto
from bitneck_models.zoo import MeasuredLadder, MeasuredPoint

__all__ = ["Evaluation", "PointResult", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """One operating point, means over the photographs.

    Attributes:
        id: operating point.
        split: split point.
        top1: share whose best label is the true one.
        agreement: share whose best label is the uncompressed network's.
        payload_bytes_mean: coded bytes.
        ideal_bytes_mean: ideal code length under the point's own tables.
        bpp_payload: payload bits per input pixel.
        bpp_wire: bits per input pixel of the message on the stream.
        symbols_crc32c: of all symbols in order, as little-endian int32; for one photograph it is what
            ``bitneck-edge run`` and ``encode`` print.
    """

    id: str
    split: str
    top1: float
    agreement: float
    payload_bytes_mean: float
    ideal_bytes_mean: float
    bpp_payload: float
    bpp_wire: float
    symbols_crc32c: str


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
    sums = {p.id: np.zeros(5) for p in ladder}  # right, agreeing, payload bytes, ideal bits, wire bytes
    crcs = dict.fromkeys(sums, 0)
    right = 0
    for count, photo in enumerate(photos, start=1):
        features = [preprocess(load_photo(photo.path), manifest.input)]
        for index in range(len(chain)):
            features.append(chain.run(features[-1], index, index + 1))
        teacher = int(features[-1].argmax())
        right += teacher == photo.label
        for point in ladder:
            head = chain.head_length(point.split)
            encoded = encoders[point.id].encode(features[head])
            decoder = decoders[point.id]
            f_hat = decoder.decode(decoder.dequantize(encoded.payload)[None])
            student = int(chain.run(f_hat, head, len(chain)).argmax())
            frame = seal_frame(seq=count, point=point.id, payload=encoded.payload)
            ideal_bits = encoders[point.id].codec.tables.ideal_bits(encoded.symbols)
            crcs[point.id] = google_crc32c.extend(crcs[point.id], encoded.symbols.astype("<i4").tobytes())
            sums[point.id] += (
                student == photo.label,
                student == teacher,
                len(encoded.payload),
                ideal_bits,
                wire_bytes(frame),
            )
        progress(count, len(photos))
    pixels, n = manifest.input.pixels, len(photos)
    results = []
    for point in ladder:
        top1, agreement, payload, ideal_bits, wire = (float(value) / n for value in sums[point.id])
        results.append(
            PointResult(
                id=point.id,
                split=point.split,
                top1=top1,
                agreement=agreement,
                payload_bytes_mean=payload,
                ideal_bytes_mean=ideal_bits / 8,
                bpp_payload=payload * 8 / pixels,
                bpp_wire=wire * 8 / pixels,
                symbols_crc32c=f"{crcs[point.id]:08x}",
            )
        )
    results.sort(key=lambda r: (r.payload_bytes_mean, r.id))
    return Evaluation(bundle_id=bundle.bundle_id, images=n, top1=right / n, points=tuple(results))
