"""Zoo entries on disk: a recipe, its trained units, their operating points, and what was measured.

recipe.toml                     what to train, and how
network.safetensors             weights of the network, if it was trained in this repository, and
network.toml, network.json      how it was trained
units/<id>/unit.safetensors     weights of the unit
units/<id>/record.json          resolved recipe, code version
points/<id>/point.json          the unit and its step, validation metrics
points/<id>/tables.npz          the factorized model
points/<id>/contexts.npz        the context model, written by `contexts` where it saves enough, and
points/<id>/contexts.json       how it was fitted, and what it saves
points/<id>/conditional.npz     the conditional model, written by `similar`, and
points/<id>/conditional.json    how it was fitted
points/<id>/spic.json           instead of all these: a point of the paper's authors, with its ONNX files and tables,
                                written by `import-spic`
int8.json, int8.npz             how the int8 files are made, and their proof, written by `quantize`
ladder.json                     rate and accuracy of every point on an evaluation set, written by `evaluate --record`
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from bitneck.bundle import Bundle
from bitneck.coding.arrays import written_arrays
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.context_model import ContextModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.ids import check_id
from bitneck.manifest import sha256_hex
from bitneck_models.networks.backbone import NETWORK_FILE, Backbone
from bitneck_models.networks.registry import build_backbone
from bitneck_models.spic.record import RECORD, SpicRecord
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.point import new_unit
from bitneck_models.zoo.recipe import OWN_SCHEDULE, Recipe, TrainingRecipe, UnitRecipe, load_recipe
from bitneck_models.zoo.records import (
    ConditionalRecord,
    ContextRecord,
    Int8Record,
    MeasuredLadder,
    PointRecord,
    UnitRecord,
)
from bitneck_models.zoo.selection import successors

__all__ = ["ZooEntry", "coding_digest", "tables_digests"]

Fitted = TypeVar("Fitted", ContextRecord, ConditionalRecord)

_COMMANDS = {"contexts": "contexts", "conditional": "similar"}
"""Commands that fit what an operating point may have beside its tables."""


class ZooEntry:
    """A folder of the zoo.

    Args:
        folder: the folder, with ``recipe.toml``.

    Raises:
        InvalidConfig: there is no recipe, or it is refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe(folder)

    def backbone(self, weights: Path | None = None) -> Backbone:
        """Build the recipe's network.

        Args:
            weights: a file of weights; None for ``network.safetensors`` of this entry, or, if there is none, for the
                network's own.
        """
        own = self.folder / NETWORK_FILE
        return build_backbone(self.recipe.backbone, weights or (own if own.is_file() else None))

    def trained(self) -> list[UnitRecipe]:
        """The units of the recipe that have trained weights, in the recipe's order."""
        return [unit for unit in self.recipe.units if (self.unit_folder(unit.id) / "unit.safetensors").is_file()]

    def edited(self, unit: UnitRecipe) -> list[str]:
        """The keys of a trained unit's recipe and schedule that are others now than when it was trained.

        Keys that an older version did not know had their defaults then. Without a record, nothing is known to differ.
        """
        try:
            record = UnitRecord.model_validate_json((self.unit_folder(unit.id) / "record.json").read_bytes())
            recipe = UnitRecipe.model_validate(record.recipe)
            training = TrainingRecipe.model_validate(record.training)
        except (OSError, ValidationError):
            return []
        own = set(UnitRecipe.model_fields) - {"id", "curve", "ship", *OWN_SCHEDULE}
        now = self.recipe.training_of(unit)
        differ = [key for key in own if getattr(recipe, key) != getattr(unit, key)]
        differ += [key for key in TrainingRecipe.model_fields if getattr(training, key) != getattr(now, key)]
        return sorted(differ)

    def shipped(self) -> list[UnitRecipe]:
        """The trained units that belong into the bundle.

        Raises:
            InvalidConfig: the recipe of one was edited since it was trained.
        """
        units = [unit for unit in self.trained() if unit.ship]
        for unit in units:
            if keys := self.edited(unit):
                raise InvalidConfig(
                    f"{unit.id}: its recipe was edited since it was trained ({', '.join(keys)}); run `bitneck-models "
                    f"train {self.folder}`, or take the edit back"
                )
        return units

    def points(self) -> dict[str, PointRecord]:
        """The operating points that tables were fitted for, by id, also of units that are not shipped any more.

        Their bytes are those of their contexts, where they have some.

        Raises:
            BundleCorrupt: a record is unreadable.
        """
        found = {}
        for path in sorted((self.folder / "points").glob("*/point.json")):
            try:
                record = PointRecord.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as exc:
                reason = str(exc).splitlines()[0]
                raise BundleCorrupt(f"{path} is not the record of an operating point ({reason})") from exc
            name = check_id(path.parent.name, "operating point")
            if (path.parent / "contexts.npz").is_file():
                coded = self._fitted(name, "contexts", ContextRecord).bytes_contexts
                record = record.model_copy(update={"validation_bytes": coded})
            found[name] = record
        return found

    def retired(self, points: Mapping[str, PointRecord]) -> dict[str, str]:
        """Those of its points that are left out of the bundle, each with the one in its place; see `successors`.

        Raises:
            InvalidConfig: the recipe of a unit was edited since it was trained.
        """
        units = {unit.id for unit in self.shipped()}
        candidates = {name: point for name, point in points.items() if point.unit in units}
        return successors(points, candidates, compete=not self.recipe.study)

    def imported(self) -> dict[str, SpicRecord]:
        """The points that `bitneck-models import-spic` wrote here, by id; the recipe does not name them.

        Raises:
            InvalidConfig: the name of a folder is no id, or it is the id of a unit of the recipe.
            BundleCorrupt: a record is unreadable, or its files were changed.
        """
        found = {}
        own = {unit.id for unit in self.recipe.units}
        for path in sorted((self.folder / "points").glob(f"*/{RECORD}")):
            name = check_id(path.parent.name, "operating point")
            if name in own:
                raise InvalidConfig(
                    f"{path.parent}: {name} is a unit of the recipe too; give the imported one another id"
                )
            found[name] = SpicRecord.read(path.parent)
        return found

    def point_folder(self, point_id: str) -> Path:
        """The folder of a point's files."""
        return self.folder / "points" / point_id

    def unit_folder(self, unit_id: str) -> Path:
        """The folder of a unit's files."""
        return self.folder / "units" / unit_id

    def unit(self, backbone: Backbone, recipe: UnitRecipe) -> BottleneckUnit:
        """Load a trained unit, frozen and in evaluation mode.

        Raises:
            InvalidConfig: the unit is not trained yet.
            BundleCorrupt: the file is unreadable, or does not fit the recipe.
        """
        path = self.unit_folder(recipe.id) / "unit.safetensors"
        if not path.is_file():
            raise InvalidConfig(
                f"{recipe.id} is not trained yet: {path} is missing; run `bitneck-models train {self.folder}`"
            )
        try:
            state = load_file(path)
            inherits = recipe.topology == "nested" and recipe.hidden is None
            hidden = int(state["encoder.body.first_norm.weight"].shape[0]) if inherits else None
            unit = new_unit(backbone, recipe, channels=int(state["encoder.mix_norm.weight"].shape[0]), hidden=hidden)
            unit.load_state_dict(state)
        except (RuntimeError, KeyError, SafetensorError, OSError) as exc:
            raise BundleCorrupt(f"{path} does not fit the recipe ({exc}); train {recipe.id} again") from exc
        return unit.eval().requires_grad_(requires_grad=False)

    def tables(self, point_id: str) -> FactorizedModel:
        """Load the tables of a fitted or an imported point.

        Raises:
            InvalidConfig: there are none.
            BundleCorrupt: they are unreadable.
        """
        path = self.point_folder(point_id) / "tables.npz"
        if not path.is_file():
            raise InvalidConfig(f"{path} is missing; run `bitneck-models train {self.folder}`")
        try:
            return FactorizedModel.from_npz(path.read_bytes())
        except BundleCorrupt as exc:
            raise BundleCorrupt(f"{path}: {exc}") from exc

    def contexts(self, point_id: str) -> ContextModel | None:
        """Load a point's context model; None if none is fitted, or it saves too little.

        Raises:
            BundleCorrupt: it is unreadable, or was fitted to other tables than the point's.
        """
        if not (self.point_folder(point_id) / "contexts.npz").is_file():
            return None
        record = self._fitted(point_id, "contexts", ContextRecord)
        return ContextModel.from_npz(self._fitted_file(point_id, "contexts", record.contexts_sha256))

    def save_contexts(self, point_id: str, data: bytes | None, record: ContextRecord) -> None:
        """Write how a point's contexts were fitted and, if they are kept, the context model."""
        folder = self.point_folder(point_id)
        (folder / "contexts.json").write_text(record.model_dump_json(indent=1) + "\n")
        if data is None:
            (folder / "contexts.npz").unlink(missing_ok=True)
        else:
            (folder / "contexts.npz").write_bytes(data)

    def conditional(self, point_id: str) -> ConditionalModel | None:
        """Load a point's conditional model; None if none is fitted yet.

        Raises:
            BundleCorrupt: it is unreadable, or was fitted to other tables than the point's.
        """
        if not (self.point_folder(point_id) / "conditional.npz").is_file():
            return None
        record = self._fitted(point_id, "conditional", ConditionalRecord)
        return ConditionalModel.from_npz(self._fitted_file(point_id, "conditional", record.conditional_sha256))

    def save_conditional(self, point_id: str, data: bytes, record: ConditionalRecord) -> None:
        """Write a point's conditional model, and how it was fitted."""
        folder = self.point_folder(point_id)
        (folder / "conditional.json").write_text(record.model_dump_json(indent=1) + "\n")
        (folder / "conditional.npz").write_bytes(data)

    def _fitted(self, point_id: str, what: str, kind: type[Fitted]) -> Fitted:
        """The record of a point's contexts or conditional model, which must be fitted to the point's tables."""
        folder = self.point_folder(point_id)
        path, command = folder / f"{what}.npz", _COMMANDS[what]
        try:
            record = kind.model_validate_json((folder / f"{what}.json").read_bytes())
        except (OSError, ValidationError) as exc:
            reason = str(exc).splitlines()[0]
            raise BundleCorrupt(
                f"{path} has no record beside it ({reason}); run `bitneck-models {command}` again"
            ) from exc
        if record.tables_sha256 != sha256_hex((folder / "tables.npz").read_bytes()):
            raise BundleCorrupt(
                f"{path} was fitted to other tables; remove it, or run `bitneck-models {command}` again"
            )
        return record

    def _fitted_file(self, point_id: str, what: str, sha256: str) -> bytes:
        """The model that a record is about."""
        path = self.point_folder(point_id) / f"{what}.npz"
        data = path.read_bytes()
        if sha256_hex(data) != sha256:
            raise BundleCorrupt(
                f"{path} is not what its record is about; remove it, or run `bitneck-models {_COMMANDS[what]}` again"
            )
        return data

    def annotated(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """Add this entry's name, and each point's recipe and training record, to the document of an evaluation.

        Raises:
            InvalidConfig: the document has a point that this entry does not have.
        """
        points = []
        imported, own = self.imported(), self.points()
        for point in evaluation["points"]:
            if point["id"] in imported:
                points.append(point | imported[point["id"]].annotation())
                continue
            if point["id"] not in own:
                raise InvalidConfig(f"{self.folder} has no operating point {point['id']}; it has: {', '.join(own)}")
            fitted = own[point["id"]]
            recipe = self.recipe.unit(fitted.unit)
            record = json.loads((self.unit_folder(recipe.id) / "record.json").read_bytes())
            kept = {key: record[key] for key in ("lambda_final", "estimated_bytes", "trained")}
            kept["validation_bytes"] = fitted.validation_bytes
            shown = recipe.model_dump(mode="json", by_alias=True) | {"step": fitted.step}
            points.append(point | {"unit": recipe.id, "recipe": shown, "record": kept})
        return {"name": self.recipe.name} | evaluation | {"points": points}

    def int8(self) -> tuple[Int8Record, dict[str, NDArray[Any]]] | None:
        """Load how the int8 files are made: the record and its arrays; None if `quantize` has not been run.

        Raises:
            InvalidConfig: the files are no such record.
        """
        path = self.folder / "int8.json"
        if not path.is_file():
            return None
        try:
            record = Int8Record.model_validate_json(path.read_bytes())
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                return record, {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, BadZipFile) as exc:
            reason = str(exc).splitlines()[0]
            raise InvalidConfig(
                f"{path} and its .npz do not say how to make int8 files ({reason}); run `bitneck-models quantize` "
                "again, or remove them"
            ) from exc

    def save_int8(self, record: Int8Record, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write how the int8 files are made."""
        (self.folder / "int8.npz").write_bytes(written_arrays(**arrays))
        (self.folder / "int8.json").write_text(record.model_dump_json(indent=1) + "\n")

    def ladder(self) -> MeasuredLadder | None:
        """Load what was measured; None before the first measurement.

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


def coding_digest(tables: FactorizedModel, contexts: ContextModel | None) -> str:
    """A digest of the numbers that decide how many bytes an operating point's symbols take."""
    return tables.digest if contexts is None else sha256_hex(f"{tables.digest} {contexts.digest}".encode())


def tables_digests(bundle: Bundle) -> dict[str, str]:
    """`coding_digest` of every operating point of a bundle, by id."""
    found = {}
    for point in bundle.manifest.ladder:
        tables = bundle.tables(point.id)
        found[point.id] = coding_digest(tables, bundle.contexts(point.id, tables))
    return found
