"""The space of a search: which operating points its trials try, from a TOML file."""

from pathlib import Path
from typing import Annotated, Self

import optuna
from pydantic import Field, model_validator

from bitneck_models.networks.backbone import Backbone
from bitneck_models.typed_files import Id, Positive, load_toml, validated
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import STARTS, Channels, Stride, TrainingRecipe, UnitKind, UnitRecipe

__all__ = ["SearchSpace", "load_space"]

Range = tuple[Positive, Positive]


class SearchSpace(UnitKind):
    """What is sampled, and, from `UnitKind`, what all trials have in common.

    Attributes:
        name: name of the study.
        stride: values of S to choose from.
        channels: values of Cr to choose from.
        lambda_: smallest and largest weight of the task term, key ``lambda``; sampled on a logarithmic scale.
        step: smallest and largest Q; sampled on a logarithmic scale.
        init: see `UnitKind`; not another point.
        training: the schedule of a trial.
        prune_after: share of the first stage's steps after which a hopeless trial ends; 1 for never.
    """

    name: Id
    stride: Annotated[tuple[Stride, ...], Field(min_length=1)]
    channels: Annotated[tuple[Channels, ...], Field(min_length=1)]
    lambda_: Annotated[Range, Field(alias="lambda")]
    step: Range
    init: str = "principal"
    training: TrainingRecipe = TrainingRecipe()
    prune_after: Annotated[float, Field(gt=0, le=1)] = 0.3

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, (low, high) in (("lambda", self.lambda_), ("step", self.step)):
            if low > high:
                raise ValueError(f"{name}: the smallest value {low} is above the largest {high}")
        if self.init not in STARTS:
            raise ValueError(f"init: {self.init!r} is no method; use {', '.join(STARTS[:-1])} or {STARTS[-1]}")
        return self

    def point(self, trial: optuna.Trial) -> UnitRecipe:
        """Sample the operating point of a trial."""
        return UnitRecipe(
            id=f"{self.split}-t{trial.number:04d}",
            stride=trial.suggest_categorical("stride", self.stride),
            channels=trial.suggest_categorical("channels", self.channels),
            lambda_=trial.suggest_float("lambda", *self.lambda_, log=True),
            step=trial.suggest_float("step", *self.step, log=True),
            **self.model_dump(include=set(UnitKind.model_fields)),
        )

    def check(self, backbone: Backbone) -> None:
        """Refuse a space with a unit that does not fit the backbone, before anything is trained.

        Raises:
            InvalidConfig: the first such unit.
        """
        shape = backbone.feature_shape(self.split)
        for stride in self.stride:
            for channels in self.channels:
                BottleneckUnit(
                    shape, channels, stride, None, self.filters, self.topology, self.hidden, group=self.group,
                    pool=self.pool, decoder_blocks=self.decoder_blocks,
                )  # fmt: skip
                if self.topology == "nested":  # it starts as this one
                    BottleneckUnit(shape, self.hidden or channels, stride, None, self.filters)


def load_space(path: Path) -> SearchSpace:
    """Read a search space.

    Raises:
        InvalidConfig: there is no such file, it is not TOML, or it has an unknown key or a value out of range, which
            the message names.
    """
    return validated(SearchSpace, load_toml(path, "search space"), path, "space")
