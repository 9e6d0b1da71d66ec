"""Recipes: what to train, from a TOML file."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bitneck.errors import InvalidConfig
from bitneck_models.losses.rate_terms import RateKind
from bitneck_models.losses.task_terms import TaskTerm
from bitneck_models.networks.recipe import NetworkRecipe, load_network
from bitneck_models.typed_files import Id, Positive, Seed, Strict, load_toml, validated
from bitneck_models.units.topologies import Topology

__all__ = [
    "OWN_SCHEDULE",
    "STARTS",
    "Channels",
    "Recipe",
    "Source",
    "Stride",
    "TrainingRecipe",
    "UnitKind",
    "UnitRecipe",
    "load_recipe",
    "with_network",
]

STARTS = ("task", "principal", "next", "random")
"""Starts that need no other unit."""

Stride = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Group = tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]]
Blocks = Annotated[int, Field(ge=0, le=64)]
Steps = Annotated[int, Field(ge=0)]
Batch = Annotated[int, Field(ge=2)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Multiple = Annotated[float, Field(ge=1 / 64, le=64)]


class Source(Strict):
    """A folder of photographs to learn from.

    Attributes:
        folder: path below the data folder.
        views: random views of each photograph.
        share: share of this source in every batch, relative to the other sources.
        validate_every: put every n-th photograph aside for validation; 0 for none, 1 for all.
        labels: the photographs have labels, and task terms ``ce`` may use them. For classification the folder has
            ``labels.csv`` or one folder for each class. For segmentation it has ``images`` and ``labels``, or it is a
            folder of COCO's photographs.
        limit: use at most this many photographs, spread evenly over the folder; None for all. Features are kept on
            disk, so the limit bounds the space they take.
    """

    folder: str
    views: Annotated[int, Field(ge=1, le=1000)] = 1
    share: Positive = 1.0
    validate_every: Annotated[int, Field(ge=0)] = 0
    labels: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None


class TrainingRecipe(Strict):
    """The schedule of a unit's training.

    Attributes:
        steps: updates in the first stage, with the point's own rate term.
        finish_steps: updates in the last stage; its rate term is the factorized model, which codes the symbols.
        batch: features in an update.
        learning_rate: peak of Adam's learning rate, for the unit.
        encoder_learning_rate: the same for the encoder, to let it move less; None for `learning_rate`.
        rate_learning_rate: the same for the rate term, which has to follow the unit.
        warmup_steps: updates over which the learning rates rise. They then fall along a cosine.
        mix: share of the features that are mixtures of two features, for variety.
        mirror: mirror half of the batches. Not for networks whose answer has a place and tells left from right.
        ema: decay of the running mean of the weights. The mean is what is kept.
        precision: precision of the frozen tail and of the unit's layers at the feature's size. The layers at the latent
            and the rate term stay in float32. bfloat16 is faster on processors and GPUs that support it.
        stream: take fresh views through the frozen head at every step, in place of a cache of features; `views` then
            counts for nothing. For data sets whose features would fill a disk.
        seed: seed of everything random.
    """

    steps: Steps = 3000
    finish_steps: Steps = 1500
    batch: Batch = 128
    learning_rate: Positive = 3e-3
    encoder_learning_rate: Positive | None = None
    rate_learning_rate: Positive = 1e-2
    warmup_steps: Steps = 100
    mix: Annotated[float, Field(ge=0, le=1)] = 0.3
    mirror: bool = True
    ema: Decay = 0.998
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    stream: bool = False
    seed: Seed = 0


class UnitKind(Strict):
    """What a unit of a recipe and all trials of a search space have in common: the kind of unit, and its loss.

    Attributes:
        split: split point of the backbone.
        topology: see `bitneck_models.units.topologies`.
        filters: D, depthwise filters a channel; see `bitneck_models.units.unit.BottleneckUnit`.
        hidden: H, channels between the layers, for topologies that have them. A nested unit that starts from a
            separable one takes over its latent channels.
        group: (G1, G2), rows and columns of windows that a nested unit codes together.
        pool: P, side of the means of a block unit.
        decoder_blocks: residual blocks of the decoder, at the latent's size and at the feature's. They cost the cloud,
            not the device.
        freeze: true keeps the encoder's layers before its last one as they start; ``"encoder"`` keeps the whole
            encoder, so that only the decoder learns.
        rate: rate term of the first stage.
        task: summands of the task term.
        init: where training starts: ``task`` or ``principal`` for a linear start, ``next`` for a copy of the network's
            next layer (see `bitneck_models.units.starts`), or ``random``.
    """

    split: Id
    topology: Topology = "separable"
    filters: Annotated[int, Field(ge=1, le=64)] = 1
    hidden: Annotated[int, Field(ge=1, le=16384)] | None = None
    group: Group = (1, 1)
    pool: Annotated[int, Field(ge=1, le=64)] = 1
    decoder_blocks: tuple[Blocks, Blocks] = (0, 0)
    freeze: bool | Literal["encoder"] = False
    rate: RateKind = "hyperprior"
    task: Annotated[tuple[TaskTerm, ...], Field(min_length=1)] = (TaskTerm(kind="mae"),)
    init: str = "task"

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.topology == "nested" and self.init == "next":
            raise ValueError("init: a nested unit starts as a separable one; use task, principal or random")
        return self


class UnitRecipe(UnitKind):
    """A unit to train. Its training also makes its first operating point, which has the unit's id and step.

    The loss is eq. (2) of the paper, ``bits + lambda * task``, with bits per image and the task term a mean. lambda
    multiplies the TASK term.

    Attributes:
        id: id of the unit, and of its first operating point.
        stride: S.
        channels: Cr at the start of training. Channels whose symbols end as zeros are removed. A unit that starts from
            another one takes over its channels; a nested one has at most those of its group of windows.
        step: quantizer step Q that it is trained at, in the latent's unit. `bitneck-models steps` adds others.
        lambda_: weight of the task term, key ``lambda``.
        multiples: smallest and largest multiple of the step; each update draws one, evenly on a logarithmic scale, so
            that one unit serves a range of rates. lambda is divided by the multiple's square: the squared error of
            rounding grows so. (1, 1) for the step alone.
        target_bytes: if given, lambda is only the starting value; training moves it until the estimated rate at the
            unit's own step is this many bytes per image.
        kernel: K of the depthwise layers; None for the smallest that covers the stride.
        steps, ..., seed: replace the values of `TrainingRecipe`.
        curve: name of the curve of its points in a report; empty for the name of its split point. A unit that several
            studies share has a table: the name of its curve by study.
        ship: put its points into the bundle. If false, it is only there for others to start from.
        init: see `UnitKind`; may also be the id of a unit listed before this one.
    """

    id: Id
    stride: Stride
    channels: Channels
    step: Positive
    lambda_: Annotated[float, Field(gt=0, alias="lambda")]
    multiples: tuple[Multiple, Multiple] = (1.0, 1.0)
    target_bytes: Positive | None = None
    kernel: Annotated[int, Field(ge=1, le=65)] | None = None
    steps: Steps | None = None
    finish_steps: Steps | None = None
    batch: Batch | None = None
    learning_rate: Positive | None = None
    encoder_learning_rate: Positive | None = None
    rate_learning_rate: Positive | None = None
    warmup_steps: Steps | None = None
    mix: Annotated[float, Field(ge=0, le=1)] | None = None
    mirror: bool | None = None
    ema: Decay | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    stream: bool | None = None
    seed: Seed | None = None
    curve: str | dict[Id, str] = ""
    ship: bool = True

    @model_validator(mode="after")
    def _check_multiples(self) -> Self:
        low, high = self.multiples
        if low > high:
            raise ValueError(f"multiples: the smallest one {low:g} is above the largest {high:g}")
        return self


OWN_SCHEDULE = tuple(key for key in UnitRecipe.model_fields if key in TrainingRecipe.model_fields)
"""Keys of the schedule that a unit may set for itself."""


class Recipe(Strict):
    """A zoo entry: the backbone, the photographs, and the units to train.

    Attributes:
        name: name of the bundle.
        backbone: a name, a network recipe as a table, or the path of a network recipe, relative to this recipe and
            ending in ``.toml``.
        data: folders of photographs.
        training: the schedule.
        units: the units, in the order of training.
        study: the points are there to be compared: also those that others beat are exported.
    """

    name: Id
    backbone: Id | NetworkRecipe
    data: Annotated[tuple[Source, ...], Field(min_length=1)]
    training: TrainingRecipe = TrainingRecipe()
    units: Annotated[tuple[UnitRecipe, ...], Field(min_length=1)]
    study: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids: set[str] = set()
        for unit in self.units:
            if unit.id in ids:
                raise ValueError(f"two units have the id {unit.id}")
            if unit.init not in {*STARTS, *ids}:
                raise ValueError(f"unit {unit.id}: init {unit.init!r} is no method and no unit listed before it")
            ids.add(unit.id)
        return self

    def training_of(self, unit: UnitRecipe) -> TrainingRecipe:
        """The schedule of one unit: the recipe's, with the values that the unit sets for itself."""
        own = {key: getattr(unit, key) for key in OWN_SCHEDULE}
        return self.training.model_copy(update={key: value for key, value in own.items() if value is not None})

    def warnings(self, unit: UnitRecipe) -> tuple[str, ...]:
        """What in a unit's recipe cannot do what it seems to ask for; each a sentence for people."""
        training, found = self.training_of(unit), []
        if training.steps and training.warmup_steps >= training.steps:
            found.append(
                f"{unit.id}: warmup_steps ({training.warmup_steps}) is not below steps ({training.steps}): the "
                "learning rate never reaches its peak"
            )
        if unit.target_bytes is not None and training.warmup_steps >= training.steps + training.finish_steps:
            found.append(
                f"{unit.id}: target_bytes has no effect: lambda moves after warmup_steps ({training.warmup_steps}), "
                f"and there are {training.steps + training.finish_steps} updates in all"
            )
        return tuple(found)

    def unit(self, unit_id: str) -> UnitRecipe:
        """The recipe of one unit.

        Raises:
            InvalidConfig: there is no such unit; the message lists them.
        """
        for unit in self.units:
            if unit.id == unit_id:
                return unit
        raise InvalidConfig(f"the recipe has no unit {unit_id!r}; it has: {', '.join(u.id for u in self.units)}")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file, or a folder with ``recipe.toml``.

    Raises:
        InvalidConfig: there is no such file, it is not TOML, it is of an older format, or it has an unknown key or a
            value out of range, which the message names.
    """
    path = path / "recipe.toml" if path.is_dir() else path
    values = load_toml(path, "recipe")
    if "points" in values and "units" not in values:
        raise InvalidConfig(
            f"{path} lists points, as recipes did before units and points were two things; run `bitneck-models upgrade "
            f"{path.parent}`"
        )
    return validated(Recipe, with_network(values, path), path, "recipe")


def with_network(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of a recipe, with the network recipe that `backbone` names in its place.

    Args:
        values: of a file.
        path: the file.

    Raises:
        InvalidConfig: there is no such network recipe, or it is none.
    """
    network = values.get("backbone")
    if isinstance(network, str) and network.endswith(".toml"):
        return values | {"backbone": load_network(path.parent / network)}
    return values
