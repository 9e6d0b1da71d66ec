"""Recipes of the learned baselines, from a TOML file."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from bitneck.errors import InvalidConfig
from bitneck_models.networks.recipe import NetworkRecipe
from bitneck_models.typed_files import Id, Positive, Seed, Strict, load_toml, validated
from bitneck_models.zoo.recipe import Source, with_network

__all__ = ["ImageCodecRecipe", "LearnedRecipe", "Photographs", "Schedule", "StudentRecipe", "load_learned"]

Count = Annotated[int, Field(ge=1, le=100_000)]
Width = Annotated[int, Field(ge=1, le=4096)]


class Schedule(Strict):
    """The schedule of one run.

    Attributes:
        steps: updates.
        batch: photographs in an update.
        learning_rate: peak of Adam's learning rate; it rises over `warmup_steps` and falls along a cosine.
        density_learning_rate: the same for the factorized density.
        warmup_steps: updates of the rise.
        ema: decay of the running mean of the weights, which is what is kept.
        precision: of convolutions; normalizations and rates stay in float32.
        seed: seed of everything random.
    """

    steps: Count
    batch: Annotated[int, Field(ge=2)] = 16
    learning_rate: Positive = 1e-3
    density_learning_rate: Positive = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seed: Seed = 0


class Photographs(Strict):
    """The photographs of a run. Its checkpoint is the result, so it must know them.

    Attributes:
        count: number of photographs.
        sha256: digest of their names, folders and sizes.
    """

    count: int
    sha256: str


class _Learned(Strict):
    """What both have in common.

    The first lambda is trained from random weights, each other one from the one before it. The loss is
    ``rate + lambda * distortion``: lambda multiplies the DISTORTION.

    Attributes:
        name: of the codec in documents, and of the folder of its checkpoints.
        backbone: the network that answers; see `bitneck_models.zoo.recipe.Recipe`.
        data: folders of photographs; `views` and labels count for nothing.
        lambdas: one for each rate, the highest rate first.
        first: the schedule of the first lambda.
        further: the schedule of the others.
    """

    name: Id
    backbone: Id | NetworkRecipe
    data: Annotated[tuple[Source, ...], Field(min_length=1)]
    lambdas: Annotated[tuple[Positive, ...], Field(min_length=1)]
    first: Schedule
    further: Schedule

    @model_validator(mode="after")
    def _check_lambdas(self) -> Self:
        if list(self.lambdas) != sorted(set(self.lambdas), reverse=True):
            raise ValueError("lambdas: give different ones, the largest first")
        return self


class ImageCodecRecipe(_Learned):
    """The scale hyperprior image codec: Balle, Minnen, Singh, Hwang, Johnston 2018 (1802.01436).

    The rate is in bits a pixel, the distortion the mean squared error of pixels from 0 to 255.

    Attributes:
        kind: see above.
        channels: N, of the layers.
        latent_channels: M, of the latent.
        crop: side of the square crops that it is trained on.
    """

    kind: Literal["scale_hyperprior"]
    channels: Width = 128
    latent_channels: Width = 192
    crop: Annotated[int, Field(ge=32, le=1024, multiple_of=16)] = 128


class StudentRecipe(_Learned):
    """Entropic Student: Matsubara, Yang, Levorato, Mandt 2022 (2108.11898).

    The rate is in bits a photograph, the distortion the sum of the mean squared errors at `layers`.

    Attributes:
        kind: see above.
        stage: the decoder gives what this stage of the network gives; the student replaces the network up to it.
        layers: stages at which student and teacher are compared in the first part of the training; `stage` and later
            ones.
        encoder_channels: of the encoder's first two layers.
        latent_channels: of the latent.
        tuning: the second part: the encoder is frozen; decoder and the rest of the network learn from the teacher's
            class probabilities.
    """

    kind: Literal["entropic_student"]
    stage: str
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    encoder_channels: Width = 64
    latent_channels: Width = 24
    tuning: Schedule


LearnedRecipe = Annotated[ImageCodecRecipe | StudentRecipe, Field(discriminator="kind")]

_KINDS = ("scale_hyperprior", "entropic_student")
_ADAPTER: TypeAdapter[ImageCodecRecipe | StudentRecipe] = TypeAdapter(LearnedRecipe)


def load_learned(path: Path) -> ImageCodecRecipe | StudentRecipe:
    """Read a recipe.

    Raises:
        InvalidConfig: there is no such file, it is not TOML, or it has an unknown key or a value out of range, which
            the message names.
    """
    values = load_toml(path, "recipe of a learned baseline")
    if values.get("kind") not in _KINDS:
        raise InvalidConfig(f"{path}: kind must be one of {', '.join(_KINDS)}, got {values.get('kind')!r}")
    return validated(_ADAPTER, with_network(values, path), path, "recipe")
