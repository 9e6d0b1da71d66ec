"""Recipes: what to train, from a TOML file. Typed; unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bitneck.errors import InvalidConfig
from bitneck.ids import ID_PATTERN
from bitneck_models.losses.rate_terms import RateKind
from bitneck_models.networks.recipe import NetworkRecipe, load_network
from bitneck_models.typed_files import Strict, load_toml, validated
from bitneck_models.units.topologies import Topology

__all__ = ["PointRecipe", "Recipe", "Source", "TaskTerm", "TrainingRecipe", "load_recipe"]

Id = Annotated[str, Field(pattern=ID_PATTERN)]


class Source(Strict):
    """A folder of photographs to learn from.

    Attributes:
        folder: below the data folder.
        views: random views of each photograph.
        share: of every batch that comes from this source; shares are relative to each other.
        validate_every: put every n-th photograph aside for validation; 0 for none, 1 for all.
        labels: the folder has one folder for each class, or ``labels.csv``, or for segmentation ``images`` and
            ``labels``, or it is one of COCO's photographs; and the labels may be used, which only a task term ``ce``
            does.
        limit: use at most so many photographs, spread evenly over the folder; None for all. Features are kept on disk,
            so this bounds the room they take.
    """

    folder: str
    views: Annotated[int, Field(ge=1, le=1000)] = 1
    share: Annotated[float, Field(gt=0)] = 1.0
    validate_every: Annotated[int, Field(ge=0)] = 0
    labels: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None


class TaskTerm(Strict):
    """One summand of the task term: how far the student is from where it should be.

    Attributes:
        kind: ``mae`` or ``mse`` between the features of teacher and student at `layer`; ``kl``, the divergence of the
            student's class probabilities from the teacher's; ``ce``, cross-entropy with the labels.
        layer: name of a stage after the split point, for ``mae`` and ``mse``; None for the last.
        weight: of this summand.
        rare: for ``kl`` and ``ce``: what has a class with share p of the batch counts ``1 / ln(rare + p)`` times,
            relative to the rest: the nearer to 1, the more rare classes count, as in mean IoU. None for all alike.
    """

    kind: Literal["mae", "mse", "kl", "ce"]
    layer: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    rare: Annotated[float, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rare is not None and self.kind in ("mae", "mse"):
            raise ValueError(f"{self.kind} compares features, which have no classes; rare is for kl and ce")
        if self.layer is not None and self.kind in ("kl", "ce"):
            raise ValueError(f"{self.kind} compares the network's outputs and takes no layer, got {self.layer!r}")
        return self


class TrainingRecipe(Strict):
    """How a unit is trained.

    Attributes:
        steps: updates in the first stage, with the point's `rate` term.
        finish_steps: updates in the last stage, whose rate term is the factorized model that will code the symbols.
        batch: features in an update.
        learning_rate: Adam's, at its height, for the unit.
        encoder_learning_rate: likewise for its encoder, where that is to move less; None for the same.
        rate_learning_rate: likewise for the rate term, which has to follow the unit.
        warmup_steps: over which the rates rise; then they fall along a cosine.
        mix: share of the features that are mixtures of two, for variety.
        mirror: mirror half of the batches; not where the network's answer has a place and left differs from right.
        ema: decay of the running mean of the weights, which is what is kept.
        precision: of the arithmetic in the frozen tail and in the unit's layers at the feature's size; those at the
            latent and the rate term stay in float32. bfloat16 is faster where the processor, or the GPU, has it.
        seed: of everything random.
    """

    steps: Annotated[int, Field(ge=0)] = 3000
    finish_steps: Annotated[int, Field(ge=0)] = 1500
    batch: Annotated[int, Field(ge=2)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    encoder_learning_rate: Annotated[float, Field(gt=0)] | None = None
    rate_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    mix: Annotated[float, Field(ge=0, le=1)] = 0.3
    mirror: bool = True
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0


Group = tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]]
"""Rows and columns of windows that are coded together."""


class PointRecipe(Strict):
    """One operating point.

    The loss is eq. (2) of the paper, ``bits + lambda * task``, with bits per image and the task term a mean. lambda
    multiplies the TASK term.

    Attributes:
        id: of the operating point.
        split: split point of the backbone.
        stride: S.
        channels: Cr when training begins; channels that end with every symbol zero are removed. A point that starts
            from another one takes over that one's; a nested one has at most those of its group of windows.
        step: quantizer step Q, in the latent's unit.
        lambda_: weight of the task term, key ``lambda``.
        target_bytes: where given, lambda is only where training begins; it is then moved until the estimated rate is
            this many bytes per image.
        kernel: K of the depthwise layers; None for the smallest that covers the stride.
        topology: of the unit; see `bitneck_models.units.topologies`.
        filters: D, depthwise filters a channel; see `bitneck_models.units.unit.BottleneckUnit`.
        hidden: H, channels between the layers, where the topology has any; a nested unit that starts from a separable
            one takes over its latent channels.
        group: (G1, G2), rows and columns of windows that a nested unit codes together.
        freeze: leave the encoder's layers before its last one as they begin.
        rate: rate term of the first stage.
        task: summands of the task term.
        steps: in place of the recipe's own; likewise `finish_steps`, `batch`, `learning_rate`, `encoder_learning_rate`,
            `ema`.
        curve: the curve that the point belongs to in a report; empty for the split point's own.
        ship: whether the point goes into the bundle; else it is only there for others to start from.
        init: ``task`` or ``principal`` for a linear start, ``next`` for a copy of the network's next layer (see
            `bitneck_models.units.starts`), ``random``, or the id of another point of the recipe, trained before.
    """

    id: Id
    split: Id
    stride: Annotated[int, Field(ge=1, le=64)]
    channels: Annotated[int, Field(ge=1, le=4096)]
    step: Annotated[float, Field(gt=0)]
    lambda_: Annotated[float, Field(gt=0, alias="lambda")]
    target_bytes: Annotated[float, Field(gt=0)] | None = None
    kernel: Annotated[int, Field(ge=1, le=65)] | None = None
    topology: Topology = "separable"
    filters: Annotated[int, Field(ge=1, le=64)] = 1
    hidden: Annotated[int, Field(ge=1, le=16384)] | None = None
    group: Group = (1, 1)
    freeze: bool = False
    rate: RateKind = "hyperprior"
    task: Annotated[tuple[TaskTerm, ...], Field(min_length=1)] = (TaskTerm(kind="mae"),)
    steps: Annotated[int, Field(ge=0)] | None = None
    finish_steps: Annotated[int, Field(ge=0)] | None = None
    batch: Annotated[int, Field(ge=2)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    encoder_learning_rate: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    curve: str = ""
    ship: bool = True
    init: str = "task"


class Recipe(Strict):
    """A zoo entry: the backbone, the photographs, and the operating points to train.

    Attributes:
        name: of the bundle.
        backbone: a name, a network's recipe as a table, or the file of one beside this recipe, which ends in ``.toml``.
        data: where the photographs are.
        training: the schedule.
        points: in the order of training.
    """

    name: Id
    backbone: Id | NetworkRecipe
    data: Annotated[tuple[Source, ...], Field(min_length=1)]
    training: TrainingRecipe = TrainingRecipe()
    points: Annotated[tuple[PointRecipe, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids: set[str] = set()
        for point in self.points:
            if point.id in ids:
                raise ValueError(f"two points have the id {point.id}")
            if point.init not in {"task", "principal", "next", "random"} | ids:
                raise ValueError(f"point {point.id}: init {point.init!r} is no method and no point listed before it")
            ids.add(point.id)
        return self

    def training_of(self, point: PointRecipe) -> TrainingRecipe:
        """How one point is trained: the recipe's schedule with what the point sets itself."""
        keys = ("steps", "finish_steps", "batch", "learning_rate", "encoder_learning_rate", "ema")
        own = {key: getattr(point, key) for key in keys}
        return self.training.model_copy(update={key: value for key, value in own.items() if value is not None})

    def point(self, point_id: str) -> PointRecipe:
        """The recipe of one point.

        Raises:
            InvalidConfig: there is none; the message lists them.
        """
        for point in self.points:
            if point.id == point_id:
                return point
        raise InvalidConfig(f"the recipe has no point {point_id!r}; it has: {', '.join(p.id for p in self.points)}")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file, or a folder with ``recipe.toml``.

    Raises:
        InvalidConfig: no such file, not TOML, an unknown key or a value out of range; the message names it.
    """
    path = path / "recipe.toml" if path.is_dir() else path
    values = load_toml(path, "recipe")
    if isinstance(network := values.get("backbone"), str) and network.endswith(".toml"):
        values["backbone"] = load_network(path.parent / network)
    return validated(Recipe, values, path, "recipe")
