"""Confidence intervals of measured values.

Dimensions: n photographs, B resamples.
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLES", "mean_interval", "percentile_interval", "resamples", "wilson"]

RESAMPLES = 1000
"""Resamples of a bootstrap."""

_Z = 1.959964
"""95 % of a normal distribution lies within this many standard deviations of the mean."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson's score interval).

    Args:
        share: observed, 0 to 1.
        count: number of trials, >= 1.
    """
    z2 = _Z * _Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % confidence interval of a mean, by the normal approximation.

    Args:
        values: (n,).
    """
    mean, error = float(values.mean()), float(values.std() / math.sqrt(len(values)))
    return mean - _Z * error, mean + _Z * error


def resamples(count: int) -> NDArray[np.int64]:
    """Bootstrap resamples of photographs, the same for every network: paired differences stay paired.

    Args:
        count: n.

    Returns:
        (B, n): how often each photograph is in each resample.
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def percentile_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % confidence interval from resampled values.

    Args:
        values: (B,).
    """
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
