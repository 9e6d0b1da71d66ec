"""From a recipe to a trained unit and its first operating point: features, start, training, tables, validation."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import bitneck
from bitneck.errors import InvalidConfig
from bitneck_models.data.features import cached_features, view_maps
from bitneck_models.losses.task_terms import NO_LABEL
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.given import given_to
from bitneck_models.training.parallel import ALONE, World
from bitneck_models.training.photo_sets import PhotoSets, feature_specs, table_features
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
    workers: int = 2,
    on_features: Callable[[int, int], None] = lambda _done, _all: None,
    on_step: Callable[[StepReport], None] = lambda _report: None,
    world: World = ALONE,
) -> tuple[UnitRecord, PointRecord]:
    """Train one unit, and save it and its first operating point in the zoo entry.

    Interrupted training resumes from its last checkpoint. Of several processes, the first computes the features and
    saves the result.

    Args:
        entry: gets the result, and has the unit to start from.
        point: what to train.
        backbone: the frozen network.
        sets: see `bitneck_models.training.photo_sets`.
        runs: folder for feature caches, checkpoints and TensorBoard's scalars; large.
        device: where the unit is trained, as torch names it.
        workers: processes that read photographs, where the recipe streams them.
        on_features: progress of the features, (done, all).
        on_step: progress of the training.
        world: the processes that train together.

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
    held_out = feature_specs(point.split, sets, training.seed)[1]
    if not world.leads:
        world.wait()  # until the features are there
    given = given_to(point, backbone, sets, training, runs, device=device, workers=workers, progress=on_features)
    held = cached_features(backbone, held_out, runs / "cache", on_features)
    if world.leads:
        world.wait()
    tail = backbone.tail(point.split)
    unit = initialized_unit(entry, point, backbone, given.sample, given.sample_weights)
    last: list[StepReport] = []
    folder = runs / entry.recipe.name
    with Scalars(folder / "scalars" / point.id if world.leads else None) as scalars:

        def report(step: StepReport) -> None:
            scalars.add(step)
            on_step(step)

        train_unit(
            unit.to(device), tail.to(device), given.features, point, training,
            weights=given.weights, labels=given.labels, checkpoint=folder / f"{point.id}.pt", report=report,
            recent=last, world=world,
        )  # fmt: skip
    unit, tail = unit.cpu(), tail.cpu()  # the tail is a part of the backbone, which the next unit needs
    if not world.leads:
        world.wait()  # until the unit is saved: the next one may start from it
        return saved_records(entry, point.id)
    round_weights(unit)
    unit, tables = prune_and_fit(unit, point, table_features(given.sample, given.sample_weights))
    truth = view_maps(backbone, held_out, sets.maps) if sets.maps else None
    result = validate(unit, tail, point.step, tables, held, truth)
    records = unit_record(point, training, last, given.views), point_record(point, point.step, len(held), result)
    save_unit(entry.unit_folder(point.id), unit, records[0])
    save_point(entry.point_folder(point.id), tables, records[1])
    world.wait()
    return saved_records(entry, point.id)


def saved_records(entry: ZooEntry, unit_id: str) -> tuple[UnitRecord, PointRecord]:
    """The records of a unit and of its first operating point, as they were saved."""
    unit = (entry.unit_folder(unit_id) / "record.json").read_bytes()
    point = (entry.point_folder(unit_id) / "point.json").read_bytes()
    return UnitRecord.model_validate_json(unit), PointRecord.model_validate_json(point)


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
