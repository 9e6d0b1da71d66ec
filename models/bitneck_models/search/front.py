"""The Pareto front of a search, and the rungs of a ladder picked from it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from bitneck.errors import InvalidConfig

__all__ = ["Found", "front", "pick_ladder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A trial on the front.

    Attributes:
        number: number of the trial.
        payload_bytes: ideal code length on the validation photographs, mean.
        bpp: the same in bits per input pixel.
        agreement: agreement with the teacher on the validation photographs.
        folder: folder of the trained unit, on the machine that trained it.
        machine: name of that machine.
        recipe: recipe of the point.
        training: its schedule.
    """

    number: int
    payload_bytes: float
    bpp: float
    agreement: float
    folder: Path
    machine: str
    recipe: dict[str, Any]
    training: dict[str, Any]


def front(study: optuna.Study) -> list[Found]:
    """The trials that no other trial beats in both values, in order of rate."""
    found = [
        Found(
            number=t.number,
            payload_bytes=t.user_attrs["bytes"],
            bpp=t.values[0],
            agreement=t.values[1],
            folder=Path(t.user_attrs["folder"]),
            machine=t.user_attrs["machine"],
            recipe=t.user_attrs["recipe"],
            training=json.loads(study.user_attrs["space"])["training"],
        )
        for t in study.best_trials
    ]
    return sorted(found, key=lambda f: (f.bpp, -f.agreement))


def pick_ladder(points: Sequence[tuple[float, float]], count: int) -> list[int]:
    """Pick rungs from a front: both ends, and between them the points nearest to equal ratios of rate.

    Args:
        points: (rate, accuracy), both rising.
        count: number of rungs, >= 1.

    Returns:
        Indices, rising; fewer than `count` if the front is shorter.

    Raises:
        InvalidConfig: the front is empty, or `count` is below 1.
    """
    if not points:
        raise InvalidConfig("no trial has finished yet, so there is no front to pick from; go on with the search")
    if count < 1:
        raise InvalidConfig(f"{count} points cannot be picked; ask for one at least")
    if count == 1:
        return [len(points) - 1]
    if len(points) <= count:
        return list(range(len(points)))
    low, high = (math.log(points[i][0]) for i in (0, -1))
    picked = [0]
    for k in range(1, count - 1):
        target = low + (high - low) * k / (count - 1)
        first, last = picked[-1] + 1, len(points) - (count - k)  # leave enough for the others
        picked.append(min(range(first, last + 1), key=lambda i: abs(math.log(points[i][0]) - target)))
    return [*picked, len(points) - 1]
