"""More operating points of a trained unit: coarser or finer steps, with tables of their own. Nothing is trained.

    unit, step * 1, step * 1.41, step * 2, ... --> tables for each, fitted to the symbols of training photographs

Dimensions: M views, C x Hf x Wf feature, Cr x h x w latent.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck_models.data.features import cached_features, view_maps
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.photo_sets import PhotoSets, feature_specs, one_view_each
from bitneck_models.training.point import point_record
from bitneck_models.training.tables import feature_chunks
from bitneck_models.training.validation import validate
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import save_point
from bitneck_models.zoo.recipe import UnitRecipe
from bitneck_models.zoo.records import PointRecord

__all__ = ["MOST_MULTIPLE", "fit_steps", "point_id"]

MOST_MULTIPLE = 64.0
"""Largest multiple of a unit's step, and the inverse of the smallest."""


def point_id(unit_id: str, multiple: float) -> str:
    """The id of a unit's operating point at a multiple of the step that the unit was trained at."""
    return unit_id if multiple == 1 else f"{unit_id}-x{multiple:g}"


def fit_steps(
    entry: ZooEntry,
    recipe: UnitRecipe,
    multiples: Sequence[float],
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    *,
    photos: int = 4000,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> dict[str, PointRecord]:
    """Fit tables for more steps of a trained unit, and save the operating points in the zoo entry.

    The point at the unit's own step stays as training made it; fitted points of the same id are replaced.

    Args:
        entry: has the unit, and gets the points.
        recipe: of the unit.
        multiples: of the unit's step, such as 1.41; 1 is left out.
        backbone: the frozen network.
        sets: the photographs of the recipe.
        runs: folder of the feature caches.
        photos: number of training photographs to fit the tables on.
        progress: called with (what is being done, done, all).

    Returns:
        The records of the new points, by id.

    Raises:
        InvalidConfig: the unit is not trained, or a multiple is out of range.
    """
    for multiple in multiples:
        if not 1 / MOST_MULTIPLE <= multiple <= MOST_MULTIPLE:
            raise InvalidConfig(f"a step of {multiple:g} times the unit's: 1/{MOST_MULTIPLE:g} to {MOST_MULTIPLE:g}")
    unit = entry.unit(backbone, recipe)
    seed = entry.recipe.training_of(recipe).seed
    features = _table_views(backbone, recipe.split, sets, seed, runs, photos, progress)
    held_out = feature_specs(recipe.split, sets, seed)[1]
    held = cached_features(backbone, held_out, runs / "cache", lambda done, of: progress("validation", done, of))
    truth = view_maps(backbone, held_out, sets.maps) if sets.maps else None
    latents = _latents(unit, features)
    records = {}
    wanted = [multiple for multiple in dict.fromkeys(multiples) if multiple != 1]
    for done, multiple in enumerate(wanted, start=1):
        step = recipe.step * multiple
        tables = FactorizedModel.fit(np.rint(latents / np.float32(step)).astype(np.int32))
        result = validate(unit, backbone.tail(recipe.split), step, tables, held, truth)
        name = point_id(recipe.id, multiple)
        records[name] = point_record(recipe, step, len(held), result)
        save_point(entry.point_folder(name), tables, records[name])
        progress("steps", done, len(wanted))
    return records


def _table_views(
    backbone: Backbone,
    split: str,
    sets: PhotoSets,
    seed: int,
    runs: Path,
    photos: int,
    progress: Callable[[str, int, int], None],
) -> NDArray[np.float16]:
    """Features of one random view of some training photographs, drawn as often as training draws them."""
    spec = one_view_each(sets, split, seed, photos)
    return cached_features(backbone, spec, runs / "cache", lambda done, of: progress("features", done, of))


@torch.no_grad()
def _latents(unit: BottleneckUnit, features: NDArray[np.float16]) -> NDArray[np.float32]:
    """(M, Cr, h, w) float32."""
    return np.concatenate([unit.encoder(f).numpy() for f in feature_chunks(features)])
