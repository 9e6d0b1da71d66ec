"""Typed files: the base of every recipe and record, and one way to read and check a TOML file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bitneck.errors import InvalidConfig
from bitneck.ids import ID_PATTERN

__all__ = ["Id", "Positive", "Seed", "Strict", "load_toml", "validated"]

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Base of recipes and records: immutable, refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: what the file should be, for the message.

    Raises:
        InvalidConfig: the file does not exist or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InvalidConfig(f"{path}: no {what} there ({exc.strerror})") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"{path}: not TOML ({exc})") from exc


def validated(model: type[M] | TypeAdapter[M], values: Mapping[str, Any], path: Path, top: str) -> M:
    """Check the values of a file and return them as a typed object.

    Args:
        model: the type, or one of several types.
        values: the content of the file.
        path: the file, for the message.
        top: the name of the whole file in the message, used when a problem belongs to no single key.

    Raises:
        InvalidConfig: an unknown key or a value out of range; the message names each.
    """
    try:
        return model.validate_python(values) if isinstance(model, TypeAdapter) else model.model_validate(values)
    except ValidationError as exc:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or top}: {e['msg']}" for e in exc.errors(include_url=False)
        )
        raise InvalidConfig(f"{path}: {problems}") from exc
