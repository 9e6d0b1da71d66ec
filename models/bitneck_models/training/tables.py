"""Symbols of a trained unit, and the tables fitted to them.

Dimensions: M features, C x Hf x Wf feature, Cr x h x w latent.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.coding.symbols import quantize
from bitneck_models.training.photo_sets import affordable
from bitneck_models.units.prune import prune_channels
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import UnitRecipe

__all__ = ["feature_chunks", "prune_and_fit", "symbols_of"]

_CHUNK = 100
_CHUNK_BYTES = 256 << 20
"""Limit of a chunk as float16: a feature of DeepLab's s2 has 17 MB, one of ResNet's 200 kB."""
_ALIVE = 0.02
"""A channel stays if more than this share of its symbols is not zero."""


def feature_chunks(features: NDArray[np.float16], rows: NDArray[np.intp] | None = None) -> Iterator[Tensor]:
    """Features in chunks that fit into memory, (n, C, Hf, Wf) float32.

    Args:
        features: (M, C, Hf, Wf).
        rows: which of them; None for all.
    """
    size = affordable(features, _CHUNK, _CHUNK_BYTES)
    for start in range(0, len(features if rows is None else rows), size):
        chosen = features[start : start + size] if rows is None else features[rows[start : start + size]]
        yield torch.from_numpy(chosen.astype(np.float32))


def symbols_of(
    unit: BottleneckUnit, features: NDArray[np.float16], step: float, tables: FactorizedModel | None = None
) -> NDArray[np.int32]:
    """Symbols of features.

    Args:
        unit: a unit in evaluation mode.
        features: (M, C, Hf, Wf) float16.
        step: Q.
        tables: clip the symbols to these tables; None to round only.

    Returns:
        (M, Cr, h, w) int32.
    """
    parts = []
    for f in feature_chunks(features):
        with torch.no_grad():
            y = unit.encoder(f).numpy()
        if tables is None:
            parts.append(np.rint(y / np.float32(step)).astype(np.int32))
        else:
            parts.append(np.stack([quantize(one, step, tables.lo, tables.hi) for one in y]))
    return np.concatenate(parts)


def prune_and_fit(
    unit: BottleneckUnit, point: UnitRecipe, features: NDArray[np.float16]
) -> tuple[BottleneckUnit, FactorizedModel]:
    """Remove the channels whose symbols are nearly always zero, and fit the factorized model to the others.

    Args:
        unit: the trained unit.
        point: gives the step.
        features: features of training photographs, (M, C, Hf, Wf) float16.

    Raises:
        InvalidConfig: every symbol is zero.
    """
    symbols = symbols_of(unit, features, point.step)
    alive = np.flatnonzero((symbols != 0).mean(axis=(0, 2, 3)) > _ALIVE)
    small = prune_channels(unit, torch.from_numpy(alive))
    return small, FactorizedModel.fit(symbols[:, alive])
