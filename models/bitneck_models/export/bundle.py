"""Export of a zoo entry as a bundle. Before the bundle is written, it is proven equal to the network and the units."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck.manifest import FileRole, Manifest, PointEntry, Segment, SplitPoint
from bitneck_models.export.proof import Proof, prove
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.records import MeasuredLadder, MeasuredPoint

__all__ = ["NOT_MEASURED", "export_bundle"]

NOT_MEASURED = "not measured"
"""Data set name of a point without a current measurement."""
_UNMEASURED = date(1970, 1, 1)
_IMPORTED_FILES: dict[str, FileRole] = {"encoder.onnx": "edge", "decoder.onnx": "cloud", "tables.npz": "both"}
"""Files of an imported point, and who needs them."""

Shape3 = tuple[int, int, int]


def export_bundle(
    entry: ZooEntry,
    backbone: Backbone,
    out: Path,
    images: NDArray[np.float32],
    progress: Callable[[str], None] = lambda _what: None,
) -> tuple[Bundle, Proof]:
    """Export every trained and every imported point of a zoo entry, and prove the result.

    Args:
        entry: the zoo entry; its points without weights are left out.
        backbone: the network of the recipe.
        out: the bundle's folder.
        images: images for the proof, (N, 3, H, W) float32, normalized.
        progress: called with what is being done.

    Raises:
        InvalidConfig: the entry has no trained point, an imported point does not fit, or `out` is no bundle.
        ModelFailure: the export or the proof failed.
    """
    points, imported = entry.shipped(), entry.imported()
    if not points and not imported:
        raise InvalidConfig(f"{entry.folder} has no trained points; run `bitneck-models train {entry.folder}`")
    used = {p.split for p in points} | {r.split for r in imported.values()}
    splits = sorted(used & set(backbone.splits), key=backbone.split_index)
    shapes = {split: backbone.feature_shape(split) for split in splits}
    for name, record in imported.items():
        record.check_fits(name, backbone.name, shapes)
    decoded = {name: r.output_shape for name, r in imported.items() if r.output_shape != shapes[r.split]}
    any_size_after = min((splits.index(imported[name].split) for name in decoded), default=len(splits))
    units = {point.id: entry.unit(backbone, point) for point in points}
    tables = {point.id: entry.tables(point.id) for point in points}
    measured = entry.ladder()
    if measured is not None:
        measured = measured.still_true(tables | {name: entry.tables(name) for name in imported})
    with BundleWriter(out) as writer:
        segments = _write_segments(writer, backbone, splits, shapes, any_size_after, progress)
        for point in points:
            progress(f"point {point.id}")
            _write_point(writer, point.id, units[point.id], tables[point.id], entry.conditional(point))
        for name in imported:
            for file, user in _IMPORTED_FILES.items():
                writer.add(f"points/{name}/{file}", (entry.point_folder(name) / file).read_bytes(), user)
        users: FileRole = "both" if backbone.task == "segmentation" else "cloud"
        writer.add("labels.json", (json.dumps(backbone.labels, indent=0) + "\n").encode(), users)
        manifest = Manifest(
            name=entry.recipe.name,
            backbone=backbone.name,
            task=backbone.task,
            input=backbone.input,
            segments=segments,
            split_points=tuple(
                SplitPoint(name=split, after_segment=k, feature_shape=shapes[split]) for k, split in enumerate(splits)
            ),
            points=(
                *(_entry(p.id, p.split, p.stride, p.step, units[p.id].latent_shape, measured) for p in points),
                *(
                    _entry(name, r.split, r.stride, r.step, r.latent_shape, measured, decoded=decoded.get(name))
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


def _write_segments(
    writer: BundleWriter,
    backbone: Backbone,
    splits: Sequence[str],
    shapes: Mapping[str, Shape3],
    any_size_after: int,
    progress: Callable[[str], None],
) -> tuple[Segment, ...]:
    """Write the backbone as a chain; segments after the split point `any_size_after` take features of any size."""
    segments = []
    bounds = [0, *(backbone.split_index(split) for split in splits), len(backbone.stages)]
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        name = f"to-{splits[index]}" if index < len(splits) else "to-output"
        progress(f"segment {name}")
        path = f"segments/{index:02d}-{name}.onnx"
        shape = backbone.input_shape if index == 0 else shapes[splits[index - 1]]
        role: FileRole = "edge" if index == 0 else "cloud" if index == len(splits) else "both"
        data = to_onnx(backbone.segment(start, stop), shape, any_size=index > any_size_after)
        writer.add(path, data, role)
        segments.append(Segment(name=name, file=path))
    return tuple(segments)


def _write_point(
    writer: BundleWriter,
    name: str,
    unit: BottleneckUnit,
    tables: FactorizedModel,
    conditional: ConditionalModel | None,
) -> None:
    writer.add(f"points/{name}/encoder.onnx", to_onnx(unit.encoder, unit.feature_shape), "edge")
    writer.add(f"points/{name}/decoder.onnx", to_onnx(unit.decoder, unit.latent_shape), "cloud")
    writer.add(f"points/{name}/tables.npz", tables.to_npz(), "both")
    if conditional is not None:
        conditional.check_fits(tables)
        writer.add(f"points/{name}/conditional.npz", conditional.to_npz(), "both")


def _entry(
    point_id: str,
    split: str,
    stride: int,
    step: float,
    latent_shape: Shape3,
    measured: MeasuredLadder | None,
    decoded: Shape3 | None = None,
) -> PointEntry:
    """The manifest's entry of a point. Without a measurement its accuracy is zero."""
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
