"""Training one bottleneck unit: rate + lambda * task, eq. (2) of the paper; lambda multiplies the TASK term.

    f --unit--> f_hat --tail--> student        the teacher is the same network without the unit: tail(f)

The features come from a cache and the backbone is frozen; `bitneck_models.losses` has the two terms. Every
random number is drawn from the seed and the number of the step, so a run that was cut off and resumed gives exactly
the weights of one that was not.

Dimensions: M cached features, N batch, C x Hf x Wf feature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitneck.errors import InvalidConfig, ModelFailure
from bitneck_models.data.class_maps import VOID
from bitneck_models.losses.rate_terms import RateTerm, build_rate
from bitneck_models.losses.task_terms import NO_LABEL, Labels, TaskLoss
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import PointRecipe, TrainingRecipe

__all__ = ["StepReport", "train_unit"]

_CHECKPOINT_EVERY = 250
_FINISH_RATE = 0.3
"""Learning rate of the last stage, as a share of the first's."""
_LAMBDA_GAIN = 0.02
"""How fast lambda follows a missed target rate: e-fold in 50 steps at an error of 100 %."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step cost: mean estimated bits per image of the rounded latent, the task term, and its weight."""

    step: int
    steps: int
    bits: float
    task: float
    lambda_: float


def train_unit(
    unit: BottleneckUnit,
    tail: nn.Module,
    features: NDArray[np.float16],
    point: PointRecipe,
    training: TrainingRecipe,
    *,
    weights: NDArray[np.float64] | None = None,
    labels: NDArray[np.integer] | None = None,
    checkpoint: Path | None = None,
    report: Callable[[StepReport], None] = lambda _report: None,
    stop_after: int | None = None,
) -> bool:
    """Train a unit in place.

    Args:
        unit: as it was initialized; its batch norms keep their statistics and learn scale and shift only.
        tail: the frozen network after the split point.
        features: (M, C, Hf, Wf) float16.
        point: step, lambda and rate term.
        training: the schedule.
        weights: probability of each feature to be drawn, (M,), summing to 1; None for all alike.
        labels: class of each feature, (M,), -1 where unknown, or class maps, (M, H, W) uint8, where 255 is no class;
            only task terms with labels need them.
        checkpoint: a file to resume from, if it is there, and to save to.
        report: called after every step.
        stop_after: save and return after this many steps in all.

    Returns:
        Whether training is complete.

    Raises:
        InvalidConfig: fewer features than a batch, a layer that is not there, labels that are missing, or a checkpoint
            of another recipe.
        ModelFailure: the loss is not finite, or the latent has collapsed to zeros.
    """
    if len(features) < training.batch:
        raise InvalidConfig(f"{len(features)} features are fewer than a batch of {training.batch}; add photographs")
    run = _Run(unit, tail, features, weights, labels, point, training)
    total = training.steps + training.finish_steps
    if checkpoint is not None and checkpoint.is_file():
        run.load(checkpoint)
    while run.done < total:
        if stop_after is not None and run.done >= stop_after:
            break
        bits, task = run.step()
        report(StepReport(run.done, total, bits, task, run.lambda_))
        if checkpoint is not None and run.done % _CHECKPOINT_EVERY == 0:
            run.save(checkpoint)
    if checkpoint is not None:
        run.save(checkpoint)
    if run.done < total:
        return False
    run.keep_mean()
    return True


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        unit: BottleneckUnit,
        tail: nn.Module,
        features: NDArray[np.float16],
        weights: NDArray[np.float64] | None,
        labels: NDArray[np.integer] | None,
        point: PointRecipe,
        training: TrainingRecipe,
    ) -> None:
        self.unit, self.tail, self.features, self.point, self.training = unit, tail, features, point, training
        self.weights, self.labels = weights, labels
        self.task = TaskLoss(point.task, tail)
        if self.task.needs_labels:
            self._demand_labels(point)
        self.done = 0
        self.lambda_ = point.lambda_
        self.device = next(unit.parameters()).device
        self._begin_stage()
        self.mean = {k: v.detach().clone() for k, v in unit.state_dict().items()}

    def _demand_labels(self, point: PointRecipe) -> None:
        """Without a teacher only what has a label is drawn."""
        known = np.zeros(len(self.features), np.bool_)
        if self.labels is not None:
            known = self.labels != NO_LABEL if self.labels.ndim == 1 else np.ones(len(self.features), np.bool_)
        if self.labels is not None and self.labels.ndim > 1 and self.training.mirror:
            raise InvalidConfig(f"{point.id}: class maps are not mirrored; set `mirror = false` in [training]")
        if not np.any(known):
            raise InvalidConfig(f"{point.id} has a task term `ce`, and no feature has a label")
        if not self.task.needs_teacher:
            weights = self.weights if self.weights is not None else np.full(len(known), 1 / len(known))
            self.weights = np.where(known, weights, 0.0)
            self.weights /= self.weights.sum()

    def _begin_stage(self) -> None:
        """A fresh rate term and optimizer."""
        finishing = self.done >= self.training.steps
        with _seeded(self.training.seed, self.done, 1):
            kind = "factorized" if finishing else self.point.rate
            self.rate: RateTerm = build_rate(kind, self.unit.latent_shape[0]).to(self.device)
        with torch.no_grad():
            y = self.unit.eval().encoder(self._batch()[0])
            self.rate.fit_scale((y / self.point.step).std(dim=(0, 2, 3)))
        peak = self.training.learning_rate * (_FINISH_RATE if finishing else 1.0)
        own = self.training.encoder_learning_rate
        encoder_peak = peak if own is None else peak * own / self.training.learning_rate
        self.unit.encoder.body.requires_grad_(not self.point.freeze)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [p for p in self.unit.encoder.parameters() if p.requires_grad], "peak": encoder_peak},
                {"params": list(self.unit.decoder.parameters()), "peak": peak},
                {"params": list(self.rate.parameters()), "peak": self.training.rate_learning_rate},
            ]
        )

    def step(self) -> tuple[float, float]:
        """One update; mean bits per image, of the rounded latent, and the task term."""
        if self.done == self.training.steps and self.done > 0:
            self._begin_stage()
        self._schedule()
        self.unit.eval()  # batch norms keep their statistics: the unit starts from a solution, not from noise
        self.rate.train()
        with _seeded(self.training.seed, self.done, 0):
            f, labels = self._batch()  # (N, C, Hf, Wf)
            with torch.no_grad(), self._low_precision():
                teacher = self.task.features(f) if self.task.needs_teacher else {}
            with self._low_precision():
                y, f_hat = self.unit(f, self.point.step)
                student = self.task.features(f_hat)
            bits = self.rate(y, self.point.step).mean()
            with torch.no_grad():
                coded = self.rate(y, self.point.step, hard=True).mean().item()
            task = self.task(student, teacher, labels)
        loss = bits + self.lambda_ * task
        if not torch.isfinite(loss):
            raise ModelFailure(
                f"{self.point.id}: the loss is not finite at step {self.done} (bits {bits.item():.1f}, "
                f"task {task.item():.4f}); lower the learning rate"
            )
        if self.done % 100 == 99 and not (y.detach().abs() > self.point.step / 2).any():
            raise ModelFailure(
                f"{self.point.id}: every symbol is zero at step {self.done}: raise lambda or lower the step"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unit.parameters(), 10.0 * self.lambda_)
        self.optimizer.step()
        self.done += 1
        self._follow_target(coded)
        self._update_mean()
        return coded, task.item()

    def _low_precision(self) -> torch.autocast:
        """For what takes most of the time; the latent and the rate term stay in float32."""
        low = self.training.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low)

    def _follow_target(self, bits: float) -> None:
        """Move lambda towards the target rate, once the rate term has settled.

        The rate is the rounded latent's: with noise in place of rounding, latents that are nearly always zero seem to
        cost bits (measured: 111 bytes estimated, 86 coded).
        """
        if self.point.target_bytes is not None and self.done > self.training.warmup_steps:
            error = 1 - bits / (8 * self.point.target_bytes)
            self.lambda_ *= math.exp(_LAMBDA_GAIN * min(1.0, max(-1.0, error)))

    def _schedule(self) -> None:
        """Linear warm-up, then a cosine to a hundredth, in each stage."""
        t = self.training
        begin, length = (0, t.steps) if self.done < t.steps else (t.steps, t.finish_steps)
        k = self.done - begin
        warm = min(1.0, (k + 1) / max(1, t.warmup_steps))
        fall = 0.5 * (1 + math.cos(math.pi * k / max(1, length)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm * (0.01 + 0.99 * fall)

    def _batch(self) -> tuple[Tensor, Labels | None]:
        """Features of a batch, mirrored at random and partly mixed, and what is known of their classes."""
        rng = np.random.default_rng([self.training.seed, self.done])
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
        if self.labels is None or not self.task.needs_labels:
            return f, None
        first = self.labels[rows][order].astype(np.int64)
        if first.ndim > 1:
            first[first == VOID] = NO_LABEL
        second = first.copy()
        second[:mixed] = first[:mixed][::-1]
        return f, Labels(*(torch.from_numpy(a).to(self.device) for a in (first, second, share)))

    def _update_mean(self) -> None:
        decay = min(self.training.ema, (1 + self.done) / (10 + self.done))
        for key, value in self.unit.state_dict().items():
            if value.is_floating_point():
                self.mean[key].lerp_(value.detach(), 1 - decay)

    def keep_mean(self) -> None:
        """Put the running mean of the weights into the unit."""
        self.unit.load_state_dict(self.mean)
        self.unit.eval()

    def _identity(self) -> dict[str, Any]:
        return {"point": self.point.model_dump(), "training": self.training.model_dump()}

    def save(self, path: Path) -> None:
        """Write a checkpoint, all or nothing."""
        state = {
            "done": self.done,
            "lambda": self.lambda_,
            "identity": self._identity(),
            "unit": self.unit.state_dict(),
            "mean": self.mean,
            "rate": self.rate.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.rename(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InvalidConfig: it belongs to another recipe.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        identity = state["identity"]  # validated again: what an older version did not know is at its default
        point = PointRecipe.model_validate(identity["point"], by_name=True)
        if (point, TrainingRecipe.model_validate(identity["training"])) != (self.point, self.training):
            raise InvalidConfig(f"{path} belongs to another recipe; remove it to train {self.point.id} anew")
        self.lambda_ = state["lambda"]
        self.done = state["done"]
        self.done -= self.done == self.training.steps  # at the border the saved rate term is the first stage's
        self._begin_stage()
        self.done = state["done"]
        self.unit.load_state_dict(state["unit"])
        self.mean = state["mean"]
        self.rate.load_state_dict(state["rate"])
        self.optimizer.load_state_dict(state["optimizer"])


class _seeded:  # noqa: N801  a context manager that reads as a word
    """torch's random numbers from (seed, step, purpose), and the caller's own state afterwards."""

    def __init__(self, seed: int, step: int, purpose: int) -> None:
        self._seed = (seed * 2 + purpose) * 1_000_003 + step

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *_exc: object) -> None:
        self._fork.__exit__(None, None, None)
