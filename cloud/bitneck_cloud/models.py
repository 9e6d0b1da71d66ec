"""A served model: tail segments, decoders and labels of one bundle, and one pass of a batch through them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, SegmentChain, segments_of
from bitneck.errors import BitneckError, MalformedFrame, ModelFailure
from bitneck.v1 import inference_pb2 as pb
from bitneck_cloud.batching import plan_batch

__all__ = ["Computed", "ServedModel"]

_LOG = logging.getLogger(__name__)
_TOP = 5


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of one frame of a batch; times in microseconds."""

    output: pb.Output | BitneckError
    decode_us: int
    compute_us: int


class ServedModel:
    """One bundle, ready to serve: every tail segment and every operating point's decoder is loaded.

    `run` is called from one thread at a time.

    Args:
        bundle: verified, the cloud's half.
        threads: of ONNX Runtime inside one operator; 0 for every core.

    Raises:
        BundleCorrupt: tables or labels are unreadable.
        ModelFailure: ONNX Runtime cannot load a file.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.ladder = bundle.manifest.ladder
        self.labels = bundle.labels()
        self._chain = SegmentChain(bundle, threads=threads)
        self.decoders = {point.id: PointDecoder(bundle, point) for point in self.ladder}
        self._tail_start = {point.id: self._chain.head_length(point.split) for point in self.ladder}
        tails = segments_of(bundle, "cloud")
        self._chain.load(tails.start, tails.stop)

    @property
    def name(self) -> str:
        """The model's id."""
        return self.manifest.name

    def check(self, frame: pb.Frame) -> None:
        """Check what the operating point decides about a frame, before it may queue.

        Raises:
            UnknownPoint: no such operating point.
            MalformedFrame: more bytes than any payload of this point has.
        """
        limit = self.decoders[self.ladder[frame.point].id].codec.max_payload_bytes
        if len(frame.payload) > limit:
            raise MalformedFrame(
                f"frame {frame.seq}: payload of {len(frame.payload)} bytes, {frame.point} gives at most {limit}"
            )

    def run(self, frames: Sequence[tuple[str, bytes]]) -> list[Computed]:
        """Decode and compute a batch.

        A frame that cannot be decoded fails alone; a failure of ONNX Runtime fails the frames that were in the pass.

        Args:
            frames: (operating point, payload), points that this model has.

        Returns:
            One result per frame, in order.
        """
        latents: dict[int, NDArray[np.float32]] = {}
        errors: dict[int, BitneckError] = {}
        decode_us = [0] * len(frames)
        for row, (point, payload) in enumerate(frames):
            begin = time.perf_counter()
            try:
                latents[row] = self.decoders[point].dequantize(payload)
            except BitneckError as exc:
                errors[row] = exc
            decode_us[row] = _micros(begin)
        begin = time.perf_counter()
        outputs: dict[int, pb.Output] = {}
        try:
            outputs = self._walk(frames, latents)
        except ModelFailure as exc:
            _LOG.error("a batch of %d frames failed: %s", len(latents), exc)
            generic = ModelFailure("the model failed on this frame's batch; the server's log says why")
            errors |= dict.fromkeys(latents, generic)
        compute_us = _micros(begin)
        return [
            Computed(errors[row] if row in errors else outputs[row], decode_us[row], 0 if row in errors else compute_us)
            for row in range(len(frames))
        ]

    def _walk(
        self, frames: Sequence[tuple[str, bytes]], latents: dict[int, NDArray[np.float32]]
    ) -> dict[int, pb.Output]:
        """Decoders and tail, batched along the chain; see `bitneck_cloud.batching`."""
        decoded = list(latents)  # rows of `frames` that are in the pass
        plan = plan_batch([frames[row][0] for row in decoded], self._tail_start, len(self._chain))
        order: list[int] = []
        parts: list[NDArray[np.float32]] = []
        for step in plan:
            for group in step.joining:
                rows = [decoded[k] for k in group.rows]
                parts.append(self.decoders[group.point].decode(np.stack([latents[row] for row in rows])))
                order += rows
            f = np.concatenate(parts) if len(parts) > 1 else parts[0]
            parts = [self._chain.run(f, step.segment, step.segment + 1)]
        return {row: self._output(logits) for row, logits in zip(order, parts[0], strict=True)} if parts else {}

    def _output(self, logits: NDArray[np.float32]) -> pb.Output:
        """Logits (K,) to the best labels with their softmax scores.

        Raises:
            ModelFailure: not finite, or another number of classes than labels.
        """
        if logits.shape != (len(self.labels),) or not np.isfinite(logits).all():
            raise ModelFailure(
                f"the tail gave logits of shape {logits.shape} for {len(self.labels)} labels, or not finite"
            )
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[:_TOP]
        labels = [pb.Label(index=int(i), name=self.labels[i], score=float(scores[i])) for i in best]
        return pb.Output(classification=pb.Classification(labels=labels))


def _micros(begin: float) -> int:
    return round((time.perf_counter() - begin) * 1e6)
