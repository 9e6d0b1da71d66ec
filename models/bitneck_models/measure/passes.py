"""Takes photographs through a bundle at every operating point: each is encoded to real bytes, and decoded.

The numerics are those of edge and cloud (`bitneck.chain`), so payloads and symbols are those of a real link.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain, segments_of
from bitneck.image import load_photo, preprocess
from bitneck.ladder import OperatingPoint
from bitneck.manifest import Precision
from bitneck.runtime import ModulePool
from bitneck.wire.frames import seal_frame, wire_bytes

__all__ = ["PhotoPass", "PointPass", "Rate", "RateMeter", "photo_passes"]


@dataclass(frozen=True, slots=True)
class PointPass:
    """One photograph at one operating point.

    Attributes:
        output: logits of the network, (K,) or (K, H, W) float32.
        payload_bytes: size of the coded payload.
        ideal_bits: ideal code length under the point's own tables.
        wire_bytes: size of the message on the stream.
        symbols: the coded symbols, (Cr, h, w) int32.
    """

    output: NDArray[np.float32]
    payload_bytes: int
    ideal_bits: float
    wire_bytes: int
    symbols: NDArray[np.int32]


class _Halves:
    """Both halves of a bundle."""

    def __init__(self, bundle: Bundle, precision: Precision) -> None:
        pool = ModulePool()
        self.bundle = bundle
        self.ladder = bundle.manifest.ladder
        self.chain = SegmentChain(bundle, pool=pool)
        self.heads = SegmentChain(bundle, pool=pool, precision=precision)
        self.encoders = {p.id: PointEncoder(bundle, p, pool=pool, precision=precision) for p in self.ladder}
        self.decoders = {p.id: PointDecoder(bundle, p, pool=pool) for p in self.ladder}
        self.positions = {p.id: place for place, p in enumerate(bundle.manifest.points, start=1)}


class PhotoPass:
    """One photograph.

    Attributes:
        output: logits of the uncompressed network, (K,) or (K, H, W) float32.
    """

    def __init__(
        self, halves: _Halves, seq: int, output: NDArray[np.float32], features: list[NDArray[np.float32]]
    ) -> None:
        self.output = output
        self._halves, self._seq, self._features = halves, seq, features

    def points(self) -> Iterator[tuple[OperatingPoint, PointPass]]:
        """Results at each operating point, lowest rate first. Earlier results are not kept."""
        halves = self._halves
        for point in halves.ladder:
            head = halves.chain.head_length(point.split)
            encoder, decoder = halves.encoders[point.id], halves.decoders[point.id]
            encoded = encoder.encode(self._features[head])
            f_hat = decoder.decode(decoder.dequantize(encoded.payload)[None])
            position = halves.positions[point.id]
            frame = seal_frame(seq=self._seq, point=point.id, payload=encoded.payload, position=position)
            yield (
                point,
                PointPass(
                    output=halves.chain.run(f_hat, head, len(halves.chain))[0],
                    payload_bytes=len(encoded.payload),
                    ideal_bits=encoder.codec.ideal_bits(encoded.symbols),
                    wire_bytes=wire_bytes(frame),
                    symbols=encoded.symbols,
                ),
            )


def photo_passes(bundle: Bundle, photos: Sequence[Path], precision: Precision = "float32") -> Iterator[PhotoPass]:
    """Take each photograph through the bundle in turn.

    Args:
        bundle: both halves.
        photos: files.
        precision: of the edge's half, where the bundle has it as int8. The uncompressed network is always float32.

    Raises:
        ImageError: a photograph cannot be read.
        BundleError, ModelFailure: the bundle cannot be used.
    """
    halves = _Halves(bundle, precision)
    edge = segments_of(bundle, "edge")
    for seq, photo in enumerate(photos, start=1):
        x = preprocess(load_photo(photo), bundle.manifest.input)
        features = [x]
        for index in edge:
            features.append(halves.heads.run(features[-1], index, index + 1))
        start, f = (0, x) if precision == "int8" else (len(edge), features[-1])
        yield PhotoPass(halves, seq, halves.chain.run(f, start, len(halves.chain))[0], features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The rate of one operating point.

    Attributes:
        payload_bytes_mean: coded bytes of a photograph.
        payload_bytes_p5: their 5th percentile.
        payload_bytes_p95: their 95th percentile.
        ideal_bytes_mean: estimated bytes, the ideal code length under the point's own tables.
        bpp_payload: payload bits per input pixel.
        bpp_wire: bits per input pixel of the message on the stream.
        symbols_crc32c: of all symbols in order, as little-endian int32. For one photograph it is what
            ``bitneck-edge run`` and ``encode`` print.
    """

    payload_bytes_mean: float
    payload_bytes_p5: float
    payload_bytes_p95: float
    ideal_bytes_mean: float
    bpp_payload: float
    bpp_wire: float
    symbols_crc32c: str


class RateMeter:
    """Counts the bytes of one operating point, photograph by photograph."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float]] = []
        self._crc = 0

    def add(self, passed: PointPass) -> None:
        """Count a photograph."""
        self._rows.append((passed.payload_bytes, passed.ideal_bits, passed.wire_bytes))
        self._crc = google_crc32c.extend(self._crc, passed.symbols.astype("<i4").tobytes())

    def rate(self, pixels: int) -> Rate:
        """What was counted.

        Args:
            pixels: of the network's input.
        """
        columns = np.array(self._rows, dtype=np.float64)  # (n, 3)
        payload, ideal_bits, wire = (float(value) for value in columns.mean(axis=0))
        low, high = (float(value) for value in np.percentile(columns[:, 0], [5, 95]))
        return Rate(
            payload_bytes_mean=payload,
            payload_bytes_p5=low,
            payload_bytes_p95=high,
            ideal_bytes_mean=ideal_bits / 8,
            bpp_payload=payload * 8 / pixels,
            bpp_wire=wire * 8 / pixels,
            symbols_crc32c=f"{self._crc:08x}",
        )
