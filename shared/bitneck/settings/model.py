"""Settings of the programs. Each one is declared once, in a model.

Flags, environment variables, keys of the TOML file, defaults, help texts and ``docs/settings.md`` all come from the
model. A flag wins over the environment, the environment over the file, the file over the default. Unknown keys are
errors everywhere.
"""

import difflib
import ipaddress
import json
import logging
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from bitneck.errors import InvalidConfig
from bitneck.text import clean_text

__all__ = [
    "Address", "JsonTable", "Names", "Paths", "Settings", "Table", "Tables", "has_flag", "setting", "unknown_name",
]  # fmt: skip

_LOG = logging.getLogger(__name__)

_KUBERNETES = re.compile(r"(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)")
"""What follows our prefix in the variables that Kubernetes makes for a service whose name begins like our prefix."""


def _split(value: Any) -> Any:
    """A text as a list: JSON if it begins with a bracket, else separated by commas."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return json.loads(value)
    except ValueError as exc:
        raise ValueError("neither a JSON list nor values separated by commas") from exc


Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
"""Files or folders; in the environment separated by commas, or a JSON list."""

Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Texts; in the environment separated by commas, or a JSON list."""


def _parse(value: Any) -> Any:
    """JSON texts as what they say, also in a list; other values as they are."""
    if isinstance(value, list | tuple):
        return [_parse(part) for part in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as exc:
        raise ValueError("not JSON") from exc


Item = TypeVar("Item")

Tables = Annotated[tuple[Item, ...], NoDecode, BeforeValidator(_parse)]
"""Tables of the file (``[[name]]``), such as `Table`s; in the environment a JSON list, as flags JSON objects."""

JsonTable = Annotated[dict[str, Item], NoDecode, BeforeValidator(_parse)]
"""A table of the file (``[name]``); elsewhere a JSON object."""


def setting(text: str, group: str, *, flag: str | None = "", **bounds: Any) -> Any:
    """What a model says of one setting, to stand in ``Annotated``.

    Args:
        text: what it does, in plain words. The default need not be said.
        group: heading under which the help and the documents list it.
        flag: the flag, if it is not the setting's name with dashes, such as ``--provider``; None if there is none,
            because tables that hold secrets do not belong on a command line. No error shows the values of such.
        **bounds: of the value, as `pydantic.Field` takes them.
    """
    return Field(description=text, json_schema_extra={"group": group, "flag": flag}, **bounds)


def has_flag(field: FieldInfo) -> bool:
    """Whether a setting can be given on a command line."""
    return not isinstance(field.json_schema_extra, dict) or field.json_schema_extra.get("flag") is not None


def unknown_name(known: Iterable[str], names: Iterable[str]) -> str:
    """The first of the names that is not known, with the known ones, the nearest first; empty if all are known."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            others = [other for other in sorted(known) if other not in near]
            return f"{name}; known: {', '.join([*near, *others])}"
    return ""


class Table(BaseModel):
    """One of `Tables`, such as a table ``[[sinks]]``: frozen, and its unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if isinstance(values, Mapping) and (text := unknown_name(known, map(str, values))):
            raise ValueError(f"unknown key {text}")
        return values


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``HOST:PORT`` or ``[IPV6]:PORT``; port 0 lets the system choose, where a server listens.

        Raises:
            InvalidConfig: anything else.
        """
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):(\d{1,5})", text)
        if match is None:
            raise InvalidConfig(f"address {text[:80]!r} is not HOST:PORT, such as 127.0.0.1:50051")
        if int(match[3]) > 65535:
            raise InvalidConfig(f"address {text[:80]!r}: a port is at most 65535")
        return cls(match[1] or match[2], int(match[3]))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, such as 127.evil.example
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Settings(BaseSettings):
    """Base of a program's settings; a subclass gives ``env_prefix`` in its ``model_config``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, given: Mapping[str, Any], file: Path | None = None) -> Self:
        """The settings that a program's values, the environment, a file and the defaults give together.

        Args:
            given: values; None stands for not given.
            file: a TOML file, or None.

        Raises:
            InvalidConfig: see `load_with_origins`.
        """
        return cls.load_with_origins(given, file)[0]

    @classmethod
    def load_with_origins(
        cls, given: Mapping[str, Any], file: Path | None = None, *, flags: bool = False
    ) -> tuple[Self, dict[str, str]]:
        """`load`, and where each value came from.

        Args:
            given: as for `load`.
            file: likewise.
            flags: whether `given` comes from a command line; errors then name the flag.

        Returns:
            The settings; and by setting the flag, the variable, or the file and its key. Defaults have no origin.

        Raises:
            InvalidConfig: an unknown key in the file or the environment, or a value that is refused. The message names
                the setting, where its value came from, and what is expected.
        """
        given = {name: value for name, value in given.items() if value is not None}
        cls._refuse_unknown(cls.environment(), cls._own_variables(), "environment variable")
        from_file = cls._read(file) if file is not None else {}
        try:
            from_environment = EnvSettingsSource(cls)()
        except SettingsError as exc:
            raise InvalidConfig(f"the environment: {exc}") from exc
        origins = {name: f"{file}: {name}" for name in from_file}
        origins |= {name: cls.variable(name) for name in from_environment}
        origins |= {name: cls.flag(name) if flags else "" for name in given}
        values = from_file | from_environment | given
        try:
            return cls(**values), origins
        except ValidationError as exc:
            raise cls._refused(exc, origins, values) from exc

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of a setting."""
        return f"{cls.model_config.get('env_prefix', '')}{name.upper()}"

    @classmethod
    def flag(cls, name: str) -> str:
        """The flag of a setting."""
        extra = cls.model_fields[name].json_schema_extra if name in cls.model_fields else None
        own = extra.get("flag") if isinstance(extra, dict) else None
        return str(own or f"--{name.replace('_', '-')}")

    @classmethod
    def flagged(cls) -> list[str]:
        """The settings that have a flag."""
        return [name for name, field in cls.model_fields.items() if has_flag(field)]

    @classmethod
    def environment(cls) -> list[str]:
        """Every environment variable that is read; the last one names the file."""
        return [*map(cls.variable, cls.model_fields), cls.variable("config")]

    @classmethod
    def log_foreign_variables(cls) -> None:
        """Log which variables are passed over, because Kubernetes makes them for services. For a program's start."""
        if foreign := cls._foreign_variables():
            _LOG.info("variables of a Kubernetes service are passed over: %s", ", ".join(foreign))

    @classmethod
    def _foreign_variables(cls) -> list[str]:
        prefix, known = cls.variable(""), set(cls.environment())
        ours = sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
        return [name for name in ours if _KUBERNETES.fullmatch(name.removeprefix(prefix))]

    @classmethod
    def _own_variables(cls) -> list[str]:
        """The variables with our prefix, less the foreign ones."""
        ours = {name for name in os.environ if name.startswith(cls.variable(""))}
        return sorted(ours - set(cls._foreign_variables()))

    @classmethod
    def _read(cls, file: Path) -> dict[str, Any]:
        try:
            file.read_bytes()  # the source below passes over a file that is not there
            values = TomlConfigSettingsSource(cls, toml_file=file).toml_data
        except OSError as exc:
            raise InvalidConfig(f"{file}: cannot read the configuration ({exc.strerror})") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise InvalidConfig(f"{file}: not TOML ({exc})") from exc
        cls._refuse_unknown(cls.model_fields, values, f"{file}: key")
        return values

    @staticmethod
    def _refuse_unknown(known: Iterable[str], names: Iterable[str], what: str) -> None:
        if text := unknown_name(known, names):
            raise InvalidConfig(f"unknown {what} {text}")

    @classmethod
    def _refused(cls, exc: ValidationError, origins: Mapping[str, str], values: Mapping[str, Any]) -> InvalidConfig:
        first = exc.errors(include_url=False)[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        if not first["loc"]:  # about several settings together; among them may be secrets
            return InvalidConfig(f"settings: {message}")
        name = str(first["loc"][0])
        where = _place(first["loc"], values.get(name))
        if origin := origins.get(name, ""):
            where += f" ({origin})"
        field = cls.model_fields.get(name)
        if field is not None and (not has_flag(field) or "Secret" in repr(field.annotation)):
            return InvalidConfig(f"{where}: {message}")
        return InvalidConfig(f"{where}: {message} (got {first.get('input')!r:.80})")


def _place(loc: Sequence[int | str], value: Any) -> str:
    """Where a refused value stands: its setting and keys. Of several tables, by its name, else counted from 1."""
    setting, *keys = loc
    if not keys or not isinstance(keys[0], int) or not isinstance(value, list | tuple) or keys[0] >= len(value):
        return f"setting {'.'.join(map(str, loc))}"
    table, (number, *rest) = value[keys[0]], keys
    table = table if isinstance(table, Mapping) else {}
    if rest and rest[0] == table.get("kind"):  # which of several forms it has
        rest = rest[1:]
    named = table.get("name")
    what = f"setting {setting}, number {int(number) + 1}"
    if isinstance(named, str) and named:
        what = f"{str(setting).removesuffix('s')} {clean_text(named, 80)}"
    return f"{what}: {'.'.join(map(str, rest))}" if rest else what
