"""Confidence intervals of measured values.

Dimensions: n photographs, B resamples.
"""

import math

import numpy as np
from numpy.typing import NDArray

from bitneck.intervals import Z_95

__all__ = ["RESAMPLES", "mean_interval", "percentile_interval", "resamples"]

RESAMPLES = 1000
"""Resamples of a bootstrap."""


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % confidence interval of a mean, by the normal approximation.

    Args:
        values: (n,).
    """
    mean, error = float(values.mean()), float(values.std() / math.sqrt(len(values)))
    return mean - Z_95 * error, mean + Z_95 * error


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
