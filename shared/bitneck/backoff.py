"""Pauses between attempts: each twice as long as the one before, up to a limit, and varied at random. Pure."""

from bitneck.errors import InvalidConfig

__all__ = ["Backoff"]

_GROWTH = 2.0
_LEAST, _SPREAD = 0.5, 1.0
"""A pause is multiplied by 0.5 to 1.5, so that clients of one server do not come back at the same moment."""


class Backoff:
    """Counts failures in a row and says how long to wait after each one.

    Args:
        first_s: pause after the first failure, before it is varied.
        most_s: longest pause, before it is varied.
        retries: attempts after the first one; -1 for no limit.

    Raises:
        InvalidConfig: a pause that is not positive, or a first one that is longer than the longest.
    """

    def __init__(self, *, first_s: float, most_s: float, retries: int = -1) -> None:
        if not 0 < first_s <= most_s:
            raise InvalidConfig(f"pauses from {first_s} s to {most_s} s; expected 0 < first <= longest")
        self._first_s, self._most_s, self._retries = first_s, most_s, retries
        self._pause_s = first_s
        self.failures = 0

    def failed(self, chance: float) -> float | None:
        """An attempt failed.

        Args:
            chance: a random number, 0 <= chance < 1.

        Returns:
            Seconds to wait before the next attempt; None if no retry is left.
        """
        self.failures += 1
        if 0 <= self._retries < self.failures:
            return None
        pause_s, self._pause_s = self._pause_s, min(self._most_s, self._pause_s * _GROWTH)
        return pause_s * (_LEAST + _SPREAD * chance)

    def succeeded(self) -> None:
        """An attempt was useful: count from zero again."""
        self.failures, self._pause_s = 0, self._first_s
