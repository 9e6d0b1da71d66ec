"""Training one bottleneck unit: rate + lambda * task, eq. (2) of the paper; lambda multiplies the TASK term.

    f --unit--> f_hat --tail--> student        the teacher is the same network without the unit: tail(f)

The features come from a cache or from fresh views, the backbone is frozen, and `bitneck_models.losses` has the two
terms. In the last stage the rate term is the factorized model, which will code the symbols.

Dimensions: M features, N batch, C x Hf x Wf feature.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor, nn

from bitneck.errors import InvalidConfig, ModelFailure
from bitneck_models.losses.rate_terms import Noise, RateTerm, build_rate
from bitneck_models.losses.task_terms import TaskLoss
from bitneck_models.training.batches import Batch, Batches, check_mirror, labelled
from bitneck_models.training.parallel import ALONE, World, broadcast_state, gather_norms, mean_over_world
from bitneck_models.training.run import (
    RunningMean,
    cosine,
    low_precision,
    read_checkpoint,
    run,
    seeded,
    set_learning_rates,
)
from bitneck_models.training.stream import ViewStream
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe

__all__ = ["RECENT_STEPS", "StepReport", "belongs_to", "train_unit"]

_CHECKPOINT_EVERY = 250
_LOOK_FOR_ZEROS_EVERY = 100
_FINISH_RATE = 0.3
"""Peak of the learning rate in the last stage, as a share of the first stage's."""
RECENT_STEPS = 200
"""Steps at the end of training whose mean rate a record gives. A checkpoint keeps them."""
_LAMBDA_GAIN = 0.02
"""How fast lambda follows a missed target rate: by a factor of e in 50 steps at an error of 100 %."""
_INITIAL, _MULTIPLES = 1, 2
"""Streams of random numbers: the initial weights of a rate term, and the multiples of the step."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step cost.

    Attributes:
        step: number of updates so far.
        steps: number of updates in all.
        bits: mean estimated bits per image of the rounded latent.
        task: the task term.
        lambda_: weight of the task term in the next step.
    """

    step: int
    steps: int
    bits: float
    task: float
    lambda_: float


def train_unit(
    unit: BottleneckUnit,
    tail: nn.Module,
    features: NDArray[np.float16] | ViewStream,
    point: UnitRecipe,
    training: TrainingRecipe,
    *,
    weights: NDArray[np.float64] | None = None,
    labels: NDArray[np.integer] | None = None,
    checkpoint: Path | None = None,
    report: Callable[[StepReport], None] = lambda _report: None,
    stop_after: int | None = None,
    recent: list[StepReport] | None = None,
    world: World = ALONE,
) -> bool:
    """Train a unit in place.

    Args:
        unit: the initialized unit. Its batch norms keep their statistics, and learn scale and shift only.
        tail: the frozen network after the split point.
        features: cached ones, (M, C, Hf, Wf) float16, or a stream of fresh ones of M photographs.
        point: gives step, lambda and both terms.
        training: the schedule.
        weights: probability of each feature to be drawn, (M,), summing to 1; None for equal ones.
        labels: class of each feature, (M,), -1 where unknown, or class maps, (M, H, W) uint8, 255 where unknown. Only
            task terms ``ce`` need them.
        checkpoint: a file to resume from, if it exists, and to save to.
        report: called after every step.
        stop_after: save and return after this many steps in all.
        recent: gets the last `RECENT_STEPS` steps, those before a resume included.
        world: the processes that train together. Terms ``ce`` and those with `rare` are averaged in each process.

    Returns:
        Whether training is complete.

    Raises:
        InvalidConfig: there are fewer features than a batch, a layer or a label is missing, or the checkpoint is
            unreadable or belongs to another recipe.
        ModelFailure: the loss is not finite, or every symbol is zero.
    """
    if len(features) < training.batch:
        raise InvalidConfig(f"{len(features)} features are fewer than a batch of {training.batch}; add photographs")
    trainer = _UnitTrainer(unit, tail, features, weights, labels, point, training, world)
    complete = run(
        trainer,
        checkpoint,
        steps=trainer.steps,
        save_every=_CHECKPOINT_EVERY,
        report=report,
        stop_after=stop_after,
        saves=world.leads,
    )
    if recent is not None:
        recent[:] = trainer.recent
    if complete:
        trainer.keep_mean()
    return complete


