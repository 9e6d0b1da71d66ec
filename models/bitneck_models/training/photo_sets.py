"""The photographs of a recipe, split into training and validation, and their features from the cache.

    recipe.data --photo_sets--> PhotoSets --split_features--> (M, C, Hf, Wf) to train on, and to validate on

Dimensions: M views, C x Hf x Wf feature.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import mapped_photos
from bitneck_models.data.features import FeatureSpec, cached_features
from bitneck_models.data.photos import labelled_photos, split_off_validation, unlabelled_photos
from bitneck_models.losses.task_terms import NO_LABEL
from bitneck_models.networks.backbone import Backbone
from bitneck_models.zoo.recipe import Source

__all__ = [
    "HasSources",
    "PhotoSets",
    "affordable",
    "affordable_count",
    "feature_specs",
    "one_view_each",
    "photo_sets",
    "sampled",
    "sampled_photos",
    "split_features",
    "table_features",
]

_TABLE_FEATURES = 12000
_TABLE_BYTES = 2 << 30


class HasSources(Protocol):
    """A recipe that names folders of photographs.

    Attributes:
        data: the folders.
    """

    @property
    def data(self) -> tuple[Source, ...]:
        """See the class."""
        ...


@dataclass(frozen=True, slots=True)
class PhotoSets:
    """The photographs of a recipe.

    Attributes:
        train: files to train on, each with its number of views.
        validation: files put aside.
        weights: probability of each training view to be drawn, (M,).
        labels: class of each training view, (M,) int64; `NO_LABEL` without one.
        maps: segmentation: file of the class map of each photograph that has one.
    """

    train: tuple[tuple[Path, int], ...]
    validation: tuple[Path, ...]
    weights: NDArray[np.float64]
    labels: NDArray[np.int64]
    maps: Mapping[Path, Path] = field(default_factory=dict)

    def by_photo(self) -> tuple[list[Path], NDArray[np.float64], NDArray[np.int64]]:
        """The training photographs, the probability of each to be drawn, and its class."""
        views = np.array([count for _path, count in self.train])
        first = np.cumsum(views) - views
        weights = np.add.reduceat(self.weights, first)
        return [path for path, _count in self.train], weights / weights.sum(), self.labels[first]


def photo_sets(recipe: HasSources, data: Path, backbone: Backbone) -> PhotoSets:
    """Find a recipe's photographs.

    Args:
        recipe: names the folders.
        data: the folder that holds them.
        backbone: knows the task and the classes.

    Raises:
        ImageError: a folder does not exist or is empty.
        InvalidConfig: no photograph is put aside for validation, or none is left to train on, or a folder has no
            labels although the recipe says so.
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


def feature_specs(split: str, sets: PhotoSets, seed: int) -> tuple[FeatureSpec, FeatureSpec]:
    """What to compute features of: random views of the training photographs, and the photographs put aside."""
    return (
        FeatureSpec(split=split, photos=sets.train, augmented=True, seed=seed),
        FeatureSpec(split=split, photos=tuple((p, 1) for p in sets.validation), augmented=False, seed=seed),
    )


def split_features(
    backbone: Backbone,
    split: str,
    sets: PhotoSets,
    seed: int,
    runs: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Compute, or read from the cache, the features of a split point.

    Args:
        backbone: the frozen network.
        split: the split point.
        sets: the photographs.
        seed: seed of the random views.
        runs: folder of the caches.
        progress: called with (views done, all).

    Returns:
        Features of the training views and of the photographs put aside, (M, C, Hf, Wf) float16 each.
    """
    train, held = feature_specs(split, sets, seed)
    return (
        cached_features(backbone, train, runs / "cache", progress),
        cached_features(backbone, held, runs / "cache", progress),
    )


def table_features(features: NDArray[np.float16], weights: NDArray[np.float64]) -> NDArray[np.float16]:
    """A sample of the training features to fit tables on; the same one each time."""
    return features[sampled(weights, affordable(features, _TABLE_FEATURES, _TABLE_BYTES), seed=2)]


def sampled_photos(sets: PhotoSets, size: int, seed: int) -> NDArray[np.intp]:
    """Indices of some training photographs, drawn as often as training draws them; see `sampled`."""
    return sampled(sets.by_photo()[1], size, seed)


def one_view_each(sets: PhotoSets, split: str, seed: int, count: int) -> FeatureSpec:
    """One random view of some training photographs, which are drawn as often as training draws them."""
    photos = tuple((sets.train[k][0], 1) for k in sampled_photos(sets, count, seed=2))
    return FeatureSpec(split=split, photos=photos, augmented=True, seed=seed)


def affordable(features: NDArray[np.float16], count: int, most_bytes: int, bytes_a_value: int = 2) -> int:
    """How many features fit into a number of bytes: at most `count`, at least one."""
    return affordable_count(features.shape[1:], count, most_bytes, bytes_a_value)


def affordable_count(shape: Sequence[int], count: int, most_bytes: int, bytes_a_value: int = 2) -> int:
    """The same for features of a shape (C, Hf, Wf)."""
    return max(1, min(count, most_bytes // (bytes_a_value * math.prod(shape))))


def sampled(weights: NDArray[np.float64], size: int, seed: int) -> NDArray[np.intp]:
    """Rows drawn without replacement, sorted.

    Args:
        weights: probability of each row, summing to 1.
        size: number of rows; all of them if there are fewer.
        seed: seed of the drawing.
    """
    count = len(weights)
    return np.sort(np.random.default_rng(seed).choice(count, min(count, size), replace=False, p=weights))
