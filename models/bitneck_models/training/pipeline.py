"""From a recipe to trained points: features, initialization, training, tables, validation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import bitneck
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.coding.symbols import dequantize, quantize
from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import confusion, mapped_photos, mean_iou
from bitneck_models.data.features import FeatureSpec, cached_features, view_maps
from bitneck_models.data.photos import labelled_photos, split_off_validation, unlabelled_photos
from bitneck_models.losses.task_terms import NO_LABEL
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.scalars import Scalars
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.units.prune import prune_channels
from bitneck_models.units.starts import init_linear, init_nested, init_next
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import PointRecord, ZooEntry, new_unit, round_weights
from bitneck_models.zoo.recipe import PointRecipe, Recipe

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
_INIT_BYTES = 1 << 30
"""Of the sample as float32: features of 23x30 are large."""
_TABLE_FEATURES = 12000
_CHUNK = 100
_VALIDATION_CHUNK = 20
_TABLE_BYTES = 2 << 30
_CHUNK_BYTES = 256 << 20
"""Of features as float16, whatever their number: one of DeepLab's s2 has 17 MB, one of ResNet's 200 kB."""
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
        maps: segmentation: file of the class map of each photograph that has one.
    """

    train: tuple[tuple[Path, int], ...]
    validation: tuple[Path, ...]
    weights: NDArray[np.float64]
    labels: NDArray[np.int64]
    maps: Mapping[Path, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validation:
    """A unit on the photographs put aside.

    Attributes:
        payload_bytes: ideal code length of its tables.
        agreement: share of the photographs, or of the pixels, whose class is the teacher's.
        mean_iou: segmentation: with the class maps of the photographs; None where there are none.
    """

    payload_bytes: float
    agreement: float
    mean_iou: float | None = None


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
    maps: dict[Path, Path] = {}
    for source in recipe.data:
        known: dict[Path, int] = {}
        if source.labels and backbone.task == "segmentation":
            pairs = dict(mapped_photos(data / source.folder))
            photos = list(pairs)
            maps |= pairs
        else:
            photos = unlabelled_photos([data / source.folder])
        if source.labels and backbone.task == "classification":
            known = {p.path: p.label for p in labelled_photos(data / source.folder, backbone.wnids, backbone.labels)}
        if source.limit is not None and source.limit < len(photos):
            photos = [photos[k * len(photos) // source.limit] for k in range(source.limit)]
        if source.validate_every:
            photos, held = split_off_validation(photos, source.validate_every)
            validation += held
        if not photos:
            continue
        train += [(photo, source.views) for photo in photos]
        count = len(photos) * source.views
        weights.append(np.full(count, source.share / count))
        labels.append(np.repeat([known.get(photo, NO_LABEL) for photo in photos], source.views).astype(np.int64))
    if not validation:
        raise InvalidConfig("the recipe puts no photograph aside: give one of its sources validate_every")
    if not train:
        raise InvalidConfig("the recipe puts every photograph aside and leaves none to train on")
    together = np.concatenate(weights)
    return PhotoSets(tuple(train), tuple(validation), together / together.sum(), np.concatenate(labels), maps)


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
    supervised = any(term.kind == "ce" for term in point.task)
    if supervised and not (sets.labels != NO_LABEL).any() and not sets.maps:
        raise InvalidConfig(
            f"{point.id} has a task term `ce`, and no photograph has a label: set `labels = true` at a source whose "
            "folders are named by class, or that has `images` and `labels`"
        )
    train, held_out = _feature_specs(point.split, sets, training.seed)
    labels: NDArray[np.integer] = sets.labels
    if supervised and backbone.task == "segmentation":
        labels = view_maps(backbone, train, sets.maps)
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
            weights=sets.weights, labels=labels, checkpoint=folder / f"{point.id}.pt", report=report,
        )  # fmt: skip
    unit, tail = unit.cpu(), tail.cpu()
    round_weights(unit)
    unit, tables = prune_and_fit(unit, point, table_features(features, sets))
    truth = view_maps(backbone, held_out, sets.maps) if sets.maps else None
    result = validate(unit, tail, point, tables, held, truth)
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
        validation_mean_iou=result.mean_iou,
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
    train, held = _feature_specs(split, sets, seed)
    return (
        cached_features(backbone, train, runs / "cache", progress),
        cached_features(backbone, held, runs / "cache", progress),
    )


def _feature_specs(split: str, sets: PhotoSets, seed: int) -> tuple[FeatureSpec, FeatureSpec]:
    """Training views, and the photographs put aside."""
    return (
        FeatureSpec(split=split, photos=sets.train, augmented=True, seed=seed),
        FeatureSpec(split=split, photos=tuple((p, 1) for p in sets.validation), augmented=False, seed=seed),
    )


def table_features(features: NDArray[np.float16], sets: PhotoSets) -> NDArray[np.float16]:
    """A sample of the training features, the same each time, to fit tables on."""
    return features[_sample(sets.weights, _affordable(features, _TABLE_FEATURES, _TABLE_BYTES), seed=2)]


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
    if point.topology == "nested":
        return _nested_unit(entry, point, backbone, features, weights)
    unit = new_unit(backbone, point)
    if point.init in ("task", "principal", "next"):
        most = int(_INIT_BYTES // (4 * np.prod(features.shape[1:])))
        rows = _sample(weights, max(2, min(_INIT_FEATURES, most)), seed=1)
        f = torch.from_numpy(features[rows].astype(np.float32))
        if point.init == "next":
            init_next(unit, tail, f)
        else:
            init_linear(unit, tail, f, task_metric=point.init == "task")
    elif point.init != "random":
        source = entry.recipe.point(point.init)
        if _geometry(source) != _geometry(point):
            raise InvalidConfig(
                f"{point.id} cannot start from {source.id}: split, stride, kernel, filters, topology, hidden or group "
                "differ"
            )
        unit = entry.unit(backbone, source).requires_grad_()
    return unit


def _nested_unit(
    entry: ZooEntry,
    point: PointRecipe,
    backbone: Backbone,
    features: NDArray[np.float16],
    weights: NDArray[np.float64],
) -> BottleneckUnit:
    """See `initialized_unit`: a nested unit begins as a separable one, whose groups are then rotated together."""
    if point.init == "random":
        return new_unit(backbone, point)
    inner = point.model_copy(
        update={"topology": "separable", "group": (1, 1), "hidden": None, "channels": point.hidden or point.channels}
    )
    if point.init not in ("task", "principal", "next"):
        source = entry.recipe.point(point.init)
        if source.topology == "nested" and _geometry(source) == _geometry(point):
            return entry.unit(backbone, source).requires_grad_()
        if point.hidden is not None:
            raise InvalidConfig(f"{point.id} takes over the channels of {source.id}: leave `hidden` out")
    separable = initialized_unit(entry, inner, backbone, features, weights)
    hidden = separable.latent_shape[0]
    channels = min(point.channels, hidden * math.prod(point.group))
    unit = new_unit(backbone, point, channels=channels, hidden=hidden)
    rows = _sample(weights, min(_INIT_FEATURES, len(features)), seed=1)
    windows = []
    with torch.no_grad():
        chunk = _affordable(features, _CHUNK, _CHUNK_BYTES)
        for start in range(0, len(rows), chunk):
            f = torch.from_numpy(features[rows[start : start + chunk]].astype(np.float32))  # (n, C, Hf, Wf)
            windows.append(separable.encoder(f))
    init_nested(unit, separable, torch.cat(windows))
    return unit


def _geometry(point: PointRecipe) -> tuple[object, ...]:
    return point.split, point.stride, point.kernel, point.filters, point.topology, point.hidden, point.group


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
    chunk = _affordable(features, _CHUNK, _CHUNK_BYTES)
    for start in range(0, len(features), chunk):
        f = torch.from_numpy(features[start : start + chunk].astype(np.float32))
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
    unit: BottleneckUnit,
    tail: nn.Module,
    point: PointRecipe,
    tables: FactorizedModel,
    features: NDArray[np.float16],
    truth: NDArray[np.uint8] | None = None,
) -> Validation:
    """Rate and agreement on features that were not trained on.

    Args:
        unit: in evaluation mode.
        tail: the network after the split point.
        point: gives the step.
        tables: of the unit.
        features: (M, C, Hf, Wf) float16.
        truth: segmentation: class maps, (M, H, W) uint8; None where there are none.
    """
    symbols = symbols_of(unit, features, point.step, tables)
    bits = [tables.ideal_bits(s) for s in symbols]
    agree = 0.0
    matrix: NDArray[np.int64] | None = None
    for start in range(0, len(features), _VALIDATION_CHUNK):
        rows = slice(start, start + _VALIDATION_CHUNK)
        f = torch.from_numpy(features[rows].astype(np.float32))
        y_hat = torch.from_numpy(dequantize(symbols[rows], point.step))
        with torch.no_grad():
            student, teacher = tail(unit.decoder(y_hat)), tail(f)  # (n, L) or (n, K, H, W)
        answer = student.argmax(1)  # (n,) or (n, H, W)
        same = (answer == teacher.argmax(1)).float()
        agree += float(same.reshape(len(same), -1).mean(1).sum())
        if truth is not None:
            part = confusion(truth[rows], answer.numpy(), student.shape[1])
            matrix = part if matrix is None else matrix + part
    return Validation(
        payload_bytes=float(np.mean(bits)) / 8,
        agreement=agree / len(features),
        mean_iou=None if matrix is None or not matrix.any() else mean_iou(matrix),
    )


def _affordable(features: NDArray[np.float16], count: int, most_bytes: int) -> int:
    """How many features, at most `count`, fit into so many bytes; at least one."""
    return max(1, min(count, most_bytes // int(features[0].nbytes)))


def _sample(weights: NDArray[np.float64], size: int, seed: int) -> NDArray[np.intp]:
    count = len(weights)
    return np.sort(np.random.default_rng(seed).choice(count, min(count, size), replace=False, p=weights))
