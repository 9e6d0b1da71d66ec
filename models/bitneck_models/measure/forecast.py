"""What a unit's training will take, from a short trial on this machine: time, memory, disk."""

import copy
import resource
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from bitneck_models.data.features import FeatureSpec, cached_features
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.given import stream_sample
from bitneck_models.training.photo_sets import PhotoSets, feature_specs
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.zoo.point import new_unit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe

__all__ = ["Forecast", "forecast"]

_VIEWS = 32
_STEPS = 2
"""Of each stage; the first one of a stage warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What one unit will take.

    Attributes:
        unit: its id.
        views: features of the training views and of the photographs put aside, those in the cache included.
        missing: of these, features that are not in the cache yet.
        features_s: seconds to compute the missing ones.
        training_s: seconds of all updates; where views are streamed, with reading them one after the other.
        disk_bytes: of the missing features. The cache is kept below ``--runs``.
        memory_mib: peak of resident memory of the trial.
    """

    unit: str
    views: int
    missing: int
    features_s: float
    training_s: float
    disk_bytes: int
    memory_mib: float


def forecast(
    unit: UnitRecipe,
    training: TrainingRecipe,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    device: str = "cpu",
    known: Collection[tuple[str, int]] = (),
) -> Forecast:
    """Compute some features and make some updates, in a temporary folder.

    The trial starts from random weights, and the channels that the recipe begins with. Training removes some of them on
    its way, so it may become faster.

    Args:
        unit: the unit.
        training: its schedule.
        backbone: the frozen network.
        sets: the photographs.
        runs: folder of the caches.
        device: where the unit is trained.
        known: split points and seeds whose features an earlier forecast has counted as missing.

    Raises:
        InvalidConfig, ModelFailure: see `bitneck_models.training.unit.train_unit`.
        ImageError: a photograph cannot be read.
    """
    train, held = feature_specs(unit.split, sets, training.seed)
    specs = (stream_sample(unit.split, backbone, sets, training.seed) if training.stream else train, held)
    views = sum(count for spec in specs for _, count in spec.photos)
    missing = (
        0 if (unit.split, training.seed) in known else sum(_missing(spec, backbone, runs / "cache") for spec in specs)
    )
    with tempfile.TemporaryDirectory() as folder:
        trial = tuple((path, 1) for path, _ in sets.train[:_VIEWS])
        first, second = (FeatureSpec(split=unit.split, photos=trial, augmented=True, seed=seed) for seed in (1, 2))
        cached_features(backbone, first, Path(folder))  # exports the head
        begun = time.perf_counter()
        features = cached_features(backbone, second, Path(folder))
        each_s = (time.perf_counter() - begun) / len(features)
        training_s = _training_s(unit, training, backbone, np.array(features), device)
        if training.stream:
            training_s += (training.steps + training.finish_steps) * training.batch * each_s
    size = 2 * int(np.prod(backbone.feature_shape(unit.split)))
    return Forecast(
        unit=unit.id,
        views=views,
        missing=missing,
        features_s=missing * each_s,
        training_s=training_s,
        disk_bytes=missing * size,
        memory_mib=_peak_mib(),
    )


def _missing(spec: FeatureSpec, backbone: Backbone, cache: Path) -> int:
    """Views of a cache that are not computed yet."""
    views = sum(count for _, count in spec.photos)
    done = cache / f"{backbone.name}-{spec.split}-{spec.key(backbone)[:16]}" / "done.npy"
    return views - int(np.load(done).sum()) if done.is_file() else views


def _training_s(
    unit: UnitRecipe, training: TrainingRecipe, backbone: Backbone, features: NDArray[np.float16], device: str
) -> float:
    """Seconds of all updates, from the median of a few of each stage."""
    short = training.model_copy(update={"steps": _STEPS, "finish_steps": _STEPS, "warmup_steps": 0})
    rows = np.arange(max(training.batch, len(features))) % len(features)
    shape = (len(rows),) if backbone.task == "classification" else (
        len(rows), backbone.input.height, backbone.input.width
    )  # fmt: skip
    labels = np.zeros(shape, np.int64 if len(shape) == 1 else np.uint8)
    times = [time.perf_counter()]

    def report(_step: StepReport) -> None:
        times.append(time.perf_counter())

    alone = unit.model_copy(update={"init": "random", "target_bytes": None})
    train_unit(
        new_unit(backbone, alone).to(device), copy.deepcopy(backbone.tail(unit.split)).to(device), features[rows],
        alone, short, labels=labels, report=report,
    )  # fmt: skip
    spent = np.diff(times)
    first, last = (median(part) for part in (spent[1:_STEPS], spent[_STEPS + 1 :]))
    return float(training.steps * first + training.finish_steps * last)


def _peak_mib() -> float:
    """Peak of resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)
