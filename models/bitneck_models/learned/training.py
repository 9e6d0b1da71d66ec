"""Training of the learned baselines: one run for each lambda, each from the one before, and Entropic Student's tuning.

Every run resumes from its checkpoint. What is kept are the running means of the weights.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        recipe: BaseModel,
        photographs: Photographs,
        schedule: Schedule,
        module: nn.Module,
        trained: list[nn.Parameter],
        density: list[nn.Parameter],
        loss: Loss,
        source: Callable[[int], Iterator[Tensor]],
    ) -> None:
        self.name, self.schedule, self.module, self.loss = name, schedule, module, loss
        self.identity: Mapping[str, BaseModel] = {"recipe": recipe, "photographs": photographs}
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


def _complete(trainer: _LearnedTrainer, folder: Path, report: Report) -> None:
    run(
        trainer,
        folder / f"{trainer.name}.pt",
        steps=trainer.schedule.steps,
        save_every=_SAVE_EVERY,
        report=report,
    )
    trainer.keep_mean()


def _source(pictures: Pictures, sets: PhotoSets, batch: int, workers: int) -> Callable[[int], Iterator[Tensor]]:
    _, weights, _ = sets.by_photo()
    if len(weights) < batch:
        raise InvalidConfig(f"{len(weights)} photographs are fewer than a batch of {batch}; add photographs")
    return lambda step: batches(pictures, weights, batch, step, workers)


def _photographs(sets: PhotoSets) -> Photographs:
    photos = sets.by_photo()[0]
    lines = [f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in photos]
    return Photographs(count=len(photos), sha256=sha256_hex("\n".join(lines).encode()))


def _first(pictures: Pictures, sets: PhotoSets, schedule: Schedule) -> Tensor:
    """The batch of the first step."""
    return next(_source(pictures, sets, schedule.batch, 0)(0))


def _spread(t: Tensor) -> Tensor:
    """Standard deviation of each channel of (N, C, h, w)."""
    return t.detach().std(dim=(0, 2, 3))


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
    found, known = [], _photographs(sets)
    for k, lambda_ in enumerate(recipe.lambdas):
        schedule = recipe.further if k else recipe.first
        codec = copy.deepcopy(codec).train()
        pictures = Pictures(sets.by_photo()[0], backbone.input, recipe.crop, hash_of(schedule.seed, k))
        density = list(codec.density.parameters())
        others = [p for name, p in codec.named_parameters() if not name.startswith("density.")]

        def loss(x: Tensor, noise: Noise, codec: ImageCodec = codec, lambda_: float = lambda_) -> Any:
            return codec.loss(x, lambda_, noise)

        source = _source(pictures, sets, schedule.batch, workers)
        if k == 0:
            codec.density.fit_scale(_spread(codec.h_a(codec.g_a(_first(pictures, sets, schedule)).abs())))
        trainer = _LearnedTrainer(f"lambda-{k + 1}", recipe, known, schedule, codec, others, density, loss, source)
        _complete(trainer, runs / recipe.name, report)
        found.append(codec)
    return found


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
    photos = sets.by_photo()[0]
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

    found, known = [], _photographs(sets)
    for k, lambda_ in enumerate(recipe.lambdas):
        schedule = recipe.further if k else recipe.first
        student = copy.deepcopy(student).train()

        def distil(x: Tensor, noise: Noise, student: Student = student, lambda_: float = lambda_) -> Any:
            with torch.no_grad():
                teacher = outputs(head(x))
            f_hat, bits = student(x, noise)
            error = torch.stack(
                [F.mse_loss(s.float(), t.float()) for s, t in zip(outputs(f_hat), teacher, strict=True)]
            ).sum()
            return bits + lambda_ * error, bits.item(), error.item()

        density = list(student.density.parameters())
        others = [*student.encoder.parameters(), *student.decoder.parameters()]
        pictures = Pictures(photos, backbone.input, None, hash_of(schedule.seed, k))
        source = _source(pictures, sets, schedule.batch, workers)
        if k == 0:
            student.density.fit_scale(_spread(student.encoder(_first(pictures, sets, schedule))))
        trainer = _LearnedTrainer(f"lambda-{k + 1}", recipe, known, schedule, student, others, density, distil, source)
        _complete(trainer, runs / recipe.name, report)
        found.append(_tuned(f"tuned-{k + 1}", recipe, student, backbone, cut, sets, runs, workers, report))
    return found


def _tuned(
    name: str,
    recipe: StudentRecipe,
    student: Student,
    backbone: Backbone,
    cut: int,
    sets: PhotoSets,
    runs: Path,
    workers: int,
    report: Report,
) -> TunedStudent:
    """The second part: decoder and the rest of the network learn, from the teacher's class probabilities."""
    schedule = recipe.tuning
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

    pictures = Pictures(sets.by_photo()[0], backbone.input, None, hash_of(schedule.seed, len(recipe.lambdas)))
    trainer = _LearnedTrainer(
        name, recipe, _photographs(sets), schedule, tuned,
        [*tuned.student.decoder.parameters(), *tuned.rest.parameters()], [], learn,
        _source(pictures, sets, schedule.batch, workers),
    )  # fmt: skip
    _complete(trainer, runs / recipe.name, report)
    return tuned
