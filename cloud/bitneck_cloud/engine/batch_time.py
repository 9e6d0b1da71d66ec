"""How long a batch will take, learned from those before it. Pure: no clock, no I/O."""

from collections.abc import Sequence

__all__ = ["BatchTime"]

_WEIGHT = 0.3
_MOST_CHANGE = 2.0
"""One pass that was held up, or that was lucky, changes little."""


class BatchTime:
    """Seconds that a frame takes, by its operating point: the earlier the cut, the longer the tail.

    How a pass's time is shared between its frames is not measured: each keeps its share of what was expected of them
    all.

    A frame that fails before it is computed, such as one that cannot be decoded, takes another time: often less, and it
    says nothing of the tail. It is a lower bound of what its point takes, and kept apart; frames that are computed let
    it fade, so that one failure that was held up does not count for ever.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._least: dict[str, float] = {}

    def of(self, point: str) -> float:
        """Expected seconds of a frame in a batch. A point that is not known is like the slowest one that is."""
        known = self._seconds.get(point) or max(self._seconds.values(), default=0.0)
        return max(known, self._least.get(point, 0.0))

    def learn_failed(self, point: str, seconds: float) -> None:
        """A frame failed before it was computed.

        Args:
            point: of the frame.
            seconds: what its batch spent on it.
        """
        before = self._least.get(point, seconds)
        self._least[point] = before + (seconds - before) * _WEIGHT

    def learn(self, points: Sequence[str], seconds: float) -> None:
        """Frames of a batch were computed.

        Args:
            points: of these frames, one or more.
            seconds: what they took.
        """
        each = seconds / len(points)
        ratio = seconds / sum(self._seconds.get(point, each) for point in points) if seconds > 0 else 1.0
        change = 1 + (min(max(ratio, 1 / _MOST_CHANGE), _MOST_CHANGE) - 1) * _WEIGHT
        for point in set(points):
            self._least[point] = self._least.get(point, 0.0) * (1 - _WEIGHT)
            self._seconds[point] = self._seconds[point] * change if point in self._seconds else each
