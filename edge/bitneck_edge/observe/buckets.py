"""How times are spread, in a fixed number of buckets, so that a run may be endless. Pure."""

import bisect
import itertools
import math
from collections.abc import Sequence

__all__ = ["FINE_S", "SCRAPED_S", "Buckets"]

SCRAPED_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Bounds of the histograms that Prometheus reads, seconds."""

_STEP = 1.02
FINE_S = tuple(1e-4 * _STEP**k for k in range(math.ceil(math.log(3600 / 1e-4, _STEP)) + 1))
"""Bounds for quantiles within 1 %: from 0.1 ms to an hour."""


class Buckets:
    """Counts of values, by the bucket that they are in.

    Attributes:
        count: of all values.
        sum: of all values.

    Args:
        bounds: upper ends of the buckets, ascending. One more bucket has what is above the last.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.count = 0
        self.sum = 0.0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.sum += value

    def cumulative(self) -> list[tuple[float, int]]:
        """Each bound with the number of values up to it; the last bound is infinite."""
        return list(zip((*self._bounds, math.inf), itertools.accumulate(self._counts), strict=True))

    def quantile(self, q: float) -> float:
        """The value below which a share `q` of the values is: the middle of its bucket, on a logarithmic scale.

        Args:
            q: 0 to 1.

        Returns:
            The value; 0 if there are none; the last bound for what is above it.
        """
        if not self.count:
            return 0.0
        wanted = max(1, math.ceil(q * self.count))
        place = next(k for k, (_, below) in enumerate(self.cumulative()) if below >= wanted)
        if place >= len(self._bounds):
            return self._bounds[-1]
        upper = self._bounds[place]
        return math.sqrt(upper * self._bounds[place - 1]) if place else upper
