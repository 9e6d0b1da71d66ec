"""What a unit is trained on: cached features, or a stream of fresh ones and a cached sample.

Dimensions: M cached features or photographs of a stream, K sample, C x Hf x Wf feature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck_models.data.features import FeatureSpec, cached_features, view_maps
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.photo_sets import PhotoSets, affordable_count, feature_specs, one_view_each
from bitneck_models.training.stream import ViewStream
from bitneck_models.zoo.recipe import TrainingRecipe, UnitKind

__all__ = ["Given", "given_to", "stream_sample"]

_SAMPLE = 12000
_SAMPLE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a unit is trained on.

    Attributes:
        features: cached ones, (M, C, Hf, Wf) float16, or a stream of M photographs.
        weights: probability of each to be drawn, (M,).
        labels: see `bitneck_models.training.unit.train_unit`.
        views: number of views in all.
        sample: cached features to start from and to fit tables to, (K, C, Hf, Wf) float16.
        sample_weights: probability of each of them, (K,).
    """

    features: NDArray[np.float16] | ViewStream
    weights: NDArray[np.float64]
    labels: NDArray[np.integer] | None
    views: int
    sample: NDArray[np.float16]
    sample_weights: NDArray[np.float64]


def given_to(
    unit: UnitKind,
    backbone: Backbone,
    sets: PhotoSets,
    training: TrainingRecipe,
    runs: Path,
    *,
    device: str,
    workers: int,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Given:
    """Find what a unit is trained on; features that are missing in the cache are computed first.

    Args:
        unit: its split point and task terms.
        backbone: the frozen network.
        sets: the photographs.
        training: its schedule.
        runs: folder of the caches.
        device: where a stream's head runs, as torch names it.
        workers: processes that read a stream's photographs.
        progress: of the cached features, (done, all).
    """
    with_maps = backbone.task == "segmentation" and any(term.kind == "ce" for term in unit.task)
    if not training.stream:
        train = feature_specs(unit.split, sets, training.seed)[0]
        features = cached_features(backbone, train, runs / "cache", progress)
        labels = view_maps(backbone, train, sets.maps) if with_maps else sets.labels
        return Given(
            features=features, weights=sets.weights, labels=labels, views=len(features), sample=features,
            sample_weights=sets.weights,
        )  # fmt: skip
    photos, weights, classes = sets.by_photo()
    stream = ViewStream(
        backbone, unit.split, photos, sets.maps if with_maps else None,
        seed=training.seed, workers=workers, device=torch.device(device), precision=training.precision,
        folder=runs / "cache",
    )  # fmt: skip
    sample = cached_features(
        backbone, stream_sample(unit.split, backbone, sets, training.seed), runs / "cache", progress
    )  # fmt: skip
    return Given(
        features=stream, weights=weights, labels=None if with_maps else classes,
        views=(training.steps + training.finish_steps) * training.batch, sample=sample,
        sample_weights=np.full(len(sample), 1 / len(sample)),
    )  # fmt: skip


def stream_sample(split: str, backbone: Backbone, sets: PhotoSets, seed: int) -> FeatureSpec:
    """The views whose features are cached where the others are streamed: to start from, and to fit tables to."""
    count = affordable_count(backbone.feature_shape(split), _SAMPLE, _SAMPLE_BYTES)
    return one_view_each(sets, split, seed, count)
