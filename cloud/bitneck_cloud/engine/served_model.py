"""A served model: tail segments, decoders and labels of one bundle. It computes a batch."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, SegmentChain, segments_of
from bitneck.coding.conditional_codec import Reference
from bitneck.errors import BitneckError, MalformedFrame, ModelFailure, UnknownPoint
from bitneck.manifest import Manifest, UnitEntry
from bitneck.runtime import ModulePool
from bitneck.wire.messages import Frame, Output
from bitneck_cloud.bundles.edge_files import EdgeFiles
from bitneck_cloud.engine.chain_plan import plan_batch
from bitneck_cloud.engine.outputs import frames_of_a_pass, output_of
from bitneck_cloud.engine.tally import Tally

__all__ = ["ServedModel"]

_LOG = logging.getLogger(__name__)

_Lane = tuple[str, tuple[int, int, int]] | None
"""Frames with the same key share a batch. None for the usual size, else (split point, decoded shape)."""


class ServedModel:
    """One bundle, ready to serve: every tail segment and every operating point's decoder is loaded.

    Attributes:
        max_frames: number of frames that one batch may have; see `bitneck_cloud.engine.outputs.frames_of_a_pass`.
        identities: what defines each operating point, by id: its entry and its files' digests.
        made_from: what each operating point's decoder is made from. Generations share equal ones.
        tally: counts what is answered; None while nobody compares this bundle with another one.
        files: for devices, which fetch them.
        kept_bytes: memory of one frame that later ones may refer to, at most; 0 if no point has conditional tables.

    Args:
        bundle: verified, the cloud's half.
        threads: of ONNX Runtime inside one operator; 0 for every core.
        pool: of ONNX modules. Modules that another bundle has loaded are shared.
        before: the generation before this one. Equal operating points are shared, with their tables.

    Raises:
        BundleCorrupt: tables or labels are unreadable, or more classes than a class map can name.
        ModelFailure: ONNX Runtime cannot load a file.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, pool: ModulePool | None = None, before: "ServedModel | None" = None
    ) -> None:
        pool = pool or ModulePool()
        self.tally: Tally | None = None
        self.bundle = bundle
        self.files = EdgeFiles(bundle)
        self.manifest = bundle.manifest
        self.ladder = bundle.manifest.ladder
        self.labels = bundle.labels()
        self.max_frames = frames_of_a_pass(bundle.manifest, len(self.labels))
        self._chain = SegmentChain(bundle, threads=threads, pool=pool)
        self.identities = {point.id: _identity(bundle.manifest, point.id) for point in self.ladder}
        self.made_from = {point.id: _decoder_identity(bundle.manifest, point.id) for point in self.ladder}
        self.decoders: dict[str, PointDecoder] = {}
        for point in self.ladder:
            if before is not None and before.made_from.get(point.id) == self.made_from[point.id]:
                self.decoders[point.id] = before.decoders[point.id]
            else:
                self.decoders[point.id] = PointDecoder(bundle, point, pool=pool)
        self._lanes: dict[str, _Lane] = {
            point.id: _lane(bundle.manifest.unit(point.unit)) for point in bundle.manifest.points
        }
        self._tail_start = {point.id: self._chain.head_length(point.split) for point in self.ladder}
        conditional = [d.conditional for d in self.decoders.values() if d.conditional is not None]
        self.kept_bytes = max((codec.kept_bytes for codec in conditional), default=0)
        tails = segments_of(bundle, "cloud")
        self._chain.load(tails.start, tails.stop)

    @property
    def name(self) -> str:
        """The model's id."""
        return self.manifest.name

    def named(self, frame: Frame) -> Frame:
        """The frame with its operating point's id, if it gives the point's position in the manifest.

        Raises:
            UnknownPoint: the manifest has fewer points.
        """
        if not frame.position:
            return frame
        if frame.position > len(self.manifest.points):
            raise UnknownPoint(
                f"frame {frame.seq} is at the operating point {frame.position} of the manifest, which has "
                f"{len(self.manifest.points)}"
            )
        return replace(frame, point=self.manifest.points[frame.position - 1].id)

    def check(self, frame: Frame) -> None:
        """Check a frame's point and length, before it may queue.

        Raises:
            UnknownPoint: no such operating point.
            MalformedFrame: more bytes than any payload of this point has.
        """
        decoder = self.decoders[self.ladder[frame.point].id]
        codec = decoder.conditional if frame.reference and decoder.conditional is not None else decoder.codec
        limit = codec.max_payload_bytes
        if len(frame.payload) > limit:
            raise MalformedFrame(
                f"frame {frame.seq}: payload of {len(frame.payload)} bytes, {frame.point} gives at most {limit}"
            )

    def count_fault(self, error: BitneckError) -> None:
        """A frame failed; it is counted if there is a `tally`."""
        if self.tally is not None:
            self.tally.failed(error.grpc_code)

    def decode(self, point: str, payload: bytes) -> NDArray[np.float32]:
        """The latent for the bottleneck decoder, (Cr, h, w) float32. Any thread may call it.

        Raises:
            MalformedFrame: a payload that no encoder of this point writes.
        """
        return self.decoders[point].dequantize(payload)

    def decode_similar(
        self, point: str, payload: bytes, reference: Reference | None
    ) -> tuple[NDArray[np.float32], Reference | None]:
        """`decode` for a frame of a session whose frames may refer to earlier ones. Any thread may call it.

        Args:
            point: the operating point.
            payload: the coded bytes.
            reference: what they are coded against; None for no reference.

        Returns:
            The latent, and the frame as a reference for later ones; None if the point has no conditional tables.

        Raises:
            MalformedFrame: a payload that no encoder of this point writes.
        """
        decoder = self.decoders[point]
        s = decoder.symbols(payload, reference)
        return decoder.latent(s), decoder.conditional.keep(s) if decoder.conditional is not None else None

    def compute(
        self, points: Sequence[str], latents: Sequence[NDArray[np.float32]], map_steps: Sequence[int] = ()
    ) -> list[Output | BitneckError]:
        """Run a batch through the bottleneck decoders and the tail; see `bitneck_cloud.engine.chain_plan`.

        A frame whose logits are not finite fails alone. If ONNX Runtime fails, all frames fail whose decoded features
        have the same size.

        Args:
            points: each frame's operating point.
            latents: each frame's latent, from `decode`.
            map_steps: each frame's, see `Job`; none if all are 1.

        Returns:
            One result per frame, in order.
        """
        lanes: dict[_Lane, list[int]] = {}
        for row, point in enumerate(points):
            lanes.setdefault(self._lanes[point], []).append(row)
        results: list[Output | BitneckError] = [ModelFailure("not computed")] * len(points)
        for rows in lanes.values():
            try:
                order, logits = self._walk([points[row] for row in rows], [latents[row] for row in rows])
            except ModelFailure as exc:
                _LOG.error("a batch of %d frames failed: %s", len(rows), exc)
                for row in rows:
                    results[row] = ModelFailure("the model failed on this frame's batch; the server's log says why")
                continue
            for k, one in zip(order, logits, strict=True):
                step = map_steps[rows[k]] if map_steps else 1
                results[rows[k]] = output_of(self.manifest, self.labels, one, step)
        return results

    def _walk(
        self, points: Sequence[str], latents: Sequence[NDArray[np.float32]]
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Which frame each row of the logits belongs to, and the logits: (N, K), or (N, K, H, W) for segmentation."""
        order: list[int] = []
        parts: list[NDArray[np.float32]] = []
        for step in plan_batch(points, self._tail_start, len(self._chain)):
            for group in step.joining:
                parts.append(self.decoders[group.point].decode(np.stack([latents[row] for row in group.rows])))
                order += group.rows
            f = np.concatenate(parts) if len(parts) > 1 else parts[0]
            parts = [self._chain.run(f, step.segment, step.segment + 1)]
        return order, parts[0]


def _lane(unit: UnitEntry) -> _Lane:
    return (unit.split, unit.decoded_shape) if unit.decoded_shape is not None else None


def _identity(manifest: Manifest, point_id: str) -> tuple[str, ...]:
    """What defines an operating point: its entry, its unit's, and their files."""
    entry = manifest.point(point_id)
    unit = manifest.unit(entry.unit)
    files = (*unit.encoder_files, unit.decoder, *entry.coding_files)
    return (entry.model_dump_json(), unit.model_dump_json(), *_digests(manifest, files))


def _decoder_identity(manifest: Manifest, point_id: str) -> tuple[object, ...]:
    """What a point's decoder is made from. Measured values and the encoder do not count."""
    entry = manifest.point(point_id)
    unit = manifest.unit(entry.unit)
    files = (unit.decoder, *entry.coding_files)
    return (entry.step, unit.latent_shape, manifest.decoded_shape(unit.id), *_digests(manifest, files))


def _digests(manifest: Manifest, files: Sequence[str]) -> Iterator[str]:
    return (manifest.files[name].sha256 if name in manifest.files else "" for name in files)
