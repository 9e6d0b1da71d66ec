"""The folder and the files of a spool: locking, reading, writing, syncing."""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from bitneck.errors import InvalidConfig

__all__ = ["FULL", "Complaints", "locked", "numbers_in", "open_again", "sync_folder", "whole", "write"]

_LOG = logging.getLogger(__name__)
_LOG_EVERY_S = 60.0

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that has no room."""
_MOST_FILE = 64 << 20
"""A larger file is none of ours."""


class Complaints:
    """What goes wrong with a spool, in the log, once a minute at most.

    Args:
        folder: of the spool.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logged = -_LOG_EVERY_S

    def say(self, text: str) -> None:
        """Log it, unless something was logged a moment ago."""
        if time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            _LOG.warning("the spool %s: %s", self._folder, text)


def locked(folder: Path) -> int:
    """Make a folder if it is not there, and lock it for this process.

    Returns:
        The descriptor that holds the lock as long as it is open.

    Raises:
        InvalidConfig: another process uses it, or it cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise InvalidConfig(f"the spool {folder} cannot be written ({exc.strerror}); choose another folder") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(lock)
        raise InvalidConfig(
            f"the spool {folder} is used by another process; give each its own folder (--spool)"
        ) from exc
    return lock


def numbers_in(folder: Path) -> list[int]:
    """The numbers of the files of frames in a folder, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.frames") if path.stem.isdecimal() and len(path.stem) < 12)


def open_again(paths: Iterable[Path]) -> list[int]:
    """Open files once more, for a sync; the caller closes them. Files that somebody has removed are left out.

    Raises:
        OSError: they cannot be opened. None is open then.
    """
    opened: list[int] = []
    try:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                opened.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return opened


def sync_folder(folder: Path) -> None:
    """The names of a folder are on the disk when this returns.

    Raises:
        OSError: they cannot be brought there.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole(descriptor: int, path: Path) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: it cannot be read, or is no file of a spool.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_FILE:
        raise OSError(f"{path} is no file of a spool")
    parts, place = [], 0
    while part := os.pread(descriptor, 1 << 20, place):
        parts.append(part)
        place += len(part)
    return b"".join(parts)


def write(descriptor: int, data: bytes, place: int) -> None:
    """Write at a place; if that fails, nothing behind it is left.

    Raises:
        OSError: it cannot be written.
    """
    view, at = memoryview(data), place
    try:
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, place)
        raise
