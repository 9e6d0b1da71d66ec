"""Upgrade of a zoo entry from before units and operating points were two things. Nothing is trained."""

import json
import os
import re
from datetime import date
from pathlib import Path

from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck_models.zoo.records import PointRecord, UnitRecord

__all__ = ["upgrade_entry"]

_POINTS = re.compile(r"^(\s*)\[\[\s*points\s*\]\]", re.MULTILINE)
_OF_A_POINT = ("validation_photos", "validation_bytes", "validation_agreement", "validation_mean_iou", "tables_sha256")


def upgrade_entry(folder: Path) -> list[str]:
    """Upgrade a zoo entry in place: ``points/<id>/unit.safetensors`` and its record move to ``units/<id>/``.

    The tables stay where they are, and their digests hold. An upgrade that was cut off goes on where it stopped.

    Args:
        folder: the zoo entry.

    Returns:
        The ids of the units that were moved.

    Raises:
        InvalidConfig: there is no recipe, or the folder cannot be written.
        BundleCorrupt: a record is unreadable.
    """
    recipe = folder / "recipe.toml"
    try:
        text = recipe.read_text(encoding="utf-8")
        moved = [_upgrade_point(folder, path.parent.name) for path in sorted((folder / "points").glob("*/record.json"))]
        upgraded = _POINTS.sub(r"\1[[units]]", text)
        if upgraded != text:
            part = recipe.with_suffix(".part")
            part.write_text(upgraded, encoding="utf-8")
            part.replace(recipe)
    except OSError as exc:
        raise InvalidConfig(f"{folder} cannot be upgraded: {exc.filename}: {exc.strerror}") from exc
    return moved


def _upgrade_point(folder: Path, name: str) -> str:
    """Move one unit; the old record goes last, because it marks what is still to do."""
    old, new = folder / "points" / name, folder / "units" / name
    try:
        values = json.loads((old / "record.json").read_bytes())
        of_point = {key: values.pop(key) for key in _OF_A_POINT if key in values}
        unit = UnitRecord.model_validate(values)
        point = PointRecord(
            unit=name,
            split=unit.recipe["split"],
            step=unit.recipe["step"],
            fitted=date.fromisoformat(values["trained"]),
            **of_point,
        )
    except (ValueError, KeyError, TypeError) as exc:
        reason = str(exc).splitlines()[0]
        raise BundleCorrupt(f"{old / 'record.json'} is not the record of a trained point ({reason})") from exc
    new.mkdir(parents=True, exist_ok=True)
    (new / "record.json").write_text(unit.model_dump_json(indent=1) + "\n")
    (old / "point.json").write_text(point.model_dump_json(indent=1) + "\n")
    if (old / "unit.safetensors").exists():
        os.replace(old / "unit.safetensors", new / "unit.safetensors")  # noqa: PTH105  atomic
    (old / "record.json").unlink()
    return name
