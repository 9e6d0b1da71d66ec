"""From a recipe to a trained unit and its first operating point: features, start, training, tables, validation."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import bitneck
from bitneck.errors import InvalidConfig
from bitneck_models.data.features import view_maps
from bitneck_models.losses.task_terms import NO_LABEL
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.photo_sets import PhotoSets, feature_specs, split_features, table_features
from bitneck_models.training.scalars import Scalars
from bitneck_models.training.start import initialized_unit
from bitneck_models.training.tables import prune_and_fit
from bitneck_models.training.unit import RECENT_STEPS, StepReport, train_unit
from bitneck_models.training.validation import Validation, validate
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import round_weights, save_point, save_unit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe
from bitneck_models.zoo.records import PointRecord, UnitRecord

__all__ = ["point_record", "train_point", "unit_record"]


def train_point(
    entry: ZooEntry,
    point: UnitRecipe,
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    device: str = "cpu",
    on_features: Callable[[int, int], None] = lambda _done, _all: None,
    on_step: Callable[[StepReport], None] = lambda _report: None,
) -> tuple[UnitRecord, PointRecord]:
    """Train one unit, and save it and its first operating point in the zoo entry.

    Interrupted training resumes from its last checkpoint.

    Args:
        entry: gets the result, and has the unit to start from.
        point: what to train.
        backbone: the frozen network.
        sets: see `bitneck_models.training.photo_sets`.
        runs: folder for feature caches, checkpoints and TensorBoard's scalars; large.
        device: where the unit is trained, as torch names it.
        on_features: progress of the features, (done, all).
        on_step: progress of the training.

    Returns:
        The records of the unit and of the point.

    Raises:
        InvalidConfig: the point does not fit the backbone, labels are missing, or the checkpoint belongs to another
            recipe.
        ModelFailure: the loss is not finite, or every symbol is zero.
    """
    training = entry.recipe.training_of(point)
    supervised = any(term.kind == "ce" for term in point.task)
    if supervised and not (sets.labels != NO_LABEL).any() and not sets.maps:
        raise InvalidConfig(
            f"{point.id} has a task term `ce`, and no photograph has a label: set `labels = true` at a source whose "
            "folders are named by class, or that has `images` and `labels`"
        )
    train, held_out = feature_specs(point.split, sets, training.seed)
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
            scalars.add(step)
            on_step(step)

        train_unit(
            unit.to(device), tail.to(device), features, point, training,
            weights=sets.weights, labels=labels, checkpoint=folder / f"{point.id}.pt", report=report, recent=last,
        )  # fmt: skip
    unit, tail = unit.cpu(), tail.cpu()
    round_weights(unit)
    unit, tables = prune_and_fit(unit, point, table_features(features, sets))
    truth = view_maps(backbone, held_out, sets.maps) if sets.maps else None
    result = validate(unit, tail, point.step, tables, held, truth)
    records = unit_record(point, training, last, len(features)), point_record(point, point.step, len(held), result)
    save_unit(entry.unit_folder(point.id), unit, records[0])
    save_point(entry.point_folder(point.id), tables, records[1])
    return records


def unit_record(
    unit: UnitRecipe, training: TrainingRecipe, steps: Sequence[StepReport], train_features: int
) -> UnitRecord:
    """The record of a trained unit, without its digest.

    Args:
        unit: its recipe.
        training: its schedule.
        steps: what its steps cost; the last ones count.
        train_features: number of training views.
    """
    last = steps[-RECENT_STEPS:]
    return UnitRecord(
        recipe=unit.model_dump(by_alias=True),
        training=training.model_dump(),
        code_version=bitneck.__version__,
        torch_version=torch.__version__,
        train_features=train_features,
        lambda_final=last[-1].lambda_ if last else unit.lambda_,
        estimated_bytes=float(np.mean([step.bits for step in last])) / 8 if last else 0.0,
        trained=datetime.now(tz=UTC).date(),
    )


def point_record(unit: UnitRecipe, step: float, validation_photos: int, result: Validation) -> PointRecord:
    """The record of an operating point, without its digest.

    Args:
        unit: the recipe of its unit.
        step: quantizer step Q.
        validation_photos: number of photographs put aside.
        result: rate and agreement on them.
    """
    return PointRecord(
        unit=unit.id,
        split=unit.split,
        step=step,
        validation_photos=validation_photos,
        validation_bytes=result.payload_bytes,
        validation_agreement=result.agreement,
        validation_mean_iou=result.mean_iou,
        fitted=datetime.now(tz=UTC).date(),
    )
