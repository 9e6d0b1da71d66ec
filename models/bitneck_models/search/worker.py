"""A worker of a search: it trains a unit for each trial, and ends hopeless trials early."""

import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig, ModelFailure
from bitneck_models.data.features import cached_features
from bitneck_models.networks.backbone import Backbone
from bitneck_models.search.space import SearchSpace
from bitneck_models.training.given import Given, given_to
from bitneck_models.training.photo_sets import PhotoSets, feature_specs, table_features
from bitneck_models.training.point import point_record, unit_record
from bitneck_models.training.start import initialized_unit
from bitneck_models.training.tables import prune_and_fit
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.training.validation import Validation, validate
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import new_unit, round_weights, save_point, save_unit
from bitneck_models.zoo.recipe import UnitRecipe

__all__ = ["is_hopeless", "prepare", "work"]

_MAX_FAILURES = 8
_READERS = 2
"""Processes of a worker that read photographs, where the space streams them."""
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


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
    """Run trials until the study has enough of them, whichever worker ran them.

    Args:
        study: see `bitneck_models.search.study.open_study`.
        space: what is sampled.
        entry: its recipe names the photographs.
        backbone: the frozen network.
        sets: see `bitneck_models.training.photo_sets`.
        runs: folder for caches, checkpoints and trained units.
        trials: number of trials of the whole study, pruned ones included.
        device: where units are trained.
        on_trial: called after each trial.

    Raises:
        ModelFailure: several trials in a row failed. A single failure does not end the search.
    """
    held, given = prepare(space, backbone, sets, runs, device=device)
    tables = table_features(given.sample, given.sample_weights)

    def measured(unit: BottleneckUnit, point: UnitRecipe) -> tuple[BottleneckUnit, FactorizedModel, Validation]:
        small, model = prune_and_fit(unit, point, tables)
        return small, model, validate(small, backbone.tail(space.split), point.step, model, held)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        point = space.point(trial)
        folder = runs / "search" / space.name / point.id
        checkpoint = folder / "run.pt"
        checkpoint.unlink(missing_ok=True)
        trial.set_user_attr("recipe", json.loads(point.model_dump_json(by_alias=True)))
        unit = initialized_unit(entry, point, backbone, given.sample, given.sample_weights)
        steps: list[StepReport] = []
        tail = backbone.tail(space.split)

        def train(stop_after: int | None) -> None:
            train_unit(
                unit.to(device), tail.to(device), given.features, point, space.training,
                weights=given.weights, labels=given.labels, checkpoint=checkpoint, report=steps.append,
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
                if is_hopeless((early.payload_bytes, early.agreement), others, len(held)):
                    raise optuna.TrialPruned
            train(None)
            round_weights(unit)
            small, model, result = measured(unit, point)
        except (ModelFailure, InvalidConfig) as exc:
            trial.set_user_attr("failure", str(exc))
            raise
        finally:
            checkpoint.unlink(missing_ok=True)
        save_unit(folder, small, unit_record(point, space.training, steps, given.views))
        save_point(folder, model, point_record(point, point.step, len(held), result))
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
        raise ModelFailure(
            f"{_MAX_FAILURES} trials in a row failed, the last because: {failures[-1]}; change the space"
        )


def prepare(
    space: SearchSpace,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    *,
    device: str = "cpu",
) -> tuple[NDArray[np.float16], Given]:
    """Compute what is missing in the caches of a search.

    Args:
        space: gives the split point and the schedule.
        backbone: the frozen network.
        sets: see `bitneck_models.training.photo_sets`.
        runs: folder of the caches.
        progress: of one cache after the other, (done, all).
        device: where a stream's head runs.

    Returns:
        Features of the photographs put aside, and what units are trained on.
    """
    held_out = feature_specs(space.split, sets, space.training.seed)[1]
    held = cached_features(backbone, held_out, runs / "cache", progress)
    return held, given_to(
        space, backbone, sets, space.training, runs, device=device, workers=_READERS, progress=progress
    )


def _copy(unit: BottleneckUnit, backbone: Backbone, point: UnitRecipe) -> BottleneckUnit:
    copy = new_unit(backbone, point)
    copy.load_state_dict(unit.state_dict())
    return copy.eval()


def is_hopeless(own: tuple[float, float], others: Sequence[tuple[float, ...]], photos: int) -> bool:
    """Whether another trial, at the same step, had no more bytes and clearly more agreement.

    Args:
        own: bytes and agreement.
        others: bytes and agreement of other trials.
        photos: number of photographs that agreement was measured on; two standard errors count as clear.
    """
    payload, agreement = own
    margin = 2 * math.sqrt(max(agreement * (1 - agreement), 1e-4) / photos)
    return any(other[0] <= payload and other[1] >= agreement + margin for other in others)
