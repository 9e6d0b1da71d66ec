"""The search for operating points: Optuna over (S, Cr, lambda, Q), for few bytes and for much agreement at once.

    space.toml --sample--> PointRecipe --train a little--> hopeless? prune : train on --> (bpp, agreement)
    front of all trials --pick_ladder--> operating points of a zoo entry

Paper, section 3.4 and Table 1. Trials live in an Optuna storage, so a search goes on where it stopped, and any number
of workers on any number of machines share one: SQLite for processes of one machine, PostgreSQL or MySQL for several.
Both values are measured on the photographs put aside for validation, never on an evaluation set.
"""

import json
import math
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

import optuna
import tomli_w
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, model_validator

import bitneck
from bitneck.errors import BitneckError, InvalidConfig, ModelFailure
from bitneck.ids import ID_PATTERN
from bitneck_models.losses.rate_terms import RateKind
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.pipeline import (
    PhotoSets,
    Validation,
    initialized_unit,
    prune_and_fit,
    split_features,
    table_features,
    validate,
)
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.typed_files import load_toml, validated
from bitneck_models.units.topologies import Topology
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import PointRecord, ZooEntry, new_unit, round_weights, save_point
from bitneck_models.zoo.recipe import Group, PointRecipe, TaskTerm, TrainingRecipe

__all__ = [
    "Found",
    "SearchSpace",
    "adopt",
    "describe",
    "front",
    "is_hopeless",
    "load_space",
    "open_study",
    "pick_ladder",
    "work",
]

_HEARTBEAT_S = 30
_MAX_FAILURES = 8
_SHOWN = {"S": "stride", "Cr": "channels", "lambda": "lambda", "Q": "step"}
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Id = Annotated[str, Field(pattern=ID_PATTERN)]


class SearchSpace(BaseModel):
    """What is sampled, and what all trials share. Refuses unknown keys.

    Attributes:
        name: of the study.
        split: split point.
        stride: values of S to choose from.
        channels: values of Cr to choose from.
        lambda_: smallest and largest weight of the task term, key ``lambda``; sampled on a logarithmic scale.
        step: smallest and largest Q; likewise.
        topology, filters, hidden, group, rate, task, init, freeze: see `bitneck_models.zoo.recipe.PointRecipe`;
            ``init`` cannot be another point.
        training: the schedule of a trial.
        prune_after: share of the first stage's steps after which a hopeless trial ends; 1 for never.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    name: Id
    split: Id
    stride: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)]
    channels: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1)]
    lambda_: Annotated[Range, Field(alias="lambda")]
    step: Range
    topology: Topology = "separable"
    filters: Annotated[int, Field(ge=1, le=64)] = 1
    hidden: Annotated[int, Field(ge=1, le=16384)] | None = None
    group: Group = (1, 1)
    rate: RateKind = "hyperprior"
    task: Annotated[tuple[TaskTerm, ...], Field(min_length=1)] = (TaskTerm(kind="mae"),)
    init: str = "principal"
    freeze: bool = False
    training: TrainingRecipe = TrainingRecipe()
    prune_after: Annotated[float, Field(gt=0, le=1)] = 0.3

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, (low, high) in (("lambda", self.lambda_), ("step", self.step)):
            if low > high:
                raise ValueError(f"{name}: the smallest value {low} is above the largest {high}")
        if self.topology == "nested" and self.init == "next":
            raise ValueError("init: a nested unit begins as a separable one; use task, principal or random")
        if self.init not in ("task", "principal", "next", "random"):
            raise ValueError(f"init: {self.init!r} is no method; use task, principal, next or random")
        return self

    def point(self, trial: optuna.Trial) -> PointRecipe:
        """The operating point that a trial stands for."""
        shared = self.model_dump(
            include={"split", "topology", "filters", "hidden", "group", "rate", "task", "init", "freeze"}
        )
        return PointRecipe(
            id=f"{self.split}-t{trial.number:04d}",
            stride=trial.suggest_categorical("stride", self.stride),
            channels=trial.suggest_categorical("channels", self.channels),
            lambda_=trial.suggest_float("lambda", *self.lambda_, log=True),
            step=trial.suggest_float("step", *self.step, log=True),
            **shared,
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
                    shape, channels, stride, None, self.filters, self.topology, self.hidden, group=self.group
                )
                if self.topology == "nested":  # which begins as this one
                    BottleneckUnit(shape, self.hidden or channels, stride, None, self.filters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A trial on the front.

    Attributes:
        number: of the trial.
        payload_bytes: ideal code length on the validation photographs, mean.
        bpp: the same in bits per input pixel.
        agreement: with the teacher on the validation photographs.
        folder: of the trained unit, on the machine that trained it.
        machine: its name.
        recipe: of the point.
        training: its schedule.
    """

    number: int
    payload_bytes: float
    bpp: float
    agreement: float
    folder: Path
    machine: str
    recipe: dict[str, Any]
    training: dict[str, Any]