def belongs_to(checkpoint: Path, point: UnitRecipe, training: TrainingRecipe) -> bool:
    """Whether a checkpoint is there, and a run of this recipe would go on from it."""
    try:
        read_checkpoint(checkpoint, {"point": point, "training": training})
    except InvalidConfig:
        return False
    return True


class _Objective(nn.Module):
    """Both terms of the loss, on one process's samples; the module that processes share the gradients of."""

    def __init__(
        self, unit: BottleneckUnit, rate: RateTerm, task: TaskLoss, device: torch.device, precision: str
    ) -> None:
        super().__init__()
        self.unit, self.rate = unit, rate
        self._task, self._device, self._precision = task, device, precision

    def forward(
        self, batch: Batch, teacher: dict[int, Tensor], step: float, multiple: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The latent before rounding, mean bits a sample, and the task term."""
        with low_precision(self._device, self._precision):
            y, f_hat = self.unit(batch.features, step * multiple)
            student = self._task.features(f_hat)
        bits = self.rate(y, step, multiple, noise=Noise(batch.seeds)).mean()
        return y, bits, self._task(student, teacher, batch.labels)


class _UnitTrainer:
    """See `bitneck_models.training.run.Trainer`."""

    def __init__(
        self,
        unit: BottleneckUnit,
        tail: nn.Module,
        features: NDArray[np.float16] | ViewStream,
        weights: NDArray[np.float64] | None,
        labels: NDArray[np.integer] | None,
        point: UnitRecipe,
        training: TrainingRecipe,
        world: World,
    ) -> None:
        self.unit, self.point, self.training, self.world = unit, point, training, world
        broadcast_state(unit, world)
        self.steps = training.steps + training.finish_steps
        self.done = 0
        self.device = next(unit.parameters()).device
        self.task = TaskLoss(point.task, tail)
        if self.task.needs_labels and isinstance(features, ViewStream) and features.has_maps:
            check_mirror(point.id, mirror=training.mirror)
        elif self.task.needs_labels:
            known = labelled(labels, len(features), point.id, mirror=training.mirror)
            if not self.task.needs_teacher:  # then only features with a label teach anything
                weights = np.where(known, weights if weights is not None else 1 / len(known), 0.0)
                if (count := np.count_nonzero(weights)) < training.batch:
                    raise InvalidConfig(
                        f"{point.id}: {count} features with a label are fewer than a batch of {training.batch}; label "
                        "more photographs, or add a task term that needs no labels"
                    )
                weights /= weights.sum()
        known_labels = labels if self.task.needs_labels else None
        self.batches = Batches(features, training, weights, known_labels, self.device, world)
        self.lambda_ = point.lambda_
        self.recent: deque[StepReport] = deque(maxlen=RECENT_STEPS)
        self._begin_stage(finishing=training.steps == 0)
        self.mean = RunningMean(unit, training.ema, lead=1)

    @property
    def identity(self) -> Mapping[str, BaseModel]:
        return {"point": self.point, "training": self.training}

    def updates(self, stop: int) -> Iterator[StepReport]:
        while self.done < stop:
            if self.done == self.training.steps and self.done > 0:
                self._begin_stage(finishing=True)
            bits, task = self._update()
            self.recent.append(StepReport(self.done, self.steps, bits, task, self.lambda_))
            yield self.recent[-1]

    def _begin_stage(self, *, finishing: bool) -> None:
        """Make a fresh rate term and a fresh optimizer."""
        t = self.training
        with self._seeded(_INITIAL):
            kind = "factorized" if finishing else self.point.rate
            self.rate: RateTerm = build_rate(kind, self.unit.latent_shape[0]).to(self.device)
        with torch.no_grad():
            y = self.unit.eval().encoder(self.batches.draw(self.done, whole=True).features)
            self.rate.fit_scale((y / self.point.step).std(dim=(0, 2, 3)))
        gather_norms(self.rate, self.world)
        peak = t.learning_rate * (_FINISH_RATE if finishing else 1.0)
        own = t.encoder_learning_rate
        encoder_peak = peak if own is None else peak * own / t.learning_rate
        self.unit.encoder.requires_grad_(self.point.freeze != "encoder")
        self.unit.encoder.body.requires_grad_(not self.point.freeze)
        groups = [
            {"params": [p for p in self.unit.encoder.parameters() if p.requires_grad], "peak": encoder_peak},
            {"params": list(self.unit.decoder.parameters()), "peak": peak},
            {"params": list(self.rate.parameters()), "peak": t.rate_learning_rate},
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        self.objective: nn.Module = _Objective(self.unit, self.rate, self.task, self.device, t.precision)
        if self.world.size > 1:
            self.objective = nn.parallel.DistributedDataParallel(self.objective, broadcast_buffers=False)

    def _update(self) -> tuple[float, float]:
        """Update the weights once; mean bits per image of the rounded latent, and the task term."""
        t, step, multiple = self.training, self.point.step, self._multiple()
        begin, length = (0, t.steps) if self.done < t.steps else (t.steps, t.finish_steps)
        set_learning_rates(self.optimizer, self.done - begin, length, t.warmup_steps, cosine)
        self.unit.eval()  # batch norms keep their statistics: the unit starts from a solution, not from noise
        self.rate.train()
        batch = self.batches.draw(self.done)
        with torch.no_grad(), low_precision(self.device, t.precision):
            teacher = self.task.features(batch.features) if self.task.needs_teacher else {}
        y, bits, task = self.objective(batch, teacher, step, multiple)
        with torch.no_grad():
            means = torch.stack([self.rate(y, step, hard=True).mean(), (y.abs() > step / 2).float().mean(), bits, task])
        coded, alive, mean_bits, mean_task = mean_over_world(means, batch.fraction, self.world).tolist()
        # eq. (2) with lambda / multiple^2, times the multiple: updates at all steps are then about as large.
        loss = multiple * bits + self.lambda_ / multiple * task
        if not math.isfinite(mean_bits + mean_task):
            raise ModelFailure(
                f"{self.point.id}: the loss is not finite at step {self.done} (bits {mean_bits:.1f}, "
                f"task {mean_task:.4f}); lower the learning rate"
            )
        if (self.done + 1) % _LOOK_FOR_ZEROS_EVERY == 0 and alive == 0:
            raise ModelFailure(
                f"{self.point.id}: every symbol is zero at step {self.done}: raise lambda or lower the step"
            )
        self.optimizer.zero_grad(set_to_none=True)
        (loss * (batch.fraction * self.world.size)).backward()
        nn.utils.clip_grad_norm_(self.unit.parameters(), 10.0 * self.lambda_)
        self.optimizer.step()
        self.done += 1
        self._follow_target(coded)
        self.mean.update(self.unit, self.done)
        return coded, mean_task

    def _multiple(self) -> float:
        """The multiple of the step that this update is made at."""
        low, high = self.point.multiples
        if low == high:
            return low
        drawn = np.random.default_rng([self.training.seed, self.done, _MULTIPLES])
        return float(np.exp(drawn.uniform(math.log(low), math.log(high))))

    def _seeded(self, stream: int) -> AbstractContextManager[None]:
        return seeded(self.training.seed * 2 + stream, self.done)

    def _follow_target(self, bits: float) -> None:
        """Move lambda towards the target rate, once the rate term has settled.

        The rate is that of the rounded latent. With noise in place of rounding, latents that are nearly always zero
        seem to cost bits (measured: 111 bytes estimated, 86 coded).
        """
        if self.point.target_bytes is not None and self.done > self.training.warmup_steps:
            error = 1 - bits / (8 * self.point.target_bytes)
            self.lambda_ *= math.exp(_LAMBDA_GAIN * min(1.0, max(-1.0, error)))

    def keep_mean(self) -> None:
        """Put the running mean of the weights into the unit."""
        self.unit.load_state_dict(self.mean.module.state_dict())
        self.unit.eval()

    def state(self) -> dict[str, Any]:
        return {
            "lambda": self.lambda_,
            "recent": [[step.step, step.bits, step.task, step.lambda_] for step in self.recent],
            "unit": self.unit.state_dict(),
            "mean": self.mean.module.state_dict(),
            "rate": self.rate.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        # Between the stages the rate term is still that of the first one.
        self._begin_stage(finishing=self.done > self.training.steps or self.training.steps == 0)
        self.lambda_ = state["lambda"]
        for step, bits, task, lambda_ in state.get("recent", []):
            self.recent.append(StepReport(int(step), self.steps, bits, task, lambda_))
        self.unit.load_state_dict(state["unit"])
        self.mean.module.load_state_dict(state["mean"])
        self.rate.load_state_dict(state["rate"])
        self.optimizer.load_state_dict(state["optimizer"])
