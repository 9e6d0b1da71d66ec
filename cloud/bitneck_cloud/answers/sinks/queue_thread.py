"""The one thread that owns the queue's file, and how what it wrote is forced to the disk beside it."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bitneck_cloud.answers.sinks.queue_file import QueueFile

__all__ = ["QueueThread", "force_to_disk"]

T = TypeVar("T")


class QueueThread:
    """The one thread that opens, reads and writes a `QueueFile`.

    Args:
        file: not opened yet.
    """

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self._thread = ThreadPoolExecutor(1, "bitneck-sinks-queue")

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a call there; or what it raises."""
        return self.post(function, *arguments).result()

    def post(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Begin a call there."""
        return self._thread.submit(function, *arguments)

    def close(self) -> None:
        """Finish the calls that were begun, close the file, and end the thread."""
        self._thread.submit(self.file.close)
        self._thread.shutdown(wait=True)


def force_to_disk(path: Path) -> None:
    """Force to the disk what was committed to a queue, from any thread, while its own thread goes on.

    It is the log beside the file that has to be forced: SQLite forces it itself before it copies it into the file.
    SQLite has no lock on the log, so a second descriptor of it is harmless.

    Args:
        path: of the queue's file.

    Raises:
        OSError: the disk fails.
    """
    with contextlib.suppress(FileNotFoundError):
        log = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(log)
        finally:
            os.close(log)
