"""From the front of a search into a zoo entry: trained units with their first points, and their recipes."""

import shutil
from collections.abc import Sequence
from typing import Any

import tomli_w

from bitneck.errors import InvalidConfig
from bitneck_models.search.front import Found
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import OWN_SCHEDULE
from bitneck_models.zoo.records import PointRecord, UnitRecord

__all__ = ["adopt"]


def adopt(entry: ZooEntry, found: Sequence[Found], names: Sequence[str]) -> None:
    """Copy trained units and their first points into a zoo entry, and append the units to its recipe.

    Args:
        entry: the zoo entry.
        found: trials of the front.
        names: ids of the new units, and of their first operating points.

    Raises:
        InvalidConfig: an id is taken, or a unit is on another machine.
    """
    taken = ({unit.id for unit in entry.recipe.units} | set(entry.points())) & set(names)
    if taken:
        raise InvalidConfig(f"{entry.folder} has {', '.join(sorted(taken))} already: choose another --prefix")
    for f in found:
        if not (f.folder / "unit.safetensors").is_file():
            raise InvalidConfig(
                f"the unit of trial {f.number} is not at {f.folder}: {f.machine} trained it; copy that folder here, or "
                "give all workers a --runs that they share"
            )
    blocks = []
    for f, name in zip(found, names, strict=True):
        own = {key: f.training[key] for key in OWN_SCHEDULE} | {"id": name}
        point = {key: _plain(value) for key, value in (f.recipe | own).items() if value is not None}
        unit_folder, point_folder = entry.unit_folder(name), entry.point_folder(name)
        for folder, file in ((unit_folder, "unit.safetensors"), (point_folder, "tables.npz")):
            folder.mkdir(parents=True)
            shutil.copyfile(f.folder / file, folder / file)
        record = UnitRecord.model_validate_json((f.folder / "record.json").read_bytes())
        record = record.model_copy(update={"recipe": record.recipe | own})
        (unit_folder / "record.json").write_text(record.model_dump_json(indent=1) + "\n")
        fitted = PointRecord.model_validate_json((f.folder / "point.json").read_bytes())
        (point_folder / "point.json").write_text(
            fitted.model_copy(update={"unit": name}).model_dump_json(indent=1) + "\n"
        )
        blocks.append(tomli_w.dumps({"units": [{"id": name} | point]}))
    path = entry.folder / "recipe.toml"
    text = path.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(blocks)
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").rename(path)


def _plain(value: Any) -> Any:
    """A value without null, which TOML does not have."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value
