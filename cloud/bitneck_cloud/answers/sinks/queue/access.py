"""How several threads use the queue's file, one at a time, and how what they wrote is forced to the disk beside it."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bitneck_cloud.answers.sinks.queue.file import QueueFile

__all__ = ["QueueAccess", "checkpoint", "log_bytes"]

T = TypeVar("T")


class QueueAccess:
    """Lets one thread at a time open, read and write a `QueueFile`.

    Whoever commits does it in its own thread: each step from thread to thread would wait for the interpreter's lock,
    and a frame with it.

    Args:
        file: not opened yet.
    """

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "bitneck-sinks-queue")
        self._closed = False

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a call while no other thread has the file; or what it raises.

        Raises:
            RuntimeError: the file is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the queue is closed")
            return function(*arguments)

    def post(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Begin a call in another thread; for those that may not wait."""
        return self._thread.submit(self.call, function, *arguments)

    def close(self) -> None:
        """Finish the calls that were begun, and close the file. A second call does nothing."""
        self._thread.shutdown(wait=True)
        with self._lock:
            if not self._closed:
                self._closed = True
                self.file.close()


def checkpoint(path: Path) -> None:
    """Force to the disk what was committed, and copy it from the log into the file, while commits go on beside it.

    It has a connection of its own, so that no commit waits for the disk.

    Args:
        path: of the queue's file.

    Raises:
        sqlite3.Error: the disk fails.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def log_bytes(path: Path) -> int:
    """Size of the log of a queue's file."""
    try:
        return os.stat(f"{path}-wal").st_size  # noqa: PTH116  the name is SQLite's
    except FileNotFoundError:
        return 0
