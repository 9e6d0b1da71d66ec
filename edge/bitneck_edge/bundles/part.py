"""A file on its way into the store: what has come of it, and what a cut-off download has left. All of it blocks."""

import fcntl
import hashlib
import os
import stat
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Self

__all__ = ["Part", "file_mode", "write_all"]

_UMASK = threading.Lock()


class Part:
    """A part that nobody else fills. It is closed when nobody has it any more, or by `close`.

    Args:
        path: of its file.
        descriptor: of that, locked.
        kept: whether what has come of it stays when it is closed.
    """

    def __init__(self, path: Path, descriptor: int, *, kept: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, _close, descriptor, None if kept else path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The part of this name; another one if a process, or another task, is at it.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = -1
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise PermissionError
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor):
                    return cls(path, descriptor, kept=True)
                os.close(descriptor)  # somebody kept it between the two calls: it is the whole file now
            except (BlockingIOError, PermissionError):  # somebody is at it, or it is another user's
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
                return cls(Path(name), descriptor, kept=False)
            except BaseException:
                if descriptor >= 0:
                    os.close(descriptor)
                raise

    def size(self) -> int:
        """Bytes that are here."""
        return os.lseek(self._descriptor, 0, os.SEEK_END)

    def append(self, data: bytes) -> None:
        """Write what follows.

        Raises:
            OSError: it cannot be written.
        """
        write_all(self._descriptor, data)

    def empty(self) -> None:
        """Begin anew."""
        os.ftruncate(self._descriptor, 0)

    def digest(self) -> str:
        """The SHA-256 of what is here, in hexadecimal digits."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        with open(self._descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def keep(self, place: Path) -> None:
        """Give it its name: it is whole.

        Raises:
            OSError: it cannot be brought to the disk.
        """
        os.fsync(self._descriptor)
        os.fchmod(self._descriptor, file_mode())
        place.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(place)

    def close(self) -> None:
        """Let others have it."""
        self._close()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close(descriptor: int, unwanted: Path | None) -> None:
    os.close(descriptor)
    if unwanted is not None:
        unwanted.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: one call may write fewer than it is given, for example when the disk fills up.

    Raises:
        OSError: they cannot be written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def file_mode() -> int:
    """Who may read a whole file, by the process's umask. There is no way to read that but to set it."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return 0o666 & ~mask
