"""From a recipe to trained points: features, initialization, training, tables, validation."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import bitneck
from bitneck.errors import InvalidConfig
from bitneck.symbols import dequantize, quantize
from bitneck.tables import FactorizedModel
from bitneck_models.backbones import Backbone
from bitneck_models.features import FeatureSpec, cached_features
from bitneck_models.photos import labelled_photos, split_off_validation, unlabelled_photos
from bitneck_models.recipe import PointRecipe, Recipe
from bitneck_models.scalars import Scalars
from bitneck_models.starts import init_linear, init_next
from bitneck_models.tasks import NO_LABEL
from bitneck_models.training import StepReport, train_unit
from bitneck_models.units import BottleneckUnit, prune_channels
from bitneck_models.zoo import PointRecord, ZooEntry, new_unit, round_weights

__all__ = [
    "PhotoSets",
    "Validation",
    "choose_device",
    "photo_sets",
    "prune_and_fit",
    "symbols_of",
    "train_point",
    "validate",
]

_INIT_FEATURES = 4000
_TABLE_FEATURES = 12000
_CHUNK = 100
_ALIVE = 0.02
"""A channel stays if more than this share of its symbols is not zero."""


@dataclass(frozen=True, slots=True)
class PhotoSets:
    """What a recipe trains on.

    Attributes:
        train: files with their number of views.
        validation: the files put aside.
        weights: probability of each view to be drawn, (M,).
        labels: class of each view, (M,) int64; -1 where the recipe gives none.
    """

    train: tuple[tuple[Path, int], ...]
    validation: tuple[Path, ...]
    weights: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Validation:
    """A unit on the photographs put aside: ideal code length of its tables, and agreement with the teacher."""

    payload_bytes: float
    agreement: float


def photo_sets(recipe: Recipe, data: Path, backbone: Backbone) -> PhotoSets:
    """Find a recipe's photographs.

    Args:
        recipe: names folders.
        data: the folder that they lie in.
        backbone: knows the classes.

    Raises:
        ImageError: a folder that does not exist or is empty.
        InvalidConfig: no photograph is put aside for validation, or a folder that has no labels is said to have some.
    """
    train: list[tuple[Path, int]] = []
    validation: list[Path] = []
    weights: list[NDArray[np.float64]] = []
    labels: list[NDArray[np.int64]] = []
    for source in recipe.data:
        photos = unlabelled_photos([data / source.folder])
        known: dict[Path, int] = {}
        if source.labels:
            known = {p.path: p.label for p in labelled_photos(data / source.folder, backbone.wnids, backbone.labels)}
        if source.validate_every:
            photos, held = split_off_validation(photos, source.validate_every)
            validation += held
        train += [(photo, source.views) for photo in photos]
        count = len(photos) * source.views
        weights.append(np.full(count, source.share / count))
        labels.append(np.repeat([known.get(photo, NO_LABEL) for photo in photos], source.views).astype(np.int64))
    if not validation:
        raise InvalidConfig("the recipe puts no photograph aside: give one of its sources validate_every")
    together = np.concatenate(weights)
    return PhotoSets(tuple(train), tuple(validation), together / together.sum(), np.concatenate(labels))


def choose_device(name: str) -> str:
    """The device that a name stands for.

    Args:
        name: as torch names it, or ``auto`` for a GPU where there is one.

    Raises:
        InvalidConfig: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise InvalidConfig(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from exc
    return name


def train_point(
    entry: ZooEntry,
    point: PointRecipe,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    device: str = "cpu",
    on_features: Callable[[int, int], None] = lambda _done, _all: None,
    on_step: Callable[[StepReport], None] = lambda _report: None,
) -> PointRecord:
    """Train one point and save it in the zoo entry; cut off and started again, it goes on where it stopped.

    Args:
        entry: where the result goes, and where a point to start from is.
        point: what to train.
        backbone: the frozen network.
        sets: see `photo_sets`.
        runs: for feature caches, checkpoints and TensorBoard's scalars; large.
        device: where the unit is trained, as torch names it.
        on_features: progress of the features, (done, all).
        on_step: progress of the training.
    """
    training = entry.recipe.training_of(point)
    if any(term.kind == "ce" for term in point.task) and not (sets.labels != NO_LABEL).any():
        raise InvalidConfig(
            f"{point.id} has a task term `ce`, and no photograph has a label: set `labels = true` at a source whose "
            "folders are named by class"
        )
    features, held = split_features(backbone, point.split, sets, training.seed, runs, on_features)
    tail = backbone.tail(point.split)
    unit = initialized_unit(entry, point, backbone, features, sets.weights)
    last: list[StepReport] = []
    folder = runs / entry.recipe.name
    with Scalars(folder / "scalars" / point.id) as scalars:

        def report(step: StepReport) -> None:
            last.append(step)
            del last[:-200]
            scalars.add(step)
            on_step(step)

        train_unit(
            unit.to(device), tail.to(device), features, point, training,
            weights=sets.weights, labels=sets.labels, checkpoint=folder / f"{point.id}.pt", report=report,
        )  # fmt: skip
    unit, tail = unit.cpu(), tail.cpu()
    round_weights(unit)
    unit, tables = prune_and_fit(unit, point, table_features(features, sets))
    result = validate(unit, tail, point, tables, held)
    record = PointRecord(
        recipe=point.model_dump(by_alias=True),
        training=training.model_dump(),
        code_version=bitneck.__version__,
        torch_version=torch.__version__,
        train_features=len(features),
        validation_photos=len(held),
        lambda_final=last[-1].lambda_ if last else point.lambda_,
        estimated_bytes=float(np.mean([step.bits for step in last])) / 8 if last else 0.0,
        validation_bytes=result.payload_bytes,
        validation_agreement=result.agreement,
        trained=datetime.now(tz=UTC).date(),
    )
    entry.save(point, unit, tables, record)
    return record


def split_features(
    backbone: Backbone,
    split: str,
    sets: PhotoSets,
    seed: int,
    runs: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Features of the training views and of the photographs put aside, from their caches: (M, C, Hf, Wf) each."""
    train = FeatureSpec(split=split, photos=sets.train, augmented=True, seed=seed)
    held = FeatureSpec(split=split, photos=tuple((p, 1) for p in sets.validation), augmented=False, seed=seed)
    return (
        cached_features(backbone, train, runs / "cache", progress),
        cached_features(backbone, held, runs / "cache", progress),
    )


def table_features(features: NDArray[np.float16], sets: PhotoSets) -> NDArray[np.float16]:
    """A sample of the training features, the same each time, to fit tables on."""
    return features[_sample(sets.weights, _TABLE_FEATURES, seed=2)]


def initialized_unit(
    entry: ZooEntry,
    point: PointRecipe,
    backbone: Backbone,
    features: NDArray[np.float16],
    weights: NDArray[np.float64],
) -> BottleneckUnit:
    """A unit where the recipe's `init` says that training begins.

    Args:
        entry: has the trained point to start from, if that is what `init` names.
        point: the recipe of the unit.
        backbone: the frozen network.
        features: of the training views, (M, C, Hf, Wf).
        weights: probability of each to be drawn, (M,).

    Raises:
        InvalidConfig: the unit does not fit the backbone, or not the point to start from.
    """
    tail = backbone.tail(point.split)
    unit = new_unit(backbone, point)
    if point.init in ("task", "principal", "next"):
        rows = _sample(weights, _INIT_FEATURES, seed=1)
        f = torch.from_numpy(features[rows].astype(np.float32))
        if point.init == "next":
            init_next(unit, tail, f)
        else:
            init_linear(unit, tail, f, task_metric=point.init == "task")
    elif point.init != "random":
        source = entry.recipe.point(point.init)
        if _geometry(source) != _geometry(point):
            raise InvalidConfig(
                f"{point.id} cannot start from {source.id}: split, stride, kernel, filters, topology or hidden differ"
            )
        unit = entry.unit(backbone, source).requires_grad_()
    return unit


def _geometry(point: PointRecipe) -> tuple[object, ...]:
    return point.split, point.stride, point.kernel, point.filters, point.topology, point.hidden


def symbols_of(
    unit: BottleneckUnit, features: NDArray[np.float16], step: float, tables: FactorizedModel | None = None
) -> NDArray[np.int32]:
    """Symbols of features.

    Args:
        unit: in evaluation mode.
        features: (M, C, Hf, Wf) float16.
        step: Q.
        tables: clip to these; None to round only.

    Returns:
        (M, Cr, h, w) int32.
    """
    parts = []
    for start in range(0, len(features), _CHUNK):
        f = torch.from_numpy(features[start : start + _CHUNK].astype(np.float32))
        with torch.no_grad():
            y = unit.encoder(f).numpy()
        if tables is None:
            parts.append(np.rint(y / np.float32(step)).astype(np.int32))
        else:
            parts.append(np.stack([quantize(one, step, tables.lo, tables.hi) for one in y]))
    return np.concatenate(parts)


def prune_and_fit(
    unit: BottleneckUnit, point: PointRecipe, features: NDArray[np.float16]
) -> tuple[BottleneckUnit, FactorizedModel]:
    """Remove the channels whose symbols are hardly ever anything but zero, and fit the factorized model to the rest.

    Args:
        unit: trained.
        point: gives the step.
        features: training photographs', (M, C, Hf, Wf) float16.

    Raises:
        InvalidConfig: every symbol is zero.
    """
    symbols = symbols_of(unit, features, point.step)
    alive = np.flatnonzero((symbols != 0).mean(axis=(0, 2, 3)) > _ALIVE)
    small = prune_channels(unit, torch.from_numpy(alive))
    return small, FactorizedModel.fit(symbols[:, alive])


def validate(
    unit: BottleneckUnit, tail: nn.Module, point: PointRecipe, tables: FactorizedModel, features: NDArray[np.float16]
) -> Validation:
    """Rate and agreement on features that were not trained on.

    Args:
        unit: in evaluation mode.
        tail: the network after the split point.
        point: gives the step.
        tables: of the unit.
        features: (M, C, Hf, Wf) float16.
    """
    symbols = symbols_of(unit, features, point.step, tables)
    bits = [tables.ideal_bits(s) for s in symbols]
    agree = 0
    for start in range(0, len(features), _CHUNK):
        f = torch.from_numpy(features[start : start + _CHUNK].astype(np.float32))
        y_hat = torch.from_numpy(dequantize(symbols[start : start + _CHUNK], point.step))
        with torch.no_grad():
            agree += int((tail(unit.decoder(y_hat)).argmax(1) == tail(f).argmax(1)).sum())
    return Validation(payload_bytes=float(np.mean(bits)) / 8, agreement=agree / len(features))


def _sample(weights: NDArray[np.float64], size: int, seed: int) -> NDArray[np.intp]:
    count = len(weights)
    return np.sort(np.random.default_rng(seed).choice(count, min(count, size), replace=False, p=weights))
