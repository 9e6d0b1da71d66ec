"""A lock that keeps other programs out of an SQLite file which this process has open, while it commits and checkpoints.

SQLite's own exclusive mode allows one connection only, and the queue has two: one commits, one checkpoints. A
connection takes a shared lock on some bytes of the file when it first reads, and to get it, another one on the byte
before them for a moment. Whoever holds that byte lets nobody in; connections that are open stay so, and so do further
ones of this process. The lock is one of an open file description (Linux), which POSIX locks of the same process
respect.
"""

import fcntl
import os
import struct
import sys
from pathlib import Path

__all__ = ["SoleOwner"]

_PENDING_BYTE = 0x40000000
"""SQLite's; https://www.sqlite.org/src/file/src/os.h"""
_LOCK_BYTES = 512
"""That byte, the reserved one, and the shared ones."""


class SoleOwner:
    """The lock. Where the system has no such locks it does nothing.

    Args:
        path: of the file, which is there.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def alone(self) -> bool:
        """Whether no other program has the file open. For before this process opens it."""
        if not self._lock(fcntl.F_WRLCK, _LOCK_BYTES):
            return False
        self._lock(fcntl.F_UNLCK, _LOCK_BYTES)
        return True

    def keep_others_out(self) -> None:
        """Let no other program open the file from now on. For after this process has opened it."""
        self._lock(fcntl.F_WRLCK, 1)

    def let_others_in(self) -> None:
        """The end of that. For before this process closes it: SQLite then wants the byte itself."""
        self._lock(fcntl.F_UNLCK, 1)

    def close(self) -> None:
        """Release everything. For after this process has closed the file: it also loses its other locks on it."""
        os.close(self._file)

    def _lock(self, kind: int, length: int) -> bool:
        if sys.platform != "linux":  # others have no such locks, or another struct
            return True
        wanted = struct.pack("hhqqi", kind, os.SEEK_SET, _PENDING_BYTE, length, 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without such locks
        return True
