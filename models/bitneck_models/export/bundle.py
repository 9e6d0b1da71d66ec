"""From a zoo entry to a bundle, proven equal to the network it was made from.

What is proven, on the images given, before the bundle is written:
- every prefix and suffix of the chain, composed, gives the backbone's output (so each split is a true cut);
- each exported encoder and decoder gives torch's latent and feature;
- behind an imported decoder, which torch does not have, the tail gives the output of torch's.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck.bundle import Bundle, BundleWriter
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.errors import InvalidConfig, ModelFailure
from bitneck.manifest import FileRole, Manifest, PointEntry, Segment, SplitPoint
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import MeasuredLadder, MeasuredPoint, ZooEntry

__all__ = ["NOT_MEASURED", "Proof", "export_bundle", "prove"]

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of the reference."""

NOT_MEASURED = "not measured"
"""The data set of a point that was not measured, or not since it was trained."""
_UNMEASURED = date(1970, 1, 1)
_IMPORTED_FILES: dict[str, FileRole] = {"encoder.onnx": "edge", "decoder.onnx": "cloud", "tables.npz": "both"}
"""What an imported point brings along, and who needs it."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Largest relative differences between the bundle and torch."""

    chain: dict[str, float]
    encoders: dict[str, float]
    decoders: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest of all; not a number where one of them is none."""
        return float(np.max([*self.chain.values(), *self.encoders.values(), *self.decoders.values()]))


def export_bundle(
    entry: ZooEntry,
    backbone: Backbone,
    out: Path,
    images: NDArray[np.float32],
    progress: Callable[[str], None] = lambda _what: None,
) -> tuple[Bundle, Proof]:
    """Export every trained and every imported point of a zoo entry, and prove the result.

    Args:
        entry: its points are exported; points without weights are left out.
        backbone: the network of the recipe.
        out: the bundle's folder.
        images: for the proof, (N, 3, H, W) float32, normalized.
        progress: called with what is being done.

    Raises:
        InvalidConfig: no trained point, or a destination that is no bundle.
        ModelFailure: the export failed, or the proof did.
    """
    points, imported = entry.shipped(), entry.imported()
    if not points and not imported:
        raise InvalidConfig(f"{entry.folder} has no trained points; run `bitneck-models train {entry.folder}`")
    used = {p.split for p in points} | {r.split for r in imported.values()}
    splits = sorted(used & set(backbone.splits), key=backbone.split_index)
    shapes = {split: backbone.feature_shape(split) for split in splits}
    for name, record in imported.items():
        record.check_fits(name, backbone.name, shapes)
    others = {name: r.output_shape for name, r in imported.items() if r.output_shape != shapes[r.split]}
    any_size_after = min((splits.index(imported[name].split) for name in others), default=len(splits))
    cuts = [backbone.split_index(split) for split in splits]
    bounds = [0, *cuts, len(backbone.stages)]
    units = {point.id: entry.unit(backbone, point) for point in points}
    tables = {point.id: entry.tables(point.id) for point in points}
    measured = entry.ladder()
    if measured is not None:
        measured = measured.still_true(tables | {name: entry.tables(name) for name in imported})
    with BundleWriter(out) as writer:
        segments = []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            name = f"to-{splits[index]}" if index < len(splits) else "to-output"
            progress(f"segment {name}")
            path = f"segments/{index:02d}-{name}.onnx"
            shape = backbone.input_shape if index == 0 else shapes[splits[index - 1]]
            role: FileRole = "edge" if index == 0 else "cloud" if index == len(splits) else "both"
            data = to_onnx(backbone.segment(start, stop), shape, any_size=index > any_size_after)
            writer.add(path, data, role)
            segments.append(Segment(name=name, file=path))
        for point in points:
            progress(f"point {point.id}")
            unit = units[point.id]
            writer.add(f"points/{point.id}/encoder.onnx", to_onnx(unit.encoder, unit.feature_shape), "edge")
            writer.add(f"points/{point.id}/decoder.onnx", to_onnx(unit.decoder, unit.latent_shape), "cloud")
            writer.add(f"points/{point.id}/tables.npz", tables[point.id].to_npz(), "both")
            if (conditional := entry.conditional(point)) is not None:
                conditional.check_fits(tables[point.id])
                writer.add(f"points/{point.id}/conditional.npz", conditional.to_npz(), "both")
        for name in imported:
            for file, user in _IMPORTED_FILES.items():
                data = (entry.point_folder(name) / file).read_bytes()
                writer.add(f"points/{name}/{file}", data, user)
        users: FileRole = "both" if backbone.task == "segmentation" else "cloud"
        writer.add("labels.json", (json.dumps(backbone.labels, indent=0) + "\n").encode(), users)
        manifest = Manifest(
            name=entry.recipe.name,
            backbone=backbone.name,
            task=backbone.task,
            input=backbone.input,
            segments=tuple(segments),
            split_points=tuple(
                SplitPoint(name=split, after_segment=k, feature_shape=shapes[split]) for k, split in enumerate(splits)
            ),
            points=(
                *(_entry(p.id, p.split, p.stride, p.step, units[p.id].latent_shape, measured) for p in points),
                *(
                    _entry(name, r.split, r.stride, r.step, r.latent_shape, measured, decoded=others.get(name))
                    for name, r in imported.items()
                ),
            ),
            uncompressed_accuracy=measured.uncompressed_accuracy if measured is not None else 0.0,
            labels="labels.json",
            files=writer.files,
        )
        progress("proof")
        proofs: list[Proof] = []
        bundle = writer.finish(manifest, lambda staged: proofs.append(prove(staged, backbone, units, images)))
    return bundle, proofs[0]


def _entry(
    point_id: str,
    split: str,
    stride: int,
    step: float,
    latent_shape: tuple[int, int, int],
    measured: MeasuredLadder | None,
    decoded: tuple[int, int, int] | None = None,
) -> PointEntry:
    """The manifest's entry of a point; one that was not measured yet says so by zero accuracy."""
    result = measured.points.get(point_id) if measured is not None else None
    known = measured if result is not None else None
    result = result or MeasuredPoint(payload_bytes=0.0, bpp_payload=0.0, accuracy=0.0, agreement=0.0)
    return PointEntry(
        id=point_id,
        split=split,
        stride=stride,
        channels=latent_shape[0],
        step=step,
        latent_shape=latent_shape,
        decoded_shape=decoded,
        payload_bytes=result.payload_bytes,
        bpp_payload=result.bpp_payload,
        accuracy=result.accuracy,
        agreement=result.agreement,
        dataset=known.dataset if known is not None else NOT_MEASURED,
        images=known.images if known is not None else 1,
        measured=known.measured if known is not None else _UNMEASURED,
    )


