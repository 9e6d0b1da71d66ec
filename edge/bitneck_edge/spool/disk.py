"""Reading, writing and syncing the files of a spool."""

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

__all__ = ["open_again", "sync_folder", "whole", "write"]

_MOST_FILE = 64 << 20
"""A larger file is none of ours."""


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
