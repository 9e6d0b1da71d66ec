"""The numerics of both halves: the chain of segments, and an operating point's encoder and decoder.

    x -> segments[0..k] -> f -> PointEncoder -> payload
    payload -> PointDecoder -> f_hat -> segments[k+1..] -> output

Edge and cloud put I/O around these classes. Evaluation calls them one after the other. So a photograph gives the same
symbols everywhere. Each segment is loaded once for all split points and operating points.

Dimensions: N batch, C x Hf x Wf feature, Cr x h x w latent.
"""

import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.coding.conditional_codec import ConditionalCodec, Reference
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.symbols import dequantize, quantize
from bitneck.errors import MalformedFrame, ModelFailure
from bitneck.ladder import OperatingPoint
from bitneck.manifest import Precision
from bitneck.runtime import ModulePool, OnnxModule

__all__ = ["Encoded", "PointDecoder", "PointEncoder", "SegmentChain", "segments_of"]


class SegmentChain:
    """The backbone of a bundle as its segments. Each is loaded when it first runs, and kept.

    Args:
        bundle: has the files.
        threads: see `OnnxModule`.
        pool: of ONNX modules; None for a new one.
        precision: of the head's segments, where the bundle has them as int8; None for the bundle's own. A tail is
            always float32.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        pool: ModulePool | None = None,
        precision: Precision | None = None,
    ) -> None:
        self._bundle = bundle
        self._precision: Precision = precision or bundle.precision
        self._threads = threads
        self._pool = pool or ModulePool()
        self._modules: dict[int, OnnxModule] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._bundle.manifest.segments)

    def load(self, start: int, stop: int) -> None:
        """Load segments ``start .. stop-1`` now, so that no frame waits for that."""
        for index in range(start, stop):
            self._module(index)

    @property
    def loaded(self) -> tuple[int, ...]:
        """Indices of the segments that are in memory."""
        return tuple(sorted(self._modules))

    def run(self, x: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Run segments ``start .. stop-1``.

        Args:
            x: the input of segment `start`, (N, ...) float32.
            start: first segment.
            stop: one past the last.

        Raises:
            ModelFailure: ONNX Runtime failed.
        """
        for index in range(start, stop):
            x = self._module(index).run(x)
        return x

    def head_length(self, split: str) -> int:
        """Number n of segments before a split point: the head is ``0 .. n-1``, the tail ``n ..``."""
        return self._bundle.manifest.split(split).after_segment + 1

    def _module(self, index: int) -> OnnxModule:
        module = self._modules.get(index)
        if module is None:
            with self._lock:
                module = self._modules.get(index)
                if module is None:
                    manifest = self._bundle.manifest
                    name = manifest.runs(manifest.segments[index].file, self._precision)
                    module = _load(self._bundle, name, self._threads, self._pool)
                    self._modules[index] = module
        return module


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One encoded feature.

    Attributes:
        symbols: (Cr, h, w) int32.
        payload: the symbols, coded without a reference.
        similar: the symbols, coded against a reference; None if there is none.
    """

    symbols: NDArray[np.int32]
    payload: bytes
    similar: bytes | None = None


class PointEncoder:
    """The edge half of an operating point: feature to payload.

    Args:
        bundle: has the files.
        point: the operating point.
        threads: see `OnnxModule`. The unit is tiny, so one thread is fastest.
        pool: of ONNX modules; None for a new one. Points of one unit share its modules.
        precision: of the encoder, where the bundle has it as int8; None for the bundle's own.
    """

    def __init__(
        self,
        bundle: Bundle,
        point: OperatingPoint,
        *,
        threads: int = 1,
        pool: ModulePool | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.point = point
        self.codec = _codec(bundle, point)
        self.conditional = _conditional(bundle, point, self.codec)
        self._lo, self._hi = self.codec.tables.lo, self.codec.tables.hi
        files = bundle.manifest.unit(point.unit).encoder_files
        self._modules = [
            _load(bundle, bundle.manifest.runs(path, precision or bundle.precision), threads, pool) for path in files
        ]

    def latent(self, f: NDArray[np.float32]) -> NDArray[np.float32]:
        """Feature to latent, before the quantizer.

        Args:
            f: the head's output, (1, C, Hf, Wf) float32.

        Returns:
            (1, Cr, h, w) float32.

        Raises:
            ModelFailure: the encoder failed, or gave another shape than the operating point's.
        """
        y = f
        for module in self._modules:
            y = module.run(y)
        if y.shape != (1, *self.point.latent_shape):
            raise ModelFailure(f"encoder of {self.point.id} gave {y.shape}, expected {(1, *self.point.latent_shape)}")
        return y

    def symbols(self, f: NDArray[np.float32]) -> NDArray[np.int32]:
        """Feature to symbols, (Cr, h, w) int32; see `latent` for arguments and errors."""
        return quantize(self.latent(f)[0], self.point.step, self._lo, self._hi)

    def encode(self, f: NDArray[np.float32], reference: Reference | None = None) -> Encoded:
        """Feature to symbols and payload.

        Args:
            f: the head's output, (1, C, Hf, Wf) float32.
            reference: to code the symbols against too, if the point has conditional tables.

        Raises:
            ModelFailure: see `latent`.
        """
        s = self.symbols(f)
        similar = None
        if reference is not None and self.conditional is not None:
            similar = self.conditional.encode(s, reference)
        return Encoded(symbols=s, payload=self.codec.encode_clipped(s), similar=similar)


class PointDecoder:
    """The cloud half of an operating point: payload to feature.

    Args:
        bundle: has the files.
        point: the operating point.
        threads: see `OnnxModule`.
        pool: of ONNX modules; None for a new one.
    """

    def __init__(
        self, bundle: Bundle, point: OperatingPoint, *, threads: int = 1, pool: ModulePool | None = None
    ) -> None:
        self.point = point
        self.codec = _codec(bundle, point)
        self.conditional = _conditional(bundle, point, self.codec)
        self.decoded_shape = bundle.manifest.decoded_shape(point.unit)
        self._module = _load(bundle, bundle.manifest.unit(point.unit).decoder, threads, pool)

    def symbols(self, payload: bytes, reference: Reference | None = None) -> NDArray[np.int32]:
        """Payload to symbols, (Cr, h, w) int32.

        Args:
            payload: the coded bytes.
            reference: what they are coded against; None for no reference.

        Raises:
            MalformedFrame: a payload that no encoder of this point writes.
        """
        if reference is None:
            return self.codec.decode(payload)
        if self.conditional is None:
            raise MalformedFrame(f"{self.point.id} has no conditional tables; code its frames by themselves")
        return self.conditional.decode(payload, reference)

    def latent(self, s: NDArray[np.int32]) -> NDArray[np.float32]:
        """Symbols to the latent that the decoder gets, (Cr, h, w) float32."""
        return dequantize(s, self.point.step)

    def dequantize(self, payload: bytes) -> NDArray[np.float32]:
        """Payload to the latent that the decoder gets, (Cr, h, w) float32.

        Raises:
            MalformedFrame: a payload of impossible length.
        """
        return self.latent(self.symbols(payload))

    def decode(self, y_hat: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents to features.

        Args:
            y_hat: (N, Cr, h, w) float32.

        Returns:
            f_hat, (N, C, Hf, Wf) float32, or what `bitneck.manifest.UnitEntry.decoded_shape` says.

        Raises:
            ModelFailure: the decoder failed, or gave another shape.
        """
        f_hat = self._module.run(y_hat)
        if f_hat.shape[1:] != self.decoded_shape:
            raise ModelFailure(f"decoder of {self.point.id} gave {f_hat.shape[1:]}, expected {self.decoded_shape}")
        return f_hat


def _codec(bundle: Bundle, point: OperatingPoint) -> FactorizedCodec | ContextCodec:
    """What codes a frame of the point by itself."""
    tables = bundle.tables(point.id)
    contexts = bundle.contexts(point.id, tables)
    if contexts is None:
        return FactorizedCodec(tables, point.latent_shape)
    return ContextCodec(tables, contexts, point.latent_shape)


def _conditional(
    bundle: Bundle, point: OperatingPoint, codec: FactorizedCodec | ContextCodec
) -> ConditionalCodec | None:
    model = bundle.conditional(point.id, codec.tables)
    return ConditionalCodec(point.id, codec.tables, model, point.latent_shape) if model is not None else None


def _load(bundle: Bundle, name: str, threads: int, pool: ModulePool | None) -> OnnxModule:
    digest = bundle.manifest.files[name].sha256
    return (pool or ModulePool()).load(bundle.path(name), digest, threads=threads)


def segments_of(bundle: Bundle, side: Literal["edge", "cloud"]) -> range:
    """The segments that one side may run: all heads, or all tails."""
    after = [split.after_segment for split in bundle.manifest.split_points]
    return range(max(after) + 1) if side == "edge" else range(min(after) + 1, len(bundle.manifest.segments))
