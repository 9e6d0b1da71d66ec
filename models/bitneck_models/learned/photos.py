"""Photographs for the learned baselines, read ahead by worker processes.

Every picture depends on the seed, the step and the photograph alone.

Dimensions: n batch, H x W input, S side of a crop.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bitneck.image import crop, load_photo
from bitneck.manifest import InputSpec
from bitneck_models.data.features import random_input
from bitneck_models.training.stream import Key, keyed_loader

__all__ = ["Pictures", "batches", "evaluation_crop", "to_pixels"]


def evaluation_crop(path: Path, spec: InputSpec) -> NDArray[np.float32]:
    """What the network sees of a photograph, (3, H, W), values from 0 to 1."""
    return to_pixels(np.asarray(crop(load_photo(path), spec)))


def to_pixels(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W, 3) uint8 to (3, H, W) float32, values from 0 to 1."""
    pixels: NDArray[np.float32] = np.ascontiguousarray(picture.transpose(2, 0, 1), dtype=np.float32)
    pixels /= 255
    return pixels


class Pictures(Dataset[NDArray[np.float32]]):
    """Pictures by (step, number of the photograph). Worker processes get a copy of it.

    Args:
        photos: files.
        spec: the network's input.
        side: S: random crops of pixels of `evaluation_crop`, mirrored or not, (3, S, S); None for random views as the
            network gets them, (3, H, W).
        seed: seed of the crops and views.
    """

    def __init__(self, photos: Sequence[Path], spec: InputSpec, side: int | None, seed: int) -> None:
        self.photos, self.spec, self.side, self.seed = photos, spec, side, seed

    def __getitem__(self, key: Key) -> NDArray[np.float32]:
        step, row = key
        rng = np.random.default_rng([self.seed, step, row])
        if self.side is None:
            x, _ = random_input(self.photos[row], None, self.spec, "classification", rng)
            return np.ascontiguousarray(x[0])
        picture = evaluation_crop(self.photos[row], self.spec)
        top, left = (int(rng.integers(0, size - self.side + 1)) for size in picture.shape[1:])
        part = picture[:, top : top + self.side, left : left + self.side]
        return np.ascontiguousarray(part[:, :, ::-1] if rng.random() < 0.5 else part)


def batches(
    pictures: Pictures, weights: NDArray[np.float64], batch: int, first_step: int, workers: int
) -> Iterator[Tensor]:
    """The batches of a step and of all steps after it, (n, 3, ...) float32.

    Args:
        pictures: see `Pictures`.
        weights: probability of each photograph to be drawn, summing to 1.
        batch: n.
        first_step: number of the step.
        workers: processes that read photographs; 0 to read them in this one.
    """

    def rows(step: int) -> list[Key]:
        rng = np.random.default_rng([pictures.seed, step])
        return [(step, int(row)) for row in rng.choice(len(weights), batch, replace=False, p=weights)]

    keys = (rows(step) for step in itertools.count(first_step))
    yield from keyed_loader(pictures, keys, workers)