@torch.no_grad()
def prove(bundle: Bundle, backbone: Backbone, units: dict[str, BottleneckUnit], images: NDArray[np.float32]) -> Proof:
    """Compare a bundle with torch.

    Args:
        bundle: what was exported.
        backbone: what the chain must equal.
        units: by operating point; of imported ones, which are not there, only the tail behind them is compared.
        images: (N, 3, H, W) float32, normalized.

    Raises:
        ModelFailure: a difference of more than `TOLERANCE`, or an output that is not of the task's shape.
    """
    x = torch.from_numpy(images)
    output = backbone(x).numpy()
    if output.shape[1:] != backbone.output_shape:
        raise ModelFailure(
            f"{backbone.name} gave an output of shape {output.shape[1:]}, {backbone.task} with {len(backbone.labels)} "
            f"labels needs {backbone.output_shape}"
        )
    chain = SegmentChain(bundle)
    whole: dict[str, float] = {}
    encoders: dict[str, float] = {}
    decoders: dict[str, float] = {}
    for split in bundle.manifest.split_points:
        head = chain.head_length(split.name)
        f = chain.run(images, 0, head)  # (N, C, Hf, Wf)
        reference = backbone.head(split.name)(x)
        whole[f"head {split.name}"] = _difference(f, reference.numpy())
        whole[f"head {split.name} + tail"] = _difference(chain.run(f, head, len(chain)), output)
        whole[f"torch head {split.name} + tail"] = _difference(backbone.tail(split.name)(reference).numpy(), output)
        for point in bundle.manifest.ladder:
            if point.split == split.name:
                unit = units.get(point.id)
                if unit is None:
                    f_hat = PointDecoder(bundle, point).decode(_onnx_latent(bundle, point.id, f))
                    answer = chain.run(f_hat, head, len(chain))
                    expected = backbone.tail(split.name)(torch.from_numpy(f_hat)).numpy()
                    decoders[f"{point.id} + tail"] = _difference(answer, expected)
                    continue
                y = unit.encoder(reference)
                encoders[point.id] = _difference(_onnx_latent(bundle, point.id, f), y.numpy())
                y_hat = torch.round(y / point.step) * point.step
                decoded = PointDecoder(bundle, point).decode(y_hat.numpy())
                decoders[point.id] = _difference(decoded, unit.decoder(y_hat).numpy())
    proof = Proof(whole, encoders, decoders)
    if not proof.worst <= TOLERANCE:
        raise ModelFailure(f"the exported bundle differs from torch by {proof.worst:.2e} relative: {proof}")
    return proof


def _onnx_latent(bundle: Bundle, point_id: str, f: NDArray[np.float32]) -> NDArray[np.float32]:
    encoder = PointEncoder(bundle, bundle.manifest.ladder[point_id])
    return np.concatenate([encoder.latent(one[None]) for one in f])


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())
