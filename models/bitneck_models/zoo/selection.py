"""Which operating points a ladder keeps: those that no other one of their split point beats. Pure."""

from collections.abc import Mapping
from typing import Protocol

__all__ = ["Measured", "successors"]


class Measured(Protocol):
    """An operating point's metrics on the photographs that the recipe puts aside."""

    @property
    def split(self) -> str:
        """Its split point."""

    @property
    def validation_bytes(self) -> float:
        """Mean code length, bytes."""

    @property
    def validation_agreement(self) -> float:
        """Agreement with the network without a unit."""


def successors(
    points: Mapping[str, Measured], candidates: Mapping[str, Measured], *, compete: bool = True
) -> dict[str, str]:
    """The operating points that are left out of a ladder, each with the one that takes its place.

    Left out is what is no candidate, and a candidate that another one of its split point beats: that has no more bytes
    and no less agreement. Points of different split points do not compete, because they cost the device differently.
    In the place of a point comes the cheapest kept one that agrees as often, or, if none does, the one that agrees
    most often.

    Args:
        points: all operating points that ever were, by id.
        candidates: those of them that may be kept.
        compete: false keeps every candidate.
    """
    kept = {name: point for name, point in candidates.items() if not (compete and _beaten(name, point, candidates))}
    found = {}
    for name, point in points.items():
        rivals = {other: p for other, p in kept.items() if p.split == point.split} or kept
        if name in kept or not rivals:
            continue
        as_good = [other for other, p in rivals.items() if p.validation_agreement >= point.validation_agreement]
        if as_good:
            found[name] = min(as_good, key=lambda other: (rivals[other].validation_bytes, other))
        else:
            found[name] = max(rivals, key=lambda other: (rivals[other].validation_agreement, other))
    return found


def _beaten(name: str, point: Measured, candidates: Mapping[str, Measured]) -> bool:
    """Whether another candidate of the same split point is as good in both, and better in one or first by id."""
    return any(
        other != name
        and rival.split == point.split
        and rival.validation_bytes <= point.validation_bytes
        and rival.validation_agreement >= point.validation_agreement
        and (
            (rival.validation_bytes, rival.validation_agreement) != (point.validation_bytes, point.validation_agreement)
            or other < name
        )
        for other, rival in candidates.items()
    )
