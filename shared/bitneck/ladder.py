"""Operating points and the ladder. Pure: no clock, no I/O."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, RateUnreachable, UnknownPoint
from bitneck.ids import check_id
from bitneck.moved import names_of

__all__ = ["Ladder", "OperatingPoint", "most_accurate"]

__getattr__ = names_of(__name__)

_MOST_LISTED, _NEAREST = 8, 3
"""A message lists so many operating points; of more, those with the nearest names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """A bottleneck unit at one step, with measured rate and accuracy.

    Attributes:
        id: such as ``s1-r3``.
        unit: id of its unit.
        split: name of its split point.
        step: quantizer step Q, in the latent's unit.
        stride: S, the unit's spatial reduction.
        latent_shape: (Cr, h, w).
        payload_bytes: mean coded bytes of a photograph, as measured.
        bpp_payload: the same in bits per input pixel.
        accuracy: the task's measure (top-1, a fraction), as measured.
    """

    id: str
    unit: str
    split: str
    step: float
    stride: int
    latent_shape: tuple[int, int, int]
    payload_bytes: float
    bpp_payload: float
    accuracy: float

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_id(self.id, "operating point")
        check_id(self.unit, "unit")
        check_id(self.split, "split point")
        if not 0 < self.step < math.inf or self.stride < 1 or min(self.latent_shape) < 1:
            raise InvalidConfig(f"operating point {self.id}: step, stride and latent shape must be positive")
        if not (0 <= self.payload_bytes < math.inf and 0 <= self.bpp_payload < math.inf and 0 <= self.accuracy <= 1):
            raise InvalidConfig(f"operating point {self.id}: rate must be >= 0 and accuracy within 0 and 1")


def most_accurate(points: Iterable[OperatingPoint]) -> OperatingPoint:
    """The most accurate of some points; the cheapest of equally accurate ones."""
    return max(points, key=lambda p: (p.accuracy, -p.payload_bytes))


class Ladder:
    """The operating points of a bundle, in order of rate, lowest first.

    Args:
        points: at least one; ids are unique.
        retired: ids that earlier bundles had, each with the point that took its place.

    Raises:
        InvalidConfig: no points, or an id that occurs twice.
    """

    def __init__(self, points: Iterable[OperatingPoint], retired: Mapping[str, str] | None = None) -> None:
        self._points = tuple(sorted(points, key=lambda p: (p.payload_bytes, p.id)))
        self._by_id = {p.id: p for p in self._points}
        self._retired = dict(retired or {})
        if not self._points:
            raise InvalidConfig("a ladder needs at least one operating point")
        if len(self._by_id) != len(self._points):
            raise InvalidConfig("two operating points have the same id")

    def __iter__(self) -> Iterator[OperatingPoint]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, point_id: object) -> bool:
        return point_id in self._by_id

    def __getitem__(self, point_id: str) -> OperatingPoint:
        """The operating point of this id.

        Raises:
            UnknownPoint: there is none; the message lists the known ones, of many the three with the nearest names, or
                names the successor of a retired one.
        """
        try:
            return self._by_id[point_id]
        except KeyError:
            if (successor := self._retired.get(point_id)) is not None:
                raise UnknownPoint(
                    f"the operating point {point_id} is retired; this bundle has {successor} in its place"
                ) from None
            has, known = "this bundle has", list(self._by_id)
            if len(known) > _MOST_LISTED:
                known = difflib.get_close_matches(point_id[:80], known, _NEAREST, cutoff=0)
                has = f"this bundle has {len(self)}, and the nearest names are"
            raise UnknownPoint(f"no operating point {point_id[:80]!r}; {has}: {', '.join(known)}") from None

    @property
    def measured(self) -> tuple[OperatingPoint, ...]:
        """The measured points, in order of rate; all points if none was measured.

        A point that was trained but not measured yet has zeros for rate and accuracy. It may be requested by its id,
        but no choice by rate may take it.
        """
        return tuple(p for p in self._points if p.payload_bytes > 0) or self._points

    @property
    def best(self) -> OperatingPoint:
        """The most accurate point; the cheapest of equally accurate ones."""
        return most_accurate(self._points)

    def at_most(self, payload_bytes: float) -> OperatingPoint:
        """The most accurate point whose mean payload is at most this.

        Raises:
            RateUnreachable: every point costs more.
        """
        fitting = [p for p in self.measured if p.payload_bytes <= payload_bytes]
        if not fitting:
            low = self.measured[0]
            raise RateUnreachable(
                f"no operating point fits {payload_bytes:.1f} payload bytes per frame; "
                f"the lowest, {low.id}, takes {low.payload_bytes:.1f}"
            )
        return most_accurate(fitting)

    def at_least(self, accuracy: float) -> OperatingPoint:
        """The cheapest point whose measured accuracy is at least this.

        Raises:
            RateUnreachable: no point reaches it.
        """
        for point in self.measured:
            if point.accuracy >= accuracy:
                return point
        raise RateUnreachable(
            f"no operating point reaches an accuracy of {accuracy:.4f}; "
            f"the best, {self.best.id}, reaches {self.best.accuracy:.4f}"
        )
