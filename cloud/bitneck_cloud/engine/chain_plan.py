"""How a batch of frames goes along the chain. Pure: ids and numbers in, a plan out.

Frames of one operating point share its decoder; then each joins the batch at its own split point, so frames of
different bit rates, and even of different split points, share the heavy tail:

    s2-r1: frame 0, 3 --decoder--> [seg 1] --+
    s1-r2: frame 1    --decoder-------------+--> [seg 2] --> outputs of frames 0, 3, 1, 2
    s1-r4: frame 2    --decoder-------------+
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Group", "Step", "plan_batch"]


@dataclass(frozen=True, slots=True)
class Group:
    """Frames of one operating point: their rows in the batch."""

    point: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One segment of the walk, and the groups that join before it."""

    segment: int
    joining: tuple[Group, ...]


def plan_batch(points: Sequence[str], tail_start: Mapping[str, int], segments: int) -> tuple[Step, ...]:
    """Plan a batch.

    Args:
        points: operating point of each row.
        tail_start: first segment of each operating point's tail.
        segments: length of the chain.

    Returns:
        Steps in order, from the earliest tail's first segment to the last segment; each row joins exactly once.
    """
    rows: dict[str, list[int]] = {}
    for row, point in enumerate(points):
        rows.setdefault(point, []).append(row)
    joining: dict[int, list[Group]] = {}
    for point, members in rows.items():
        joining.setdefault(tail_start[point], []).append(Group(point, tuple(members)))
    if not joining:
        return ()
    return tuple(Step(k, tuple(joining.get(k, ()))) for k in range(min(joining), segments))
