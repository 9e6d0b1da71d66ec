"""How fast files come in the background: within a rate, in small pieces, and not while frames wait."""

import asyncio
import time
from collections.abc import Callable

__all__ = ["Pacer"]

_PIECE_S = 0.1
"""How long a piece takes on the link, about. A frame waits for no more than one."""
_LEAST_BYTES, _MOST_BYTES = 2 << 10, 1 << 20
_WEIGHT = 0.3
_YIELD_S = 0.3
"""A piece waits for the frames under way, but no longer than this: a camera's link is never without one."""
_POLL_S = 0.01


class Pacer:
    """Decides how large the next piece is and when it comes.

    Args:
        kbps: kilobits a second, at most; 0 for no limit.
        busy: whether frames wait for their answers.
    """

    def __init__(self, kbps: float = 0.0, busy: Callable[[], bool] = lambda: False) -> None:
        self._bytes_per_s = kbps * 125
        self._busy = busy
        self._seen_bytes_per_s = 0.0
        self._due = 0.0

    async def next_piece(self, left: int) -> int:
        """Wait until the next piece may come, and say how many bytes it has.

        Args:
            left: bytes of the file that are missing.
        """
        await asyncio.sleep(self._due - time.perf_counter())
        until = time.perf_counter() + _YIELD_S
        while self._busy() and time.perf_counter() < until:  # noqa: ASYNC110  frames come and go too often for events
            await asyncio.sleep(_POLL_S)
        rate = self._seen_bytes_per_s
        if self._bytes_per_s:
            rate = min(rate, self._bytes_per_s) if rate else self._bytes_per_s
        return min(left, max(_LEAST_BYTES, min(_MOST_BYTES, int(rate * _PIECE_S))))

    def took(self, size: int, seconds: float) -> None:
        """A piece has come."""
        rate = size / max(seconds, 1e-3)
        self._seen_bytes_per_s += (rate - self._seen_bytes_per_s) * (_WEIGHT if self._seen_bytes_per_s else 1.0)
        if self._bytes_per_s:
            self._due = max(time.perf_counter() - seconds, self._due) + size / self._bytes_per_s
