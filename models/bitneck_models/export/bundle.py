"""Export of a zoo entry as a bundle. Before the bundle is written, it is proven equal to the network and the units."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.context_model import ContextModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck.manifest import FileRole, Manifest, PointEntry, Segment, SplitPoint, UnitEntry, sha256_hex
from bitneck_models.export.int8 import int8_files, unpacked
from bitneck_models.export.proof import Proof, prove
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.units.layers import split_prelus
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry, coding_digest
from bitneck_models.zoo.records import MeasuredLadder, MeasuredPoint

__all__ = ["NOT_MEASURED", "export_bundle"]

NOT_MEASURED = "not measured"
"""Data set name of a point without a current measurement."""
_UNMEASURED = date(1970, 1, 1)
_IMPORTED_HALVES: dict[str, FileRole] = {"encoder.onnx": "edge", "decoder.onnx": "cloud"}
"""Both halves of an imported point, and who needs them."""

Shape3 = tuple[int, int, int]


def export_bundle(
    entry: ZooEntry,
    backbone: Backbone,
    out: Path,
    images: NDArray[np.float32],
    progress: Callable[[str], None] = lambda _what: None,
) -> tuple[Bundle, Proof]:
    """Export the trained units of a zoo entry with their operating points, and every imported point; prove the result.

    Points that another one of their split point beats on the recipe's validation part are left out; see
    `bitneck_models.zoo.selection`.

    Args:
        entry: the zoo entry; its units without weights are left out.
        backbone: the network of the recipe.
        out: the bundle's folder.
        images: images for the proof, (N, 3, H, W) float32, normalized.
        progress: called with what is being done.

    Raises:
        InvalidConfig: the entry has no trained unit, an imported point does not fit, or `out` is no bundle.
        ModelFailure: the export or the proof failed.
    """
    recipes, imported, fitted = {unit.id: unit for unit in entry.shipped()}, entry.imported(), entry.points()
    retired = entry.retired(fitted)
    points = {name: p for name, p in fitted.items() if p.unit in recipes and name not in retired}
    recipes = {name: recipe for name, recipe in recipes.items() if any(p.unit == name for p in points.values())}
    if not points and not imported:
        raise InvalidConfig(f"{entry.folder} has no trained units; run `bitneck-models train {entry.folder}`")
    used = {p.split for p in recipes.values()} | {r.split for r in imported.values()}
    splits = sorted(used & set(backbone.splits), key=backbone.split_index)
    shapes = {split: backbone.feature_shape(split) for split in splits}
    for name, record in imported.items():
        record.check_fits(name, backbone.name, shapes)
    decoded = {name: r.output_shape for name, r in imported.items() if r.output_shape != shapes[r.split]}
    any_size_after = min((splits.index(imported[name].split) for name in decoded), default=len(splits))
    units = {name: entry.unit(backbone, recipe) for name, recipe in recipes.items()}
    tables = {name: entry.tables(name) for name in (*points, *imported)}
    contexts = {name: entry.contexts(name) for name in points}
    measured = entry.ladder()
    if measured is not None:
        measured = measured.still_true({name: coding_digest(tables[name], contexts.get(name)) for name in tables})
    with BundleWriter(out) as writer:
        segments = _write_segments(writer, backbone, splits, shapes, any_size_after, progress)
        layers = _write_layers(writer, {name: (recipe.split, units[name]) for name, recipe in recipes.items()})
        for name, unit in units.items():
            progress(f"unit {name}")
            _write_unit(writer, name, unit, shared=name in layers)
        for name in points:
            _write_tables(writer, name, tables[name], contexts[name], entry.conditional(name))
        for name in imported:
            for half, user in _IMPORTED_HALVES.items():
                writer.add(f"units/{name}/{half}", (entry.point_folder(name) / half).read_bytes(), user)
            _write_tables(writer, name, tables[name], None, None)
        if (int8 := entry.int8()) is not None:
            progress("int8")
            graphs = [p for p, e in writer.files.items() if p.endswith(".onnx") and e.role in ("edge", "both")]
            for path, data in int8_files(
                int8[0], unpacked(int8[1]), {path: writer.read(path) for path in graphs}
            ).items():
                writer.add(path, data, "edge")
        writer.add("labels.json", (json.dumps(backbone.labels, indent=0) + "\n").encode(), "both")
        manifest = Manifest(
            name=entry.recipe.name,
            backbone=backbone.name,
            task=backbone.task,
            input=backbone.input,
            segments=segments,
            split_points=tuple(
                SplitPoint(name=split, after_segment=k, feature_shape=shapes[split]) for k, split in enumerate(splits)
            ),
            units=(
                *(
                    _unit_entry(name, r.split, r.stride, units[name].latent_shape, layer=layers.get(name))
                    for name, r in recipes.items()
                ),
                *(
                    _unit_entry(name, r.split, r.stride, r.latent_shape, decoded=decoded.get(name))
                    for name, r in imported.items()
                ),
            ),
            points=(
                *(_point_entry(name, p.unit, p.step, measured) for name, p in points.items()),
                *(_point_entry(name, name, r.step, measured) for name, r in imported.items()),
            ),
            retired={name: successor for name, successor in retired.items() if name not in imported},
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


def _write_layers(writer: BundleWriter, units: Mapping[str, tuple[str, BottleneckUnit]]) -> dict[str, str]:
    """Write each frozen layer that several encoders begin with once.

    Args:
        writer: of the bundle.
        units: split point and unit by id.

    Returns:
        The id of the layer that a unit begins with, by the unit's id; only those that share one.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (split, unit) in units.items():
        state = unit.encoder.halves()[0].state_dict()
        if state:
            digest = sha256_hex(save({key: value.contiguous() for key, value in state.items()}))
            groups.setdefault((split, digest), []).append(name)
    layers: dict[str, str] = {}
    for (split, _digest), names in groups.items():
        if len(names) > 1:
            same_split = len({layer for layer in layers.values() if units[names[0]][0] == split})
            layer = f"{split}-{same_split}"
            unit = units[names[0]][1]
            writer.add(f"layers/{layer}.onnx", to_onnx(unit.encoder.halves()[0], unit.feature_shape), "edge")
            layers |= dict.fromkeys(names, layer)
    return layers


