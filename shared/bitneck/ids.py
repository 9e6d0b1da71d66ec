"""Ids of models and operating points, and paths inside a bundle: checked before they are used. Length of names."""

import re

from bitneck.errors import InvalidConfig

__all__ = ["ID_PATTERN", "MAX_CLIENT_CHARACTERS", "PATH_PATTERN", "check_id", "check_relative_path"]

ID_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""Pattern of the id of a model or an operating point. No slash and no leading dot: it cannot leave a folder."""

PATH_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63}){0,3}$"
"""Pattern of a file's path inside a bundle: at most four ids, joined by slashes."""

MAX_CLIENT_CHARACTERS = 128
"""Of a client's name. It may have any characters; those that move a cursor are replaced where it is shown."""

# \Z, not $: in Python `$` also matches before a final newline.
_ID = re.compile(ID_PATTERN[:-1] + r"\Z")
_PATH = re.compile(PATH_PATTERN[:-1] + r"\Z")


def check_id(value: str, what: str) -> str:
    """Return `value` if it is a well-formed id.

    Args:
        value: the id.
        what: the noun for the message, such as "operating point".

    Raises:
        InvalidConfig: it does not match `ID_PATTERN`.
    """
    if not _ID.match(value):
        raise InvalidConfig(
            f"{what} id {value[:80]!r} is malformed: use 1 to 64 of a-z, 0-9, dot, underscore and hyphen, "
            "beginning with a letter or a digit"
        )
    return value


def check_relative_path(value: str) -> str:
    """Return `value` if it is a well-formed path inside a bundle.

    Raises:
        InvalidConfig: it does not match `PATH_PATTERN`.
    """
    if not _PATH.match(value):
        raise InvalidConfig(f"path {value[:80]!r} is malformed: a bundle's paths look like points/s1-r3/tables.npz")
    return value
