"""One run of training, for units and for networks. It may stop after any step, and resumes to the same weights.

    resume from the checkpoint -> update, update, ... -> report each -> save now and then, and at the end

Every random number comes from the seed and the number of the step, and the state of the optimizer is in the checkpoint,
so a run that was interrupted and resumed gives exactly the weights of one that was not.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel
from torch import nn

from bitneck.errors import InvalidConfig

__all__ = [
    "RunningMean",
    "Trainer",
    "choose_device",
    "cosine",
    "due",
    "low_precision",
    "polynomial",
    "read_checkpoint",
    "run",
    "seeded",
    "set_learning_rates",
    "write_atomically",
]

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Trainer(Protocol[R_co]):
    """What differs between the trainings of units and of networks.

    Attributes:
        done: number of updates so far.
        device: where the weights are, as torch names it.
        identity: the recipes that decide the result; a checkpoint of other ones is refused.
    """

    done: int
    device: torch.device

    @property
    def identity(self) -> Mapping[str, BaseModel]:
        """See the class."""
        ...

    def updates(self, stop: int) -> Iterator[R_co]:
        """Update the weights until `done` is `stop`, and tell about each update."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a state; `done` is that of the state already."""
        ...


def run(
    trainer: Trainer[R],
    checkpoint: Path | None,
    *,
    steps: int,
    save_every: int,
    report: Callable[[R], None],
    stop_after: int | None = None,
    saves: bool = True,
) -> bool:
    """Train until all steps are done.

    Args:
        trainer: what to train.
        checkpoint: a file to resume from, if it exists, and to save to; None for neither.
        steps: number of updates in all.
        save_every: updates between two saves.
        report: called after every update.
        stop_after: save and return after this many updates in all.
        saves: write the checkpoint; false in all but one of several processes, which read it all the same.

    Returns:
        Whether training is complete.

    Raises:
        InvalidConfig: the checkpoint is unreadable, or belongs to another recipe.
    """
    if checkpoint is not None and checkpoint.is_file():
        state = read_checkpoint(checkpoint, trainer.identity, trainer.device)
        try:
            trainer.done = int(state["done"])
            if not 0 <= trainer.done <= steps:
                raise ValueError(f"{trainer.done} updates of {steps} are done")
            trainer.restore(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as exc:
            raise _unreadable(checkpoint, exc) from exc
    for told in trainer.updates(steps if stop_after is None else min(steps, stop_after)):
        report(told)
        if checkpoint is not None and saves and due(trainer.done, save_every, steps):
            _save(trainer, checkpoint)
    if checkpoint is not None and saves and not due(trainer.done, save_every, steps):
        _save(trainer, checkpoint)
    return trainer.done >= steps


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every n-th step, and after the last one, happens now."""
    return done % every == 0 or done == steps


def _save(trainer: Trainer[Any], path: Path) -> None:
    identity = {name: recipe.model_dump() for name, recipe in trainer.identity.items()}
    write_atomically({"identity": identity, "done": trainer.done} | trainer.state(), path)


def write_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Write a file of tensors: all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.rename(path)


def read_checkpoint(
    path: Path, identity: Mapping[str, BaseModel], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the file.
        identity: the recipes that it must belong to. Values that an older version did not know have their defaults.
        device: where its tensors go.

    Raises:
        InvalidConfig: the file is unreadable, or belongs to another recipe.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        kept = {
            name: type(recipe).model_validate(state["identity"][name], by_name=True)
            for name, recipe in identity.items()
        }
    except Exception as exc:  # torch.load raises many kinds for a broken file
        raise _unreadable(path, exc) from exc
    if others := [name for name in identity if kept[name] != identity[name]]:
        what = "other photographs" if others == ["photographs"] else "another recipe"
        raise InvalidConfig(f"{path} belongs to {what}; remove it to train anew")
    return state


def _unreadable(path: Path, exc: Exception) -> InvalidConfig:
    reason = repr(exc) if isinstance(exc, KeyError) else (str(exc).splitlines() or [repr(exc)])[0]
    return InvalidConfig(f"{path}: not readable as a checkpoint ({reason}); remove it to train anew")


class RunningMean:
    """The running mean of a module's weights, which is what training keeps.

    Args:
        module: the module where its training starts.
        decay: share of the mean that an update keeps; during the first updates, n of them done, at most
            ``(lead + n) / (10 + n)``.
        lead: see `decay`.
    """

    def __init__(self, module: nn.Module, decay: float, lead: int) -> None:
        self.module = copy.deepcopy(module).requires_grad_(requires_grad=False).eval()
        self.decay = decay
        self.lead = lead

    def update(self, module: nn.Module, done: int) -> None:
        """Take in the weights after an update; `done` counts it."""
        decay = min(self.decay, (self.lead + done) / (10 + done))
        mean = self.module.state_dict()
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                mean[key].lerp_(value.detach(), 1 - decay)


def cosine(k: int, length: int) -> float:
    """Fall from 1 to a hundredth along a cosine: share of the peak at step k of `length`."""
    return 0.01 + 0.99 * (0.5 * (1 + math.cos(math.pi * k / max(1, length))))


def polynomial(k: int, length: int) -> float:
    """Fall from 1 to 0 as ``(1 - k / length) ** 0.9``: share of the peak at step k of `length`."""
    return float((1 - k / length) ** 0.9)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, k: int, length: int, warmup_steps: int, fall: Callable[[int, int], float]
) -> None:
    """Set each group's learning rate from its ``peak``: a linear rise over the first steps, and a fall.

    Args:
        optimizer: its groups have a ``peak``.
        k: number of the step.
        length: steps of the fall.
        warmup_steps: steps of the rise.
        fall: `cosine` or `polynomial`.
    """
    rise, share = min(1.0, (k + 1) / max(1, warmup_steps)), fall(k, length)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rise * share


@contextmanager
def seeded(stream: int, step: int) -> Iterator[None]:
    """Torch's random numbers from (stream, step); afterwards the caller's own state is back.

    Args:
        stream: seed, or whatever distinguishes independent random numbers of one step.
        step: number of the step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(stream * 1_000_003 + step)
        yield


def choose_device(name: str) -> str:
    """The device that a name stands for.

    Args:
        name: a device of torch, or ``auto`` for a GPU if there is one.

    Raises:
        InvalidConfig: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise InvalidConfig(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from exc
    return name


def low_precision(device: torch.device, precision: str) -> torch.autocast:
    """Lower the precision of what takes most of the time; see `BottleneckUnit.forward`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
