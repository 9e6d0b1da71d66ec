"""Settings of the baselines, a `BaselineSweep` for each kind of task."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CODECS", "MAP_CODECS", "MAP_SWEEP", "SWEEP", "BaselineSweep"]

CODECS: Mapping[str, tuple[int, ...]] = {
    "jpeg": (5, 10, 15, 25, 40, 60, 80, 95),
    "webp": (5, 15, 30, 50, 75, 90),
    "avif": (15, 25, 35, 50, 65, 80),
    "heic": (10, 20, 30, 40, 50, 65, 80),
}
"""Every image codec that can be measured, with its qualities."""

SWEEP: tuple[tuple[float, float], ...] = tuple(
    (share, step) for share in (1.0, 0.6, 0.3) for step in (2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
)
"""Settings of the training-free baseline: k as a share of the feature's size, and the step."""

MAP_CODECS: Mapping[str, tuple[int, ...]] = {
    "jpeg": (5, 10, 20, 40, 80),
    "webp": (1, 10, 30, 70),
    "avif": (10, 20, 35, 60),
}
"""Codecs and qualities for segmentation: fewer, because the network answers for each pixel and takes longer."""

MAP_SWEEP: tuple[tuple[float, float], ...] = tuple((share, step) for share in (1.0, 0.5, 0.25) for step in (4.0, 16.0))
"""Settings of the training-free baseline for segmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineSweep:
    """Settings to measure the baselines of one task with.

    Attributes:
        codecs: image codecs and their qualities.
        training_free: settings of the training-free baseline: k as a share of the feature's size, and the step.
        batch: number of photographs in one run of the network.
    """

    codecs: Mapping[str, tuple[int, ...]]
    training_free: tuple[tuple[float, float], ...]
    batch: int
