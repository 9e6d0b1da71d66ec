"""Settings of the two programs: flags > environment > file > default; unknown keys are errors everywhere."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from bitneck.errors import InvalidConfig

__all__ = ["Address", "Settings"]


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
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Settings(BaseSettings):
    """Base of a program's settings; a subclass gives ``env_prefix`` in its ``model_config``."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, flags: Mapping[str, Any], file: Path | None = None) -> Self:
        """Put the sources together.

        Args:
            flags: values given on the command line; None stands for not given.
            file: a TOML file, or None.

        Raises:
            InvalidConfig: an unknown key in the file or the environment, or a value that is refused; the message
                names it.
        """
        prefix = str(cls.model_config.get("env_prefix", ""))
        known = {prefix + name.upper() for name in cls.model_fields} | {prefix + "CONFIG"}
        unknown = sorted(name for name in os.environ if name.startswith(prefix) and name not in known)
        if unknown:
            raise InvalidConfig(f"unknown environment variable {unknown[0]}; known: {', '.join(sorted(known))}")
        from_file = _read(file) if file is not None else {}
        from_environment = {name for name in cls.model_fields if prefix + name.upper() in os.environ}
        values = {key: value for key, value in from_file.items() if key not in from_environment}
        values |= {key: value for key, value in flags.items() if value is not None}
        try:
            return cls(**values)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            if not first["loc"]:  # about several settings together; among them may be secrets
                raise InvalidConfig(f"settings: {first['msg']}") from None
            name = ".".join(str(part) for part in first["loc"])
            field = cls.model_fields.get(str(first["loc"][0]))
            if field is not None and "Secret" in repr(field.annotation):
                raise InvalidConfig(f"setting {name}: {first['msg']}") from None
            raise InvalidConfig(f"setting {name}: {first['msg']} (got {first.get('input')!r:.80})") from exc


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InvalidConfig(f"{file}: cannot read the configuration ({exc.strerror})") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"{file}: not TOML ({exc})") from exc
