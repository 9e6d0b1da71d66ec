"""What the threads of a process share while they decode: the memory that it may take, and Python's warnings."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

__all__ = ["MAX_DECODED_BYTES", "MEMORY", "QUIET"]

MAX_DECODED_BYTES = 512 << 20
"""Memory that decoding may take, for all threads of the process together. A photograph of 100 megapixels takes 400 MB
as RGB; 16-bit, progressive and rotated ones take more for each pixel."""


class _Memory:
    """Bytes that threads share. One that asks for more than are left waits; the first one always gets its share."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Take bytes until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._total)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


MEMORY = _Memory(MAX_DECODED_BYTES)


class _Quiet:
    """`warnings.catch_warnings` for threads: the first one in silences them, the last one out restores the filters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._caught.__exit__(None, None, None)


QUIET = _Quiet()
