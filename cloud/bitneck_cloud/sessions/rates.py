"""What users ask for over the control API, and the operating point that serves it. Pure: no clock, no I/O."""

from dataclasses import dataclass

from bitneck.errors import InvalidConfig
from bitneck.ladder import Ladder, OperatingPoint

__all__ = [
    "ClientChooses",
    "FixedPoint",
    "MaxBytesPerFrame",
    "MaxKbps",
    "MinAccuracy",
    "RatePolicy",
    "choose",
]


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
    """The operating point for a policy; None if the client chooses.

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
