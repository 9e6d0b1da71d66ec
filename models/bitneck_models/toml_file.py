"""Typed TOML files: recipes, networks and search spaces are read, checked and refused in one way."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bitneck.errors import InvalidConfig

__all__ = ["load_toml", "validated"]

M = TypeVar("M", bound=BaseModel)


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """The values of a TOML file.

    Args:
        path: the file.
        what: it should be, for the message.

    Raises:
        InvalidConfig: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InvalidConfig(f"{path}: no {what} there ({exc.strerror})") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"{path}: not TOML ({exc})") from exc


def validated(model: type[M], values: Mapping[str, Any], path: Path, top: str) -> M:
    """Values as a typed object.

    Args:
        model: its type.
        values: of the file.
        path: of the file, for the message.
        top: what the message calls the whole file, where a problem is no single key's.

    Raises:
        InvalidConfig: an unknown key or a value out of range; the message names each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or top}: {e['msg']}" for e in exc.errors(include_url=False)
        )
        raise InvalidConfig(f"{path}: {problems}") from exc
