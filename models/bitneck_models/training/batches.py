"""Batches of features for a unit's training: drawn, mirrored and mixed by the number of the step.

Dimensions: M features, N batch, C x Hf x Wf feature, H x W class map.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import VOID
from bitneck_models.losses.task_terms import NO_LABEL, Labels
from bitneck_models.training.parallel import ALONE, World
from bitneck_models.training.stream import ViewStream
from bitneck_models.zoo.recipe import TrainingRecipe

__all__ = ["Batch", "Batches", "check_mirror", "labelled"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a process gets of a batch.

    Attributes:
        features: (n, C, Hf, Wf) float32.
        labels: what is known of their classes; None if no task term needs labels.
        seeds: of each sample's noise, (n,).
        fraction: n, as a fraction of the whole batch.
    """

    features: Tensor
    labels: Labels | None
    seeds: list[int]
    fraction: float


def check_mirror(name: str, *, mirror: bool) -> None:
    """Refuse to mirror features whose labels are class maps.

    Args:
        name: name of the operating point, for the message.
        mirror: whether features are mirrored.

    Raises:
        InvalidConfig: they are.
    """
    if mirror:
        raise InvalidConfig(f"{name}: class maps are not mirrored; set `mirror = false` in [training]")


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
    if labels is not None and labels.ndim > 1:
        check_mirror(name, mirror=mirror)
    if not np.any(known):
        raise InvalidConfig(f"{name} has a task term `ce`, and no feature has a label")
    return known


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch is made of: rows, whether it is mirrored, how many samples are mixtures, and their shares."""

    rows: NDArray[np.intp]
    mirrored: bool
    mixed: int
    share: NDArray[np.float32]


class Batches:
    """Draws the batches.

    Args:
        features: cached ones, (M, C, Hf, Wf) float16, or a stream of fresh ones of M photographs.
        training: batch, mix, mirror and seed.
        weights: probability of each feature to be drawn, (M,), summing to 1; None for equal ones.
        labels: classes (M,), `NO_LABEL` where unknown, or class maps (M, H, W) uint8, `VOID` where unknown; None if no
            task term needs them, or the stream has them.
        device: where the batches go.
        world: the processes that share each batch.

    Raises:
        InvalidConfig: a batch is too small for so many processes.
    """

    def __init__(
        self,
        features: NDArray[np.float16] | ViewStream,
        training: TrainingRecipe,
        weights: NDArray[np.float64] | None,
        labels: NDArray[np.integer] | None,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.features: NDArray[np.float16] | ViewStream
        self.features, self.training, self.weights, self.labels = features, training, weights, labels
        self.device, self.world = device, world
        if min(len(World(rank, world.size).positions(training.batch, 0)) for rank in range(world.size)) < 2:
            raise InvalidConfig(f"a batch of {training.batch} is too small for {world.size} processes: take fewer")

    def draw(self, step: int, *, whole: bool = False) -> Batch:
        """This process's share of the batch of a step, or the whole batch."""
        plan = self._plan(step)
        own = self._own(plan, ALONE if whole else self.world)
        rows, share, mixed = plan.rows[own], plan.share[own], int((own < plan.mixed).sum())
        maps = None
        if not isinstance(self.features, ViewStream):
            f = torch.from_numpy(self._read(self.features, rows)).to(self.device)
        elif whole:
            f, maps = self.features.read_once(step, rows)
        else:
            f, maps = self.features.read(step, self._own_rows)
        if plan.mirrored:
            f = f.flip(3)
        if mixed:
            part = torch.from_numpy(share[:mixed, None, None, None]).to(self.device)
            f[:mixed] = part * f[:mixed] + (1 - part) * f[:mixed].flip(0)
        known = maps if maps is not None else None if self.labels is None else self.labels[rows]
        labels = self._labels_of(known, mixed, share) if known is not None else None
        seeds = [hash_of(self.training.seed, step, int(position)) for position in own]
        return Batch(f, labels, seeds, len(own) / len(plan.rows))

    def _plan(self, step: int) -> _Plan:
        rng = np.random.default_rng([self.training.seed, step])
        count = self.training.batch
        rows = np.sort(rng.choice(len(self.features), count, replace=False, p=self.weights))
        rows = rows[rng.permutation(count)]
        mirrored = rng.random() < 0.5 and self.training.mirror
        mixed = int(count * self.training.mix) // 2 * 2
        share = np.ones(count, np.float32)
        share[:mixed] = rng.uniform(0.2, 0.8, mixed)
        return _Plan(rows, mirrored, mixed, share)

    def _own(self, plan: _Plan, world: World) -> NDArray[np.intp]:
        return world.positions(len(plan.rows), plan.mixed)

    def _own_rows(self, step: int) -> NDArray[np.intp]:
        """The features that this process takes at a step, in order."""
        plan = self._plan(step)
        rows: NDArray[np.intp] = plan.rows[self._own(plan, self.world)]
        return rows

    @staticmethod
    def _read(features: NDArray[np.float16], rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Features of rows in this order; read in the order in which they lie on the disk."""
        places = np.argsort(rows)
        f = np.empty((len(rows), *features.shape[1:]), np.float32)
        f[places] = features[rows[places]]
        return f

    def _labels_of(self, known: NDArray[np.integer], mixed: int, share: NDArray[np.float32]) -> Labels:
        first = known.astype(np.int64)
        if first.ndim > 1:
            first[first == VOID] = NO_LABEL
        second = first.copy()
        second[:mixed] = first[:mixed][::-1]
        return Labels(*(torch.from_numpy(a).to(self.device) for a in (first, second, share)))


def hash_of(*numbers: int) -> int:
    """A number below 2**63 that looks random, from others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
