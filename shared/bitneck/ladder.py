"""Operating points, the ladder, and the choice of a point for a requested rate. Pure: no clock, no I/O."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, RateUnreachable, UnknownPoint
from bitneck.ids import check_id

__all__ = [
    "ClientChooses",
    "FixedPoint",
    "Ladder",
    "MaxBytesPerFrame",
    "MaxKbps",
    "MinAccuracy",
    "OperatingPoint",
    "RatePolicy",
    "choose",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One trained bottleneck unit with its step, tables, and measured rate and accuracy.

    Attributes:
        id: such as ``s1-r3``.
        split: name of its split point.
        step: quantizer step Q, in the latent's unit.
        stride: S, the unit's spatial reduction.
        latent_shape: (Cr, h, w).
        payload_bytes: mean coded bytes of a photograph, as measured.
        bpp_payload: the same in bits per input pixel.
        accuracy: the task's measure (top-1, a fraction), as measured.
    """

    id: str
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
        check_id(self.split, "split point")
        if not 0 < self.step < math.inf or self.stride < 1 or min(self.latent_shape) < 1:
            raise InvalidConfig(f"operating point {self.id}: step, stride and latent shape must be positive")
        if not (0 <= self.payload_bytes < math.inf and 0 <= self.bpp_payload < math.inf and 0 <= self.accuracy <= 1):
            raise InvalidConfig(f"operating point {self.id}: rate must be >= 0 and accuracy within 0 and 1")


class Ladder:
    """The operating points of a bundle, in order of rate, lowest first.

    Args:
        points: at least one; ids are unique.

    Raises:
        InvalidConfig: no points, or an id that stands twice.
    """

    def __init__(self, points: Iterable[OperatingPoint]) -> None:
        self._points = tuple(sorted(points, key=lambda p: (p.payload_bytes, p.id)))
        self._by_id = {p.id: p for p in self._points}
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
            UnknownPoint: there is none; the message lists the known ones.
        """
        try:
            return self._by_id[point_id]
        except KeyError:
            known = ", ".join(self._by_id)
            raise UnknownPoint(f"no operating point {point_id[:80]!r}; this bundle has: {known}") from None

    @property
    def measured(self) -> tuple[OperatingPoint, ...]:
        """The points that were measured, in order of rate; every point where none was.

        A point that was trained and not measured yet has zeros for rate and accuracy: it may be asked for by its id,
        but nothing that weighs rates may choose it.
        """
        return tuple(p for p in self._points if p.payload_bytes > 0) or self._points

    @property
    def best(self) -> OperatingPoint:
        """The most accurate point; of equals the cheapest."""
        return max(self._points, key=lambda p: (p.accuracy, -p.payload_bytes))

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
        return max(fitting, key=lambda p: (p.accuracy, -p.payload_bytes))

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


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Use this operating point."""

    point: str


@dataclass(frozen=True, slots=True)
class MaxBytesPerFrame:
    """The most accurate point whose mean payload is at most this many bytes."""

    payload_bytes: float


@dataclass(frozen=True, slots=True)
class MaxKbps:
    """The most accurate point whose mean payload stays within this rate, in 1000 bits per second."""

    kbps: float


@dataclass(frozen=True, slots=True)
class MinAccuracy:
    """The cheapest point of at least this measured accuracy, a fraction."""

    accuracy: float


@dataclass(frozen=True, slots=True)
class ClientChooses:
    """The client decides; the cloud asks for nothing."""


RatePolicy = FixedPoint | MaxBytesPerFrame | MaxKbps | MinAccuracy | ClientChooses
"""What a user asks for over the control API."""


def choose(ladder: Ladder, policy: RatePolicy, *, frames_per_s: float = 1.0) -> OperatingPoint | None:
    """The operating point that serves a policy; None where the client chooses.

    Rates are means over photographs: a single frame may be larger or smaller.

    Args:
        ladder: the bundle's points.
        policy: what was asked for.
        frames_per_s: the session's frame rate, for `MaxKbps` only.

    Raises:
        UnknownPoint: a `FixedPoint` that the ladder does not have.
        RateUnreachable: no point fits.
        InvalidConfig: a limit that is not a positive number.
    """
    match policy:
        case FixedPoint(point):
            return ladder[point]
        case MaxBytesPerFrame(payload_bytes):
            return ladder.at_most(_positive(payload_bytes, "max_bytes_per_frame"))
        case MaxKbps(kbps):
            limit = _positive(kbps, "max_kbps") * 1000 / 8 / _positive(frames_per_s, "the frame rate")
            return ladder.at_most(limit)
        case MinAccuracy(accuracy):
            if not 0 <= accuracy <= 1:
                raise InvalidConfig(f"min_accuracy is a fraction within 0 and 1, got {accuracy}")
            return ladder.at_least(accuracy)
        case ClientChooses():
            return None


def _positive(value: float, what: str) -> float:
    if not 0 < value < float("inf"):
        raise InvalidConfig(f"{what} must be a positive number, got {value}")
    return value
