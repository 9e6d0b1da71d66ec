"""A unit as its recipe says that training starts: random, linear, from the network's next layer, or from a point."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.photo_sets import affordable, sampled
from bitneck_models.training.tables import feature_chunks
from bitneck_models.units.starts import init_blocks, init_deeper, init_linear, init_nested, init_next
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import new_unit
from bitneck_models.zoo.recipe import STARTS, UnitRecipe

__all__ = ["initialized_unit"]

_FEATURES = 4000
_BYTES = 1 << 30
"""Limit of the sample as float32: features of 23x30 are large."""


def initialized_unit(
    entry: ZooEntry,
    point: UnitRecipe,
    backbone: Backbone,
    features: NDArray[np.float16],
    weights: NDArray[np.float64],
) -> BottleneckUnit:
    """Make the unit of a point, as its `init` says.

    Args:
        entry: has the trained point to start from, if `init` names one.
        point: the recipe of the unit.
        backbone: the frozen network.
        features: features of the training views, (M, C, Hf, Wf).
        weights: probability of each to be drawn, (M,).

    Raises:
        InvalidConfig: the unit does not fit the backbone, or does not fit the point to start from.
    """
    if point.topology == "nested":
        return _nested_unit(entry, point, backbone, features, weights)
    if point.init not in STARTS:
        source = entry.recipe.unit(point.init)
        deeper = any(point.decoder_blocks) and not any(source.decoder_blocks)
        others = point.decoder_blocks != source.decoder_blocks and any(point.decoder_blocks)
        alike = point.model_copy(update={"decoder_blocks": source.decoder_blocks}) if others else point
        if _geometry(source) != _geometry(alike):
            raise InvalidConfig(
                f"{point.id} cannot start from {source.id}: split, stride, kernel, filters, topology, hidden, group, "
                "pool, decoder_blocks or the channels of a deep decoder differ"
            )
        trained = entry.unit(backbone, source)
        if not others:
            return trained.requires_grad_()
        unit = new_unit(backbone, point, channels=trained.latent_shape[0])
        (init_deeper if deeper else init_blocks)(unit, trained)
        return unit
    unit = new_unit(backbone, point)
    if point.init == "random":
        return unit
    rows = sampled(weights, max(2, affordable(features, _FEATURES, _BYTES, bytes_a_value=4)), seed=1)
    f = torch.from_numpy(features[rows].astype(np.float32))
    if point.init == "next":
        init_next(unit, backbone.tail(point.split), f)
    else:
        init_linear(unit, backbone.tail(point.split), f, task_metric=point.init == "task")
    return unit


def _nested_unit(
    entry: ZooEntry,
    point: UnitRecipe,
    backbone: Backbone,
    features: NDArray[np.float16],
    weights: NDArray[np.float64],
) -> BottleneckUnit:
    """See `initialized_unit`: a nested unit starts as a separable one, whose groups of windows are then rotated."""
    if point.init == "random":
        return new_unit(backbone, point)
    inner = point.model_copy(
        update={"topology": "separable", "group": (1, 1), "hidden": None, "channels": point.hidden or point.channels}
    )
    if point.init not in STARTS:
        source = entry.recipe.unit(point.init)
        if source.topology == "nested" and _geometry(source) == _geometry(point):
            return entry.unit(backbone, source).requires_grad_()
        if point.hidden is not None:
            raise InvalidConfig(f"{point.id} takes over the channels of {source.id}: leave `hidden` out")
    separable = initialized_unit(entry, inner, backbone, features, weights)
    hidden = separable.latent_shape[0]
    channels = min(point.channels, hidden * math.prod(point.group))
    unit = new_unit(backbone, point, channels=channels, hidden=hidden)
    rows = sampled(weights, min(_FEATURES, len(features)), seed=1)
    with torch.no_grad():
        windows = [separable.encoder(f) for f in feature_chunks(features, rows)]
    init_nested(unit, separable, torch.cat(windows))
    return unit


def _geometry(point: UnitRecipe) -> tuple[object, ...]:
    keys = ("split", "stride", "kernel", "filters", "topology", "hidden", "group", "pool", "decoder_blocks")
    width = point.channels if any(point.decoder_blocks) else None
    return *(getattr(point, key) for key in keys), width
