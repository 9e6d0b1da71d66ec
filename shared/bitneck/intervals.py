"""How sure a share is. Pure."""

import math

__all__ = ["Z_95", "wilson"]

Z_95 = 1.959964
"""95 % of a normal distribution lies within this many standard deviations of the mean."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval, 1927).

    Args:
        share: observed, 0 to 1.
        count: number of trials, >= 1.
    """
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
