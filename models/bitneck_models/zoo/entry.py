"""Zoo entries on disk: a recipe, its trained units and tables, and what was measured.

recipe.toml                     what was trained, and how
network.safetensors             the network itself, where it was trained here (`network.toml`, `network.json`)
points/<id>/unit.safetensors    weights
points/<id>/tables.npz          the factorized model
points/<id>/conditional.npz     the conditional model, by `similar`; and conditional.json, how it was fitted
points/<id>/record.json         resolved recipe, code version, validation metrics
points/<id>/spic.json           of a point of the paper's authors instead, with its ONNX files and tables: `import-spic`
ladder.json                     rate and accuracy of every point on an evaluation set, by `evaluate --record`
"""

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bitneck.bundle import Bundle
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.ids import check_id
from bitneck.manifest import sha256_hex
from bitneck_models.networks.backbone import NETWORK_FILE, Backbone
from bitneck_models.networks.registry import build_backbone
from bitneck_models.spic.point import RECORD, SpicRecord
from bitneck_models.units.topologies import TOPOLOGIES
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import PointRecipe, Recipe, load_recipe

__all__ = [
    "MeasuredLadder",
    "MeasuredPoint",
    "PointRecord",
    "ZooEntry",
    "new_unit",
    "round_weights",
    "save_point",
    "tables_digests",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PointRecord(_Strict):
    """What stands beside a trained unit: how it came to be, and its validation metrics."""

    recipe: dict[str, Any]
    training: dict[str, Any]
    code_version: str
    torch_version: str
    train_features: int
    validation_photos: int
    lambda_final: float
    estimated_bytes: float
    validation_bytes: float
    validation_agreement: float
    validation_mean_iou: float | None = None
    trained: date
    unit_sha256: str = ""
    tables_sha256: str = ""


class MeasuredPoint(_Strict):
    """One operating point on an evaluation set, through real bytes.

    `tables_digest` is `FactorizedModel.digest` of what was measured. It tells a point that was trained again, for that
    has other tables; not a change of the recipe's step, nor of the network, without training.
    """

    payload_bytes: Annotated[float, Field(ge=0)]
    bpp_payload: Annotated[float, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    tables_digest: str = ""

    def measured_with(self, tables: FactorizedModel) -> bool:
        """Whether these tables were measured; of a point that was recorded without a digest nobody can tell."""
        return self.tables_digest in ("", tables.digest)


class MeasuredLadder(_Strict):
    """Every operating point on one evaluation set."""

    dataset: str
    images: Annotated[int, Field(ge=1)]
    measured: date
    uncompressed_accuracy: Annotated[float, Field(ge=0, le=1)]
    points: dict[str, MeasuredPoint]

    def still_true(self, tables: Mapping[str, FactorizedModel]) -> Self:
        """Without the points that were trained again since: those whose tables are others now."""
        kept = {p: m for p, m in self.points.items() if p not in tables or m.measured_with(tables[p])}
        return self.model_copy(update={"points": kept})


class ZooEntry:
    """A folder of the zoo.

    Args:
        folder: with ``recipe.toml``.

    Raises:
        InvalidConfig: no such recipe, or a refused one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe(folder)

    def backbone(self, weights: Path | None = None) -> Backbone:
        """The network, from `weights`, from this entry's own ``network.safetensors``, or from where it has its own."""
        own = self.folder / NETWORK_FILE
        return build_backbone(self.recipe.backbone, weights or (own if own.is_file() else None))

    def trained(self) -> list[PointRecipe]:
        """The points of the recipe that have trained weights, in the recipe's order."""
        return [point for point in self.recipe.points if (self.point_folder(point.id) / "unit.safetensors").is_file()]

    def shipped(self) -> list[PointRecipe]:
        """Those of `trained` that are for the bundle."""
        return [point for point in self.trained() if point.ship]

    def imported(self) -> dict[str, SpicRecord]:
        """The points that `bitneck-models import-spic` wrote here, by id; they stand in no recipe.

        Raises:
            InvalidConfig: a folder whose name is no id, or that of a point of the recipe.
            BundleCorrupt: a record that is none, or files that were changed.
        """
        found = {}
        own = {point.id for point in self.recipe.points}
        for path in sorted((self.folder / "points").glob(f"*/{RECORD}")):
            name = check_id(path.parent.name, "operating point")
            if name in own:
                raise InvalidConfig(
                    f"{path.parent}: {name} is a point of the recipe too; give the imported one another"
                )
            found[name] = SpicRecord.read(path.parent)
        return found

    def point_folder(self, point_id: str) -> Path:
        """Where a point's files lie."""
        return self.folder / "points" / point_id

    def unit(self, backbone: Backbone, point: PointRecipe) -> BottleneckUnit:
        """A point's trained unit, in evaluation mode.

        Raises:
            InvalidConfig: it is not trained yet.
            BundleCorrupt: the file is unreadable, or does not fit the recipe.
        """
        path = self.point_folder(point.id) / "unit.safetensors"
        if not path.is_file():
            raise InvalidConfig(
                f"{point.id} is not trained yet: {path} is missing; run `bitneck-models train {self.folder}`"
            )
        try:
            state = load_file(path)
            inherits = point.topology == "nested" and point.hidden is None
            hidden = int(state["encoder.body.first_norm.weight"].shape[0]) if inherits else None
            unit = new_unit(backbone, point, channels=int(state["encoder.mix_norm.weight"].shape[0]), hidden=hidden)
            unit.load_state_dict(state)
        except (RuntimeError, KeyError, SafetensorError, OSError) as exc:
            raise BundleCorrupt(f"{path} does not fit the recipe ({exc}); train {point.id} again") from exc
        return unit.eval().requires_grad_(requires_grad=False)

    def tables(self, point_id: str) -> FactorizedModel:
        """The tables of a point of the recipe, or of an imported one.

        Raises:
            InvalidConfig: not there.
            BundleCorrupt: unreadable.
        """
        path = self.point_folder(point_id) / "tables.npz"
        if not path.is_file():
            raise InvalidConfig(f"{path} is missing; run `bitneck-models train {self.folder}`")
        try:
            return FactorizedModel.from_npz(path.read_bytes())
        except BundleCorrupt as exc:
            raise BundleCorrupt(f"{path}: {exc}") from exc

    def conditional(self, point: PointRecipe) -> ConditionalModel | None:
        """A point's conditional model; None before one is fitted.

        Raises:
            BundleCorrupt: unreadable, or not that of the point's tables.
        """
        folder = self.point_folder(point.id)
        path = folder / "conditional.npz"
        if not path.is_file():
            return None
        model = ConditionalModel.from_npz(path.read_bytes())
        try:
            fitted_to = json.loads((folder / "conditional.json").read_bytes())["tables_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise BundleCorrupt(f"{path} has no record beside it ({exc}); run `bitneck-models similar` again") from exc
        if fitted_to != sha256_hex((folder / "tables.npz").read_bytes()):
            raise BundleCorrupt(f"{path} was fitted to other tables; remove it, or run `bitneck-models similar` again")
        return model

    def save_conditional(self, point_id: str, data: bytes, record: str) -> None:
        """Write a point's conditional model and the JSON record of how it was fitted."""
        folder = self.point_folder(point_id)
        (folder / "conditional.json").write_text(record)
        (folder / "conditional.npz").write_bytes(data)

    def save(self, point: PointRecipe, unit: BottleneckUnit, tables: FactorizedModel, record: PointRecord) -> None:
        """Write a trained point; see `save_point`."""
        save_point(self.point_folder(point.id), unit, tables, record)

    def annotated(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """An evaluation's document with each point's recipe and training record, and this entry's name.

        Raises:
            InvalidConfig: it has a point that this entry has not.
        """
        points = []
        imported = self.imported()
        for point in evaluation["points"]:
            if point["id"] in imported:
                points.append(point | imported[point["id"]].annotation())
                continue
            recipe = self.recipe.point(point["id"])
            record = json.loads((self.point_folder(recipe.id) / "record.json").read_bytes())
            kept = {key: record[key] for key in ("lambda_final", "estimated_bytes", "validation_bytes", "trained")}
            points.append(point | {"recipe": recipe.model_dump(mode="json", by_alias=True), "record": kept})
        return {"name": self.recipe.name} | evaluation | {"points": points}

    def ladder(self) -> MeasuredLadder | None:
        """What was measured, or None before any measurement.

        Raises:
            InvalidConfig: the file is not a measured ladder.
        """
        path = self.folder / "ladder.json"
        if not path.is_file():
            return None
        try:
            return MeasuredLadder.model_validate_json(path.read_bytes())
        except ValidationError as exc:
            raise InvalidConfig(f"{path} is not a measured ladder ({exc.error_count()} problems)") from exc

    def save_ladder(self, ladder: MeasuredLadder) -> None:
        """Write what was measured."""
        text = json.dumps(json.loads(ladder.model_dump_json()), indent=1, sort_keys=True)
        (self.folder / "ladder.json").write_text(text + "\n")


def tables_digests(bundle: Bundle) -> dict[str, str]:
    """`FactorizedModel.digest` of every operating point of a bundle, by id."""
    return {point.id: bundle.tables(point.id).digest for point in bundle.manifest.ladder}


def save_point(folder: Path, unit: BottleneckUnit, tables: FactorizedModel, record: PointRecord) -> None:
    """Write a trained point, its digests in the record; the weights last, since they mark it as trained.

    What was fitted to earlier tables, the conditional model, goes.

    Weights are kept as float16: see `round_weights`.

    Args:
        folder: of the point; made where it does not exist.
        unit: trained.
        tables: fitted to it.
        record: without digests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in unit.state_dict().items()}
    weights, arrays = save({k: v.contiguous() for k, v in state.items()}), tables.to_npz()
    digests = {"unit_sha256": sha256_hex(weights), "tables_sha256": sha256_hex(arrays)}
    for name in ("conditional.npz", "conditional.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tables.npz").write_bytes(arrays)
    (folder / "record.json").write_text(record.model_copy(update=digests).model_dump_json(indent=1) + "\n")
    temporary = folder / "unit.part"
    temporary.write_bytes(weights)
    temporary.rename(folder / "unit.safetensors")


@torch.no_grad()
def round_weights(unit: BottleneckUnit) -> None:
    """Round a unit's weights to float16, in place, so that what is kept is what was measured."""
    for value in unit.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())


def new_unit(
    backbone: Backbone, point: PointRecipe, channels: int | None = None, hidden: int | None = None
) -> BottleneckUnit:
    """A fresh unit of a point's geometry, its weights drawn from seed 0.

    Args:
        backbone: gives the feature's shape.
        point: gives topology, stride and kernel.
        channels: Cr; None for the recipe's.
        hidden: H; None for the recipe's.

    Raises:
        InvalidConfig: a split point, stride or number of channels that does not fit the backbone.
    """
    feature_shape = backbone.feature_shape(point.split)
    traits = TOPOLOGIES[point.topology]
    inherited = point.channels if traits.takes_hidden and traits.hidden_by_channels is None else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BottleneckUnit(
            feature_shape,
            channels or point.channels,
            point.stride,
            point.kernel,
            point.filters,
            point.topology,
            hidden or point.hidden or inherited,
            group=point.group,
        ).eval()
