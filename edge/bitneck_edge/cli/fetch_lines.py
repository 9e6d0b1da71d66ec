"""How far a download is, as lines: for logs, where no bar can be drawn."""

import time
from collections.abc import Callable

__all__ = ["FetchLines"]

_FIRST_S, _EVERY_S = 1.0, 10.0


class FetchLines:
    """Writes a line when a download takes longer than a second, and every ten seconds then.

    Args:
        write: takes a line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._begin_s = 0.0
        self._begin_bytes: int | None = None
        self._next_s = 0.0

    def __call__(self, done: int, size: int) -> None:
        """So many bytes of so many are there. When all are, or fewer than at the beginning, another download begins."""
        now = self._clock()
        if self._begin_bytes is None or done < self._begin_bytes:
            self._begin_s, self._begin_bytes, self._next_s = now, done, now + _FIRST_S
        if done >= size:
            self._begin_bytes = None
        elif now >= self._next_s:
            self._next_s = now + _EVERY_S
            came = done - self._begin_bytes
            left = f", {(size - done) * (now - self._begin_s) / came:.0f} s left" if came else ""
            self._write(f"fetching the bundle: {done / 1e6:.2f} of {size / 1e6:.2f} MB{left}")
