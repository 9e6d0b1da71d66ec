"""Batches of cached features for a unit's training: drawn, mirrored and mixed by the number of the step.

Dimensions: M cached features, N batch, C x Hf x Wf feature, H x W class map.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import VOID
from bitneck_models.losses.task_terms import NO_LABEL, Labels
from bitneck_models.zoo.recipe import TrainingRecipe

__all__ = ["Batches", "labelled"]


def labelled(labels: NDArray[np.integer] | None, count: int, name: str, *, mirror: bool) -> NDArray[np.bool_]:
    """Which features have a label.

    Args:
        labels: classes (M,) or class maps (M, H, W); None if there are none.
        count: M.
        name: name of the operating point, for the message.
        mirror: whether features are mirrored.

    Returns:
        (M,) bool.

    Raises:
        InvalidConfig: no feature has a label, or class maps would have to be mirrored.
    """
    known = np.zeros(count, np.bool_)
    if labels is not None:
        known = labels != NO_LABEL if labels.ndim == 1 else np.ones(count, np.bool_)
    if labels is not None and labels.ndim > 1 and mirror:
        raise InvalidConfig(f"{name}: class maps are not mirrored; set `mirror = false` in [training]")
    if not np.any(known):
        raise InvalidConfig(f"{name} has a task term `ce`, and no feature has a label")
    return known


class Batches:
    """Draws the batches.

    Args:
        features: (M, C, Hf, Wf) float16.
        training: batch, mix, mirror and seed.
        weights: probability of each feature to be drawn, (M,), summing to 1; None for equal ones.
        labels: classes (M,), `NO_LABEL` where unknown, or class maps (M, H, W) uint8, `VOID` where unknown; None if no
            task term needs them.
        device: where the batches go.
    """

    def __init__(
        self,
        features: NDArray[np.float16],
        training: TrainingRecipe,
        weights: NDArray[np.float64] | None,
        labels: NDArray[np.integer] | None,
        device: torch.device,
    ) -> None:
        self.features, self.training, self.weights, self.labels = features, training, weights, labels
        self.device = device

    def draw(self, step: int) -> tuple[Tensor, Labels | None]:
        """The features of a step, (N, C, Hf, Wf) float32, and what is known of their classes."""
        rng = np.random.default_rng([self.training.seed, step])
        rows = np.sort(rng.choice(len(self.features), self.training.batch, replace=False, p=self.weights))
        order = rng.permutation(len(rows))
        f = torch.from_numpy(self.features[rows].astype(np.float32)[order]).to(self.device)
        if rng.random() < 0.5 and self.training.mirror:
            f = f.flip(3)
        share = np.ones(len(f), np.float32)
        mixed = int(len(f) * self.training.mix) // 2 * 2
        if mixed:
            share[:mixed] = rng.uniform(0.2, 0.8, mixed)
            part = torch.from_numpy(share[:mixed, None, None, None]).to(self.device)
            f[:mixed] = part * f[:mixed] + (1 - part) * f[:mixed].flip(0)
        if self.labels is None:
            return f, None
        first = self.labels[rows][order].astype(np.int64)
        if first.ndim > 1:
            first[first == VOID] = NO_LABEL
        second = first.copy()
        second[:mixed] = first[:mixed][::-1]
        return f, Labels(*(torch.from_numpy(a).to(self.device) for a in (first, second, share)))
