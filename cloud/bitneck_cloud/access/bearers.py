"""Bearer tokens with roles: who a token stands for. They come from settings and from files that are read again."""

import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from bitneck.errors import InvalidConfig

__all__ = ["MIN_SECRET_CHARACTERS", "BearerTokens", "Holder", "Role", "read_token_file"]

_LOG = logging.getLogger(__name__)

MIN_SECRET_CHARACTERS = 16
"""Shorter secrets are refused: they can be guessed."""

_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class Role(StrEnum):
    """What the holder of a token may do. Each HTTP role includes the ones before it; a device is none of them."""

    DEVICE = "device"
    METRICS = "metrics"
    READ = "read"
    OPERATE = "operate"


HTTP_ROLES = (Role.METRICS, Role.READ, Role.OPERATE)
"""The roles of the control API, in rising order."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a token.

    Attributes:
        role: what the token allows.
        name: of the token; empty for the one token that a setting gives.
        digest: of the token, for comparing; the token cannot be found from it.
    """

    role: Role
    name: str
    digest: bytes

    def __str__(self) -> str:
        return f"{self.role} {self.name}".rstrip()


class BearerTokens:
    """The tokens that are valid now. With no token and no file, everybody may call.

    A token is found by its keyed digest, so the time of a look-up says nothing about the secret.

    Args:
        role: of `single`.
        single: a token from the settings, or None.
        file: see `read_token_file`; None for none.

    Raises:
        InvalidConfig: the file cannot be used.
    """

    def __init__(self, role: Role, single: str | None = None, file: Path | None = None) -> None:
        self._key = secrets.token_bytes(32)
        self._role = role
        self._single = single
        self._file = file
        self._seen: tuple[int, ...] | None = None
        self._holders: Mapping[bytes, Holder] = {}
        if file is not None:
            self._seen = _stamp(file)
        self._holders = self._read()

    @property
    def needed(self) -> bool:
        """Whether calls need a token. A file makes them need one, even while it lists none."""
        return self._single is not None or self._file is not None

    def find(self, given: str) -> Holder | None:
        """Who holds this token; None for a token that is not valid, or for none at all."""
        return self._holders.get(self._digest(given)) if given else None

    def valid(self, holder: Holder) -> bool:
        """Whether a holder that was found earlier still has a valid token."""
        return self._holders.get(holder.digest) == holder

    def refresh(self) -> bool:
        """Read the file again if it has changed. A file that cannot be used changes nothing: the log says why.

        Returns:
            Whether the tokens are others now.
        """
        if self._file is None or (stamp := _stamp(self._file)) == self._seen:
            return False
        self._seen = stamp
        try:
            holders = self._read()
        except InvalidConfig as exc:
            _LOG.error("the tokens stay as they were: %s", exc)
            return False
        before, self._holders = self._holders, holders
        _LOG.info("%s: %d tokens, %d before", self._file, len(holders), len(before))
        return holders != before

    def _read(self) -> dict[bytes, Holder]:
        entries = list(read_token_file(self._file, self._role)) if self._file is not None else []
        if self._single is not None:
            entries.append((self._role, "", self._single))
        holders: dict[bytes, Holder] = {}
        for role, name, token in entries:
            digest = self._digest(token)
            if digest in holders:
                raise InvalidConfig(f"{role} {name!r} has the same token as {holders[digest]}; give each its own")
            holders[digest] = Holder(role, name, digest)
        return holders

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode(errors="replace"), sha256)


def read_token_file(file: Path, role: Role) -> Iterable[tuple[Role, str, str]]:
    """The role, name and token of each line of a token file.

    A line of the devices' file is ``NAME TOKEN``, of the control API's ``ROLE NAME TOKEN``. Empty lines and lines
    that begin with ``#`` are passed over. Several tokens may have one name: while a token is replaced, both are valid.

    Args:
        file: to read.
        role: `Role.DEVICE` for the devices' file, any other for the control API's.

    Raises:
        InvalidConfig: the file cannot be read, or a line is wrong. No message holds a token.
    """
    try:
        if not file.is_file():
            raise InvalidConfig(f"{file}: no token file is there")
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidConfig(f"{file}: cannot read the tokens ({exc})") from exc
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidConfig(f"{file}: a token file has at most {_MAX_FILE_BYTES} bytes")
    entries: list[tuple[Role, str, str]] = []
    roles = (Role.DEVICE,) if role is Role.DEVICE else HTTP_ROLES
    form = "NAME TOKEN" if role is Role.DEVICE else f"ROLE NAME TOKEN, with a role of {', '.join(roles)}"
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        given = Role.DEVICE.value if role is Role.DEVICE else words.pop(0)
        if len(words) != 2 or given not in roles:
            raise InvalidConfig(f"{file}: line {number} is not {form}")
        name, token = words
        if not _NAME.match(name):
            raise InvalidConfig(f"{file}: line {number}: a name has 1 to 64 letters, digits, dots, '-' or '_'")
        if len(token) < MIN_SECRET_CHARACTERS:
            raise InvalidConfig(
                f"{file}: line {number}: the token of {name} is too short: give at least {MIN_SECRET_CHARACTERS} "
                "random characters"
            )
        entries.append((Role(given), name, token))
    return entries


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
