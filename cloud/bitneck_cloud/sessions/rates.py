"""What users ask for over the control API, and the operating point that serves it. Pure: no clock, no I/O."""

from collections.abc import Callable
from dataclasses import dataclass

from bitneck.errors import InvalidConfig, RateUnreachable, UnknownPoint
from bitneck.ladder import Ladder, OperatingPoint, most_accurate
from bitneck.wire.link_bytes import LinkBytes, LinkMeter

__all__ = [
    "ClientChooses",
    "FixedPoint",
    "MaxBytesPerFrame",
    "MaxKbps",
    "MinAccuracy",
    "RatePolicy",
    "choose",
    "fits",
    "link_limit_kbps",
    "usual_link",
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
    """The most accurate point whose frames and answers stay within this rate, in 1000 bits per second.

    Link bytes of the busier direction count; see `bitneck.wire.link_bytes`.
    """

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


def link_limit_kbps(policy: RatePolicy | None) -> float:
    """What a client's link may carry, as its policy says; 0 for no limit."""
    return policy.kbps if isinstance(policy, MaxKbps) else 0.0


def usual_link(payload_bytes: float, interval_s: float) -> LinkBytes:
    """What a frame costs on a link of which nothing is known yet; see `choose`."""
    return LinkMeter().expected(payload_bytes, interval_s)


def choose(
    ladder: Ladder,
    policy: RatePolicy,
    *,
    frames_per_s: float = 1.0,
    link: Callable[[float, float], LinkBytes] = usual_link,
    remedy: str = "",
) -> OperatingPoint | None:
    """The operating point for a policy; None if the client chooses.

    Rates are means over photographs: a single frame may be larger or smaller.

    Args:
        ladder: the bundle's points.
        policy: what was asked for.
        frames_per_s: the session's frame rate, for `MaxKbps` only.
        link: what a frame of so many payload bytes, so many seconds after the one before, costs on the session's link;
            for `MaxKbps` only.
        remedy: what to do if no point stays within a `MaxKbps`.

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
            return _within(ladder, limit, lambda payload_bytes: link(payload_bytes, 1.0 / frames_per_s), remedy)
        case MinAccuracy(accuracy):
            if not 0 <= accuracy <= 1:
                raise InvalidConfig(f"min_accuracy is a fraction within 0 and 1, got {accuracy}")
            return ladder.at_least(accuracy)
        case ClientChooses():
            return None


def fits(ladder: Ladder, policy: RatePolicy, *, frames_per_s: float, link: Callable[[float, float], LinkBytes]) -> bool:
    """Whether `choose` would find a point, or leave it to the client."""
    try:
        choose(ladder, policy, frames_per_s=frames_per_s, link=link)
    except (RateUnreachable, UnknownPoint):
        return False
    return True


def _within(ladder: Ladder, limit: float, link: Callable[[float], LinkBytes], remedy: str) -> OperatingPoint:
    """The most accurate point whose frames take no more than `limit` link bytes in either direction."""
    fitting = [point for point in ladder.measured if link(point.payload_bytes).busier <= limit]
    if fitting:
        return most_accurate(fitting)
    low = ladder.measured[0]
    cost = link(low.payload_bytes)
    raise RateUnreachable(
        f"no operating point fits {limit:.0f} bytes of the link for each frame; the lowest, {low.id}, takes "
        f"{cost.up:.0f} up, of which {low.payload_bytes:.0f} are its payload, and {cost.down:.0f} down. "
        + (remedy or "Send fewer frames, put several into one message (--pack), or ask for less back (--answers)")
    )


def _positive(value: float, what: str) -> float:
    if not 0 < value < float("inf"):
        raise InvalidConfig(f"{what} must be a positive number, got {value}")
    return value