def _write_unit(writer: BundleWriter, name: str, unit: BottleneckUnit, *, shared: bool) -> None:
    """Write a unit's halves; with `shared`, its encoder without the layers that are a file of their own."""
    encoder: nn.Module = unit.encoder
    shape = unit.feature_shape
    if shared:
        first, encoder = unit.encoder.halves()
        with torch.no_grad():
            shape = tuple(first(torch.zeros(1, *shape)).shape[1:])
    writer.add(f"units/{name}/encoder.onnx", to_onnx(encoder, shape), "edge")
    writer.add(f"units/{name}/decoder.onnx", to_onnx(split_prelus(unit.decoder), unit.latent_shape), "cloud")


def _write_tables(
    writer: BundleWriter,
    name: str,
    tables: FactorizedModel,
    contexts: ContextModel | None,
    conditional: ConditionalModel | None,
) -> None:
    writer.add(f"points/{name}/tables.npz", tables.to_npz(), "both")
    if contexts is not None:
        contexts.check_fits(tables)
        writer.add(f"points/{name}/contexts.npz", contexts.to_npz(), "both")
    if conditional is not None:
        conditional.check_fits(tables)
        writer.add(f"points/{name}/conditional.npz", conditional.to_npz(), "both")


def _unit_entry(
    unit_id: str,
    split: str,
    stride: int,
    latent_shape: Shape3,
    *,
    layer: str | None = None,
    decoded: Shape3 | None = None,
) -> UnitEntry:
    return UnitEntry(
        id=unit_id,
        split=split,
        stride=stride,
        channels=latent_shape[0],
        latent_shape=latent_shape,
        layer=layer,
        decoded_shape=decoded,
    )


def _point_entry(point_id: str, unit_id: str, step: float, measured: MeasuredLadder | None) -> PointEntry:
    """The manifest's entry of a point. Without a measurement its accuracy is zero."""
    result = measured.points.get(point_id) if measured is not None else None
    known = measured if result is not None else None
    result = result or MeasuredPoint(payload_bytes=0.0, bpp_payload=0.0, accuracy=0.0, agreement=0.0)
    return PointEntry(
        id=point_id,
        unit=unit_id,
        step=step,
        payload_bytes=result.payload_bytes,
        bpp_payload=result.bpp_payload,
        accuracy=result.accuracy,
        agreement=result.agreement,
        dataset=known.dataset if known is not None else NOT_MEASURED,
        images=known.images if known is not None else 1,
        measured=known.measured if known is not None else _UNMEASURED,
    )
