"""Differences between two curves over the same photographs, with paired bootstrap intervals.

    photographs, drawn again B times --> both curves from the same draw --> difference --> its 95 % interval

What both curves find hard counts for both, so it does not widen the interval of their difference. The interval says how
sure the difference is for other photographs of the kind. It does not say what another training would have given.

Dimensions: n photographs, B resamples, k points of a curve.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitneck.errors import InvalidConfig
from bitneck_models.measure.intervals import percentile_interval, resamples
from bitneck_models.report.curves import Curve, Sample, rate_saving

__all__ = ["Difference", "Differences", "compared", "mean_difference", "resampled_curves"]

_GRID = 100
_MOST_WITHOUT = 0.05
"""Share of the resamples that may have no difference: curves that barely overlap give no interval."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference and its 95 % interval.

    Attributes:
        value: on all photographs.
        interval: from the resamples.
    """

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """A curve against another one; None where they have no range in common.

    Attributes:
        accuracy: accuracy of the first less that of the second, mean over their common range of log(bytes).
        agreement: the same of the agreement.
        bytes_share: bytes of the first at equal agreement, as a share of the second's, less 1: -0.1 for a tenth fewer.
    """

    accuracy: Difference | None
    agreement: Difference | None
    bytes_share: Difference | None


def mean_difference(curve: Curve, reference: Curve, value: Callable[[Sample], float]) -> float | None:
    """Mean difference of a value over the range of log(bytes) that both curves cover, by linear interpolation.

    Returns:
        None if they have no bytes in common.
    """
    (a_x, a_y), (b_x, b_y) = (_by_bytes(c, value) for c in (curve, reference))
    low, high = max(a_x[0], b_x[0]), min(a_x[-1], b_x[-1])
    if not low < high:
        return None
    grid = np.linspace(low, high, _GRID)
    return float((np.interp(grid, a_x, a_y) - np.interp(grid, b_x, b_y)).mean())


def _by_bytes(curve: Curve, value: Callable[[Sample], float]) -> tuple[list[float], list[float]]:
    ordered = sorted(curve, key=lambda s: s.payload_bytes)
    return [math.log(s.payload_bytes) for s in ordered], [value(s) for s in ordered]


def compared(curve: Curve, reference: Curve) -> Differences:
    """Compare two curves that were measured on the same photographs.

    Raises:
        InvalidConfig: a point has no results of each photograph, or they are of other photographs.
    """
    draws = list(zip(resampled_curves(curve), resampled_curves(reference), strict=True))
    if len({s.photos_crc32c for s in (*curve, *reference)}) > 1:
        raise InvalidConfig(
            f"{curve[0].name} and {reference[0].name} were measured on other photographs, or in another order: run "
            "`evaluate --each` on the same folders again"
        )

    def difference(of: Callable[[Curve, Curve], float | None]) -> Difference | None:
        value = of(curve, reference)
        found = [each for a, b in draws if (each := of(a, b)) is not None]
        if value is None or len(found) < (1 - _MOST_WITHOUT) * len(draws):
            return None
        return Difference(value, percentile_interval(np.array(found)))

    return Differences(
        accuracy=difference(lambda a, b: mean_difference(a, b, lambda s: s.accuracy)),
        agreement=difference(lambda a, b: mean_difference(a, b, lambda s: s.agreement)),
        bytes_share=difference(_bytes_share),
    )


def _bytes_share(curve: Curve, reference: Curve) -> float | None:
    saving = rate_saving(curve, reference)
    return None if saving is None else -saving


def resampled_curves(curve: Curve) -> list[Curve]:
    """The curve on each bootstrap resample of its photographs; all curves of n photographs have the same resamples.

    Returns:
        B curves, in order of rate each.

    Raises:
        InvalidConfig: a point has no results of each photograph.
    """
    each = {s.name: s.each for s in curve if s.each is not None}
    if missing := [s.name for s in curve if s.name not in each]:
        raise InvalidConfig(f"{', '.join(missing)}: no results of each photograph; run `evaluate --each` again")
    n = len(each[curve[0].name].right)
    shares = resamples(n) / n  # (B, n)
    means = np.stack(
        [shares @ np.stack([e.payload_bytes, e.right, e.agrees], axis=1) for e in each.values()], axis=1
    )  # (B, k, 3)
    return [_resampled(curve, row) for row in means.tolist()]


def _resampled(curve: Curve, means: Sequence[Sequence[float]]) -> Curve:
    """The curve with other bytes, accuracy and agreement, (k, 3)."""
    samples = (
        Sample(name=s.name, payload_bytes=size, bpp=s.bpp * size / s.payload_bytes, accuracy=right, agreement=same)
        for s, (size, right, same) in zip(curve, means, strict=True)
    )
    return tuple(sorted(samples, key=lambda s: s.payload_bytes))
