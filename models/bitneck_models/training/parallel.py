"""Training in several processes, as `torchrun` starts them: each takes a share of every batch.

    torchrun --nproc-per-node 2 --no-python bitneck-models train ZOO --data PHOTOS

Together they do what one process does with the same batch: each sample has its own source of noise, batch norms in the
rate term see the statistics of the whole batch, and gradients are averaged over its samples. What is left is the order
in which floats are added. Two terms are not the same: cross-entropy is a mean over the labels of a process, and weights
of rare classes come from its samples.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["ALONE", "GatheredBatchNorm2d", "World", "broadcast_state", "gather_norms", "joined", "mean_over_world"]


_PATIENCE = timedelta(days=3)
"""How long processes wait for the first one, which computes all features. `torchrun` ends them if one of them fails."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together.

    Attributes:
        rank: number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def positions(self, count: int, mixed: int) -> NDArray[np.intp]:
        """The samples of a batch that are this process's.

        Args:
            count: samples of the batch.
            mixed: the first so many of them are mixtures: sample i with sample ``mixed - 1 - i``.

        Returns:
            Ascending positions. Both samples of a mixture are of the same process.
        """
        position = np.arange(count)
        pair = np.where(position < mixed, np.minimum(position, mixed - 1 - position), position)
        return np.flatnonzero(pair % self.size == self.rank)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """Join the processes that `torchrun` started; alone without it.

    Args:
        device: cpu, or cuda for one GPU a process.

    Yields:
        This process's place among them, and its device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        yield ALONE, device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


def broadcast_state(module: nn.Module, world: World) -> None:
    """Give every process the first one's weights and statistics, in place."""
    if world.size > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def mean_over_world(values: Tensor, share: float, world: World) -> Tensor:
    """The mean over a whole batch.

    Args:
        values: means over this process's samples.
        share: its share of the batch's samples.
        world: the processes.
    """
    if world.size == 1:
        return values
    total = values.detach() * share
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: torch.autograd.function.FunctionCtx, *gradients: Any) -> Tensor:
        total: Tensor = gradients[0].clone()
        dist.all_reduce(total)
        return total


class GatheredBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose statistics in training are those of the whole batch, on CPUs too."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to the same size."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        counted = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])])
        totals: Tensor = _Sum.apply(counted)  # type: ignore[no-untyped-call]
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = x - mean[:, None, None]
        variance: Tensor = _Sum.apply(centred.square().sum((0, 2, 3)))  # type: ignore[no-untyped-call]
        variance = variance / count
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scaled: Tensor = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


def gather_norms(module: nn.Module, world: World) -> None:
    """Let every batch norm inside a module see whole batches, in place."""
    if world.size == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            gathered = GatheredBatchNorm2d(child.num_features, child.eps, child.momentum)
            gathered.load_state_dict(child.state_dict())
            setattr(module, name, gathered.to(child.weight.device).train(child.training))
        else:
            gather_norms(child, world)
