"""Training of the learned baselines: one run for each lambda, each from the one before, and Entropic Student's tuning.

Every run resumes from its checkpoint. What is kept are the running means of the weights.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from bitneck.errors import InvalidConfig, ModelFailure
from bitneck.manifest import sha256_hex
from bitneck_models.learned.image_codec import ImageCodec
from bitneck_models.learned.photos import Pictures, batches
from bitneck_models.learned.recipe import ImageCodecRecipe, Photographs, Schedule, StudentRecipe
from bitneck_models.learned.student import Student
from bitneck_models.losses.rate_terms import Noise
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.batches import hash_of
from bitneck_models.training.photo_sets import PhotoSets
from bitneck_models.training.run import RunningMean, cosine, low_precision, run, set_learning_rates

__all__ = ["LearnedStep", "TunedStudent", "train_codecs", "train_students"]

_SAVE_EVERY = 100

Loss = Callable[[Tensor, Noise], tuple[Tensor, float, float]]
"""Of a batch: the loss, the rate and the distortion."""


@dataclass(frozen=True, slots=True)
class LearnedStep:
    """What a step cost.

    Attributes:
        run: which run it is part of.
        step: number of updates so far.
        steps: number of updates of the run.
        rate: bits a pixel, or a photograph for Entropic Student.
        distortion: see the recipe.
    """

    run: str
    step: int
    steps: int
    rate: float
    distortion: float


Report = Callable[[LearnedStep], None]
M = TypeVar("M", ImageCodec, Student)


class TunedStudent(nn.Module):
    """A student and its copy of the rest of the network.

    Args:
        student: encoder, density and decoder.
        rest: the network after the student's stage.
    """

    def __init__(self, student: Student, rest: nn.Module) -> None:
        super().__init__()
        self.student, self.rest = student, rest


class _LearnedTrainer:
    """See `bitneck_models.training.run.Trainer`."""

    def __init__(
        self,
        name: str,
        identity: Mapping[str, BaseModel],
        schedule: Schedule,
        module: nn.Module,
        trained: list[nn.Parameter],
        density: list[nn.Parameter],
        loss: Loss,
        source: Callable[[int], Iterator[Tensor]],
    ) -> None:
        self.name, self.identity, self.schedule, self.module, self.loss = name, identity, schedule, module, loss
        self.source = source
        self.done, self.device = 0, torch.device("cpu")
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean = RunningMean(module, schedule.ema, lead=1)
        self.trained = trained + density
        groups = [
            {"params": trained, "peak": schedule.learning_rate},
            {"params": density, "peak": schedule.density_learning_rate},
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    def updates(self, stop: int) -> Iterator[LearnedStep]:
        if self.done >= stop:
            return
        for x in self.source(self.done):
            rate, distortion = self._update(x)
            yield LearnedStep(self.name, self.done, self.schedule.steps, rate, distortion)
            if self.done >= stop:
                return

    def _update(self, x: Tensor) -> tuple[float, float]:
        t = self.schedule
        set_learning_rates(self.optimizer, self.done, t.steps, t.warmup_steps, cosine)
        noise = Noise([hash_of(t.seed, self.done, k) for k in range(len(x))])
        with low_precision(self.device, t.precision):
            loss, rate, distortion = self.loss(x.contiguous(memory_format=torch.channels_last), noise)
        if not math.isfinite(loss.item()):
            raise ModelFailure(f"{self.name}: the loss is not finite at step {self.done}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.done += 1
        self.mean.update(self.module, self.done)
        return rate, distortion

    def keep_mean(self) -> None:
        """Put the running mean of the weights into the module."""
        self.module.load_state_dict(self.mean.module.state_dict())
        self.module.eval()

    def state(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "mean": self.mean.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.mean.module.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Runs:
    """What the runs of a recipe have in common: the photographs, and where and how they are trained."""

    def __init__(
        self,
        recipe: ImageCodecRecipe | StudentRecipe,
        backbone: Backbone,
        sets: PhotoSets,
        folder: Path,
        workers: int,
        report: Report,
    ) -> None:
        self.recipe, self.spec, self.workers, self.report = recipe, backbone.input, workers, report
        self.folder = folder / recipe.name
        self.photos, self.weights, _ = sets.by_photo()
        lines = [f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in self.photos]
        self.known = Photographs(count=len(lines), sha256=sha256_hex("\n".join(lines).encode()))

    def batches(self, schedule: Schedule, number: int, side: int | None, step: int, workers: int) -> Iterator[Tensor]:
        """The batches of a run from a step on; see `Pictures`."""
        if len(self.photos) < schedule.batch:
            raise InvalidConfig(
                f"{len(self.photos)} photographs are fewer than a batch of {schedule.batch}; add photographs"
            )
        pictures = Pictures(self.photos, self.spec, side, hash_of(schedule.seed, number))
        return batches(pictures, self.weights, schedule.batch, step, workers)

    def complete(
        self,
        name: str,
        schedule: Schedule,
        number: int,
        side: int | None,
        module: nn.Module,
        trained: Iterable[nn.Parameter],
        density: Iterable[nn.Parameter],
        loss: Loss,
    ) -> None:
        """Train a module in one run, and put the running mean of its weights into it."""

        def source(step: int) -> Iterator[Tensor]:
            return self.batches(schedule, number, side, step, self.workers)

        identity = {"recipe": self.recipe, "photographs": self.known}
        trainer = _LearnedTrainer(name, identity, schedule, module, list(trained), list(density), loss, source)
        checkpoint = self.folder / f"{name}.pt"
        run(trainer, checkpoint, steps=schedule.steps, save_every=_SAVE_EVERY, report=self.report)
        trainer.keep_mean()

    def each_lambda(
        self, module: M, side: int | None, loss: Callable[[M, float, Tensor, Noise], tuple[Tensor, float, float]]
    ) -> Iterator[M]:
        """The module trained at every lambda, each from the one before it."""
        for k, lambda_ in enumerate(self.recipe.lambdas):
            schedule = self.recipe.further if k else self.recipe.first
            module = copy.deepcopy(module).train()
            if k == 0:
                coded = module.coded(next(self.batches(schedule, k, side, 0, workers=0)))
                module.density.fit_scale(coded.detach().std(dim=(0, 2, 3)))
            others = [p for name, p in module.named_parameters() if not name.startswith("density.")]
            self.complete(
                f"lambda-{k + 1}", schedule, k, side, module, others, module.density.parameters(),
                partial(loss, module, lambda_),
            )  # fmt: skip
            yield module


def train_codecs(
    recipe: ImageCodecRecipe,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    workers: int = 1,
    report: Report = lambda _step: None,
) -> list[ImageCodec]:
    """Train the image codec at every lambda.

    Args:
        recipe: what to train.
        backbone: knows the input's size.
        sets: the photographs.
        runs: folder for checkpoints.
        workers: processes that read photographs.
        report: called after every step.

    Returns:
        A codec for each lambda.

    Raises:
        InvalidConfig: there are fewer photographs than a batch, crops do not fit into the input, or a checkpoint
            belongs to another recipe.
        ModelFailure: the loss is not finite.
    """
    if recipe.crop > min(backbone.input.height, backbone.input.width):
        raise InvalidConfig(f"crops of {recipe.crop} do not fit into the input of {backbone.name}: take smaller ones")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.first.seed)
        codec = ImageCodec(recipe.channels, recipe.latent_channels)
    together = _Runs(recipe, backbone, sets, runs, workers, report)
    return list(together.each_lambda(codec, recipe.crop, ImageCodec.loss))


def train_students(
    recipe: StudentRecipe,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    workers: int = 1,
    report: Report = lambda _step: None,
) -> list[TunedStudent]:
    """Train Entropic Student at every lambda, in its two parts.

    Args:
        recipe: what to train.
        backbone: the teacher.
        sets: the photographs.
        runs: folder for checkpoints.
        workers: processes that read photographs.
        report: called after every step.

    Returns:
        A student for each lambda, with its copy of the rest of the network.

    Raises:
        InvalidConfig: there are fewer photographs than a batch, a stage is unknown or unfit, or a checkpoint belongs to
            another recipe.
        ModelFailure: the loss is not finite.
    """
    if backbone.task != "classification":
        raise InvalidConfig(f"{backbone.name}: Entropic Student is measured for classification only")
    cut = backbone.stage_index(recipe.stage) + 1
    compared = [backbone.stage_index(layer) for layer in recipe.layers]
    if min(compared) < cut - 1:
        raise InvalidConfig(f"layers: {recipe.layers[compared.index(min(compared))]} is before {recipe.stage}")
    head, rest = backbone.segment(0, cut), backbone.segment(cut)
    with torch.no_grad():
        _, *shape = head(torch.zeros(1, *backbone.input_shape)).shape
    with torch.random.fork_rng():
        torch.manual_seed(recipe.first.seed)
        student = Student(
            recipe.encoder_channels, recipe.latent_channels, (shape[0], shape[1], shape[2]), backbone.input_shape[1:]
        )
    stages = list(rest)[: max(compared) + 1 - cut]
    wanted = {index - cut for index in compared}

    def outputs(f: Tensor) -> list[Tensor]:
        """At the compared stages; -1 is the feature itself."""
        found = [f] if -1 in wanted else []
        for index, stage in enumerate(stages):
            f = stage(f)
            if index in wanted:
                found.append(f)
        return found

    def distil(student: Student, lambda_: float, x: Tensor, noise: Noise) -> tuple[Tensor, float, float]:
        with torch.no_grad():
            teacher = outputs(head(x))
        f_hat, bits = student(x, noise)
        errors = [F.mse_loss(s.float(), t.float()) for s, t in zip(outputs(f_hat), teacher, strict=True)]
        error = torch.stack(errors).sum()
        return bits + lambda_ * error, bits.item(), error.item()

    together = _Runs(recipe, backbone, sets, runs, workers, report)
    trained = enumerate(together.each_lambda(student, None, distil), start=1)
    return [_tuned(f"tuned-{k}", together, recipe, each, backbone, cut) for k, each in trained]


def _tuned(
    name: str, together: _Runs, recipe: StudentRecipe, student: Student, backbone: Backbone, cut: int
) -> TunedStudent:
    """The second part: decoder and the rest of the network learn, from the teacher's class probabilities."""
    tuned = TunedStudent(copy.deepcopy(student), copy.deepcopy(backbone.segment(cut)).requires_grad_())
    tuned.eval()  # batch norms keep their statistics
    network = backbone.segment(0)

    def learn(x: Tensor, noise: Noise) -> tuple[Tensor, float, float]:
        with torch.no_grad():
            teacher = network(x).float().log_softmax(1)
            y = tuned.student.encoder(x)
            bits = tuned.student.density.bits(y + noise(y)).sum().item() / len(x)
            y_hat = y.round()
        logits = tuned.rest(tuned.student.decoder(y_hat))
        divergence = F.kl_div(logits.float().log_softmax(1), teacher, reduction="batchmean", log_target=True)
        return divergence, bits, divergence.item()

    trained = [*tuned.student.decoder.parameters(), *tuned.rest.parameters()]
    together.complete(name, recipe.tuning, len(recipe.lambdas), None, tuned, trained, [], learn)
    return tuned
