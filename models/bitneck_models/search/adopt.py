"""From the front of a search into a zoo entry: trained units, and their points in the recipe."""

import shutil
from collections.abc import Sequence
from typing import Any

import tomli_w

from bitneck.errors import InvalidConfig
from bitneck_models.search.front import Found
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import OWN_SCHEDULE
from bitneck_models.zoo.records import PointRecord

__all__ = ["adopt"]


def adopt(entry: ZooEntry, found: Sequence[Found], names: Sequence[str]) -> None:
    """Copy trained units into a zoo entry and append their points to its recipe.

    Args:
        entry: the zoo entry.
        found: trials of the front.
        names: ids of the new operating points.

    Raises:
        InvalidConfig: an id is taken, or a unit is on another machine.
    """
    taken = {point.id for point in entry.recipe.points} & set(names)
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
        shutil.copytree(f.folder, entry.point_folder(name))
        path = entry.point_folder(name) / "record.json"
        record = PointRecord.model_validate_json(path.read_bytes())
        record = record.model_copy(update={"recipe": record.recipe | own})
        path.write_text(record.model_dump_json(indent=1) + "\n")
        blocks.append(tomli_w.dumps({"points": [{"id": name} | point]}))
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