def load_space(path: Path) -> SearchSpace:
    """Read a search space.

    Raises:
        InvalidConfig: no such file, not TOML, an unknown key or a value out of range; the message names it.
    """
    return validated(SearchSpace, load_toml(path, "search space"), path, "space")


def open_study(space: SearchSpace, storage: str, *, create: bool = True) -> optuna.Study:
    """The study of a space, made where there is none yet.

    A worker that dies leaves its trial running; once its heartbeat has been missing for a while another worker marks
    it as failed, and the search goes on.

    Args:
        space: gives the study's name; the space that a study began with is the one it keeps.
        storage: an SQLAlchemy URL.
        create: make the study where there is none.

    Raises:
        InvalidConfig: the storage cannot be used, holds the study with another space, or does not hold it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats have been so for years
            rdb = RDBStorage(storage, engine_kwargs=engine, heartbeat_interval=_HEARTBEAT_S)
        if create:
            study = optuna.create_study(
                storage=rdb,
                study_name=space.name,
                directions=["minimize", "maximize"],
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(constant_liar=True),
            )
        else:
            try:
                study = optuna.load_study(storage=rdb, study_name=space.name)
            except KeyError as exc:
                raise InvalidConfig(
                    f"{storage} has no study {space.name!r} yet; run `bitneck-models search` with this space first"
                ) from exc
        own = space.model_dump_json(by_alias=True)
        if SearchSpace.model_validate_json(study.user_attrs.get("space", own)) != space:
            raise InvalidConfig(
                f"{storage} holds the study {space.name!r} with another search space: rename it, or restore its space"
            )
        study.set_user_attr("space", own)
    except BitneckError:
        raise
    except Exception as exc:  # SQLAlchemy, its drivers and Optuna each have their own
        reason = str(exc).splitlines()[0]
        raise InvalidConfig(f"{storage}: the storage cannot be used ({type(exc).__name__}: {reason})") from exc
    return study


def work(
    study: optuna.Study,
    space: SearchSpace,
    entry: ZooEntry,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    trials: int,
    device: str = "cpu",
    on_trial: Callable[[FrozenTrial], None] = lambda _trial: None,
) -> None:
    """Run trials until the study has enough of them, whoever ran them.

    Args:
        study: see `open_study`.
        space: what is sampled.
        entry: its recipe names the photographs.
        backbone: the frozen network.
        sets: see `bitneck_models.training.pipeline.photo_sets`.
        runs: for caches, checkpoints and trained units.
        trials: of the whole study, those that were pruned included.
        device: where units are trained.
        on_trial: called after each trial.

    Raises:
        ModelFailure: several trials in a row failed, each of which alone does not end the search.
    """
    features = split_features(backbone, space.split, sets, space.training.seed, runs)
    tables = table_features(features[0], sets)

    def measured(unit: BottleneckUnit, point: PointRecipe) -> tuple[Any, ...]:
        small, model = prune_and_fit(unit, point, tables)
        return small, model, validate(small, backbone.tail(space.split), point, model, features[1])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        point = space.point(trial)
        folder = runs / "search" / space.name / point.id
        checkpoint = folder / "run.pt"
        checkpoint.unlink(missing_ok=True)
        trial.set_user_attr("recipe", json.loads(point.model_dump_json(by_alias=True)))
        unit = initialized_unit(entry, point, backbone, features[0], sets.weights)
        last: list[StepReport] = []
        tail = backbone.tail(space.split)

        def train(stop_after: int | None) -> None:
            train_unit(
                unit.to(device), tail.to(device), features[0], point, space.training,
                weights=sets.weights, labels=sets.labels, checkpoint=checkpoint, report=last.append,
                stop_after=stop_after,
            )  # fmt: skip
            unit.cpu()
            tail.cpu()

        try:
            rung = round(space.prune_after * space.training.steps)
            if 0 < rung < space.training.steps:
                train(rung)
                early = measured(_copy(unit, backbone, point), point)[2]
                trial.set_user_attr("early", [early.payload_bytes, early.agreement])
                others = [
                    tuple(t.user_attrs["early"]) for t in study.get_trials(states=_ENDED) if "early" in t.user_attrs
                ]
                if is_hopeless((early.payload_bytes, early.agreement), others, len(features[1])):
                    raise optuna.TrialPruned
            train(None)
            round_weights(unit)
            small, model, result = measured(unit, point)
        except (ModelFailure, InvalidConfig) as exc:
            trial.set_user_attr("failure", str(exc))
            raise
        finally:
            checkpoint.unlink(missing_ok=True)
        save_point(
            folder, small, model, _record(point, space.training, last, len(features[0]), len(features[1]), result)
        )
        trial.set_user_attr("bytes", result.payload_bytes)
        trial.set_user_attr("folder", str(folder.resolve()))
        trial.set_user_attr("machine", platform.node())
        return result.payload_bytes * 8 / backbone.input.pixels, result.agreement

    failures: list[str] = []

    def after(_study: optuna.Study, trial: FrozenTrial) -> None:
        on_trial(trial)
        failures.append(trial.user_attrs.get("failure", "")) if trial.state == TrialState.FAIL else failures.clear()
        if len(failures) == _MAX_FAILURES:
            study.stop()

    study.optimize(
        objective,
        callbacks=[optuna.study.MaxTrialsCallback(trials, states=_ENDED), after],
        catch=(ModelFailure, InvalidConfig),
        n_trials=None if len(study.get_trials(states=_ENDED)) < trials else 0,
    )
    if len(failures) == _MAX_FAILURES:
        raise ModelFailure(f"{_MAX_FAILURES} trials in a row failed, the last because: {failures[-1]}; mend the space")


def _copy(unit: BottleneckUnit, backbone: Backbone, point: PointRecipe) -> BottleneckUnit:
    copy = new_unit(backbone, point)
    copy.load_state_dict(unit.state_dict())
    return copy.eval()


def _record(
    point: PointRecipe, training: TrainingRecipe, steps: Sequence[StepReport], views: int, held: int, result: Validation
) -> PointRecord:
    last = steps[-200:]
    return PointRecord(
        recipe=json.loads(point.model_dump_json(by_alias=True)),
        training=training.model_dump(),
        code_version=bitneck.__version__,
        torch_version=torch.__version__,
        train_features=views,
        validation_photos=held,
        lambda_final=last[-1].lambda_ if last else point.lambda_,
        estimated_bytes=sum(step.bits for step in last) / max(1, len(last)) / 8,
        validation_bytes=result.payload_bytes,
        validation_agreement=result.agreement,
        trained=datetime.now(tz=UTC).date(),
    )


def is_hopeless(own: tuple[float, float], others: Sequence[tuple[float, ...]], photos: int) -> bool:
    """Whether another trial had at the same stage no more bytes and clearly more agreement.

    Args:
        own: bytes and agreement.
        others: of other trials.
        photos: that agreement was measured on; two standard errors count as clear.
    """
    payload, agreement = own
    margin = 2 * math.sqrt(max(agreement * (1 - agreement), 1e-4) / photos)
    return any(other[0] <= payload and other[1] >= agreement + margin for other in others)


def front(study: optuna.Study) -> list[Found]:
    """The trials that no other beats in both values, in order of rate."""
    found = [
        Found(
            number=t.number,
            payload_bytes=t.user_attrs["bytes"],
            bpp=t.values[0],
            agreement=t.values[1],
            folder=Path(t.user_attrs["folder"]),
            machine=t.user_attrs["machine"],
            recipe=t.user_attrs["recipe"],
            training=json.loads(study.user_attrs["space"])["training"],
        )
        for t in study.best_trials
    ]
    return sorted(found, key=lambda f: (f.bpp, -f.agreement))


def describe(trial: FrozenTrial) -> str:
    """One line about a trial that has ended."""
    recipe = trial.user_attrs.get("recipe", {})
    what = ", ".join(f"{name} {recipe[key]:.4g}" for name, key in _SHOWN.items() if key in recipe)
    if trial.values is not None:
        return f"trial {trial.number}: {trial.user_attrs['bytes']:.1f} bytes, agreement {trial.values[1]:.3f} ({what})"
    return f"trial {trial.number}: {trial.state.name.lower()} {trial.user_attrs.get('failure', '')} ({what})"


def adopt(entry: ZooEntry, found: Sequence[Found], names: Sequence[str]) -> None:
    """Copy trained units into a zoo entry and append their points to its recipe.

    Args:
        entry: the zoo entry.
        found: what to copy.
        names: the new operating points' ids.

    Raises:
        InvalidConfig: an id is taken, or a unit lies on another machine.
    """
    taken = {point.id for point in entry.recipe.points} & set(names)
    if taken:
        raise InvalidConfig(f"{entry.folder} has {', '.join(sorted(taken))} already: choose another --prefix")
    for f in found:
        if not (f.folder / "unit.safetensors").is_file():
            raise InvalidConfig(
                f"the unit of trial {f.number} is not at {f.folder}: {f.machine} trained it; copy that folder here, or "
                "give all workers a --runs that they share"
            )
    blocks = []
    for f, name in zip(found, names, strict=True):
        keys = ("steps", "finish_steps", "batch", "learning_rate", "encoder_learning_rate")
        schedule = {key: f.training[key] for key in keys}
        merged = f.recipe | schedule | {"id": name}
        point = {key: _plain(value) for key, value in merged.items() if value is not None}
        shutil.copytree(f.folder, entry.point_folder(name))
        record = PointRecord.model_validate_json((entry.point_folder(name) / "record.json").read_bytes())
        own = record.model_copy(update={"recipe": record.recipe | schedule | {"id": name}})
        (entry.point_folder(name) / "record.json").write_text(own.model_dump_json(indent=1) + "\n")
        blocks.append(tomli_w.dumps({"points": [point]}))
    path = entry.folder / "recipe.toml"
    text = path.read_text(encoding="utf-8").rstrip() + "\n\n" + "\n".join(blocks)
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").rename(path)


def _plain(value: Any) -> Any:
    """A value as TOML can say it, which has no null."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def pick_ladder(points: Sequence[tuple[float, float]], count: int) -> list[int]:
    """Rungs from a front: the two ends, and between them those nearest to equal ratios of rate.

    Args:
        points: (rate, accuracy), both rising.
        count: of rungs, >= 1.

    Returns:
        Indices, rising; fewer than `count` where the front is shorter.

    Raises:
        InvalidConfig: an empty front, or a count below 1.
    """
    if not points:
        raise InvalidConfig("no trial has finished yet, so there is no front to pick from; go on with the search")
    if count < 1:
        raise InvalidConfig(f"{count} points cannot be picked; ask for one at least")
    if count == 1:
        return [len(points) - 1]
    if len(points) <= count:
        return list(range(len(points)))
    low, high = (math.log(points[i][0]) for i in (0, -1))
    picked = [0]
    for k in range(1, count - 1):
        target = low + (high - low) * k / (count - 1)
        first, last = picked[-1] + 1, len(points) - (count - k)  # leave enough for the others
        picked.append(min(range(first, last + 1), key=lambda i: abs(math.log(points[i][0]) - target)))
    return [*picked, len(points) - 1]
