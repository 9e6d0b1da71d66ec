"""The one thread that owns the queue's file, and how what it wrote is forced to the disk beside it."""

import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bitneck_cloud.answers.sinks.queue_file import QueueFile

__all__ = ["QueueThread", "checkpoint", "log_bytes"]

T = TypeVar("T")


class QueueThread:
    """The one thread that opens, reads and writes a `QueueFile`.

    Args:
        file: not opened yet.
    """

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self._thread = ThreadPoolExecutor(1, "bitneck-sinks-queue")
        self._closed = False

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a call there; or what it raises."""
        return self.post(function, *arguments).result()

    def post(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Begin a call there."""
        return self._thread.submit(function, *arguments)

    def close(self) -> None:
        """Finish the calls that were begun, close the file, and end the thread. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._thread.submit(self.file.close)
        self._thread.shutdown(wait=True)


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
