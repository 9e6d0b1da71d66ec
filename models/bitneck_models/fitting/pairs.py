"""Pairs of similar frames from training photographs: what conditional tables are fitted to.

Each photograph gives a pair of frames for each motion: still, slow and fast. Head and encoders then turn both frames
into symbols, as on a device.

Dimensions: P pairs, Cr x h x w latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck.image import load_photo, preprocess
from bitneck.manifest import InputSpec
from bitneck_models.data.class_maps import mapped_photos
from bitneck_models.data.photos import split_off_validation, unlabelled_photos
from bitneck_models.data.scenes import Camera, Path2D, moving, still
from bitneck_models.fitting.symbols import EveryPoint
from bitneck_models.zoo.recipe import Recipe

__all__ = ["MOTIONS", "ScenePhotos", "Symbols", "pair_symbols", "scene_photos"]

MOTIONS = ("still", "slow", "fast")
_VALIDATE_EVERY = 10

Symbols = dict[str, NDArray[np.int16]]
"""By operating point: (P, 2, Cr, h, w) int16, the two frames of each pair. Wider tables get no conditional tables."""


@dataclass(frozen=True, slots=True)
class ScenePhotos:
    """Photographs to make scenes of.

    Attributes:
        train: photographs to fit on.
        validation: photographs put aside.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...]


def scene_photos(recipe: Recipe, data: Path, spec: InputSpec, count: int, seed: int) -> ScenePhotos:
    """Draw photographs from a recipe's folders, in proportion to their shares.

    A folder of small photographs is skipped: a view that moves over one would show nothing new.

    Args:
        recipe: names the folders.
        data: the folder that holds them.
        spec: the backbone's input.
        count: number of photographs to fit on; a tenth as many are put aside.
        seed: seed of the drawing.

    Raises:
        ImageError: a folder does not exist or is empty.
        InvalidConfig: no folder has photographs that are large enough.
    """
    rng = np.random.default_rng(seed)
    train: list[Path] = []
    held: list[Path] = []
    weights: list[float] = []
    for source in recipe.data:
        if source.labels and (data / source.folder / "labels").is_dir():
            photos = [photo for photo, _ in mapped_photos(data / source.folder)]
        else:
            photos = unlabelled_photos([data / source.folder])
        if min(load_photo(photos[0]).size) < min(spec.height, spec.width):
            continue
        kept, aside = split_off_validation(photos, source.validate_every or _VALIDATE_EVERY)
        held += aside
        train += kept
        weights += [source.share / max(1, len(kept))] * len(kept)
    if not train or not held:
        raise InvalidConfig(f"no folder of {recipe.name} has photographs of the input's size to make scenes of")
    p = np.array(weights) / sum(weights)
    drawn = np.sort(rng.choice(len(train), min(count, len(train)), replace=False, p=p))
    aside_drawn = np.sort(rng.choice(len(held), min(max(1, count // 10), len(held)), replace=False))
    return ScenePhotos(tuple(train[i] for i in drawn), tuple(held[i] for i in aside_drawn))


def pair(photo: Image.Image, spec: InputSpec, motion: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Two frames of a scene with this motion, taken by a camera of random quality."""
    camera = Camera(noise=float(np.exp(rng.uniform(np.log(0.7), np.log(8.0)))), quality=int(rng.integers(70, 96)))
    if motion == "still":
        first, second = still(photo, spec, camera, 2, rng)
        return first, second
    if motion == "slow":
        path = Path2D(
            speed=float(rng.uniform(0.005, 0.03)),
            zoom=float(rng.uniform(0.6, 0.9)),
            growth=float(rng.uniform(-0.01, 0.01)),
        )
    else:
        path = Path2D(
            speed=float(rng.uniform(0.04, 0.2)),
            zoom=float(rng.uniform(0.5, 0.8)),
            growth=float(rng.uniform(-0.05, 0.05)),
        )
    first, second = moving(photo, spec, camera, path, 2, rng)
    return first, second


def pair_symbols(
    bundle: Bundle,
    points: Sequence[str],
    photos: Sequence[Path],
    seed: int,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[str, Symbols]:
    """Compute the symbols of a pair of frames for each photograph and motion.

    Args:
        bundle: gives head and encoders.
        points: ids of operating points.
        photos: files.
        seed: seed of the scenes.
        progress: called with the number of photographs done.

    Returns:
        Symbols by motion.

    Raises:
        ImageError: a photograph cannot be read.
    """
    every, ladder = EveryPoint(bundle, points), bundle.manifest.ladder
    spec = bundle.manifest.input
    # One array each: many small arrays that stay between large ones that go would fragment the heap.
    collected: dict[str, Symbols] = {
        motion: {name: np.empty((len(photos), 2, *ladder[name].latent_shape), np.int16) for name in points}
        for motion in MOTIONS
    }
    for row, path in enumerate(photos):
        photo = load_photo(path)
        rng = np.random.default_rng([seed, row])
        for motion in MOTIONS:
            for k, frame in enumerate(pair(photo, spec, motion, rng)):
                for name, s in every.symbols(preprocess(frame, spec)):
                    collected[motion][name][row, k] = s
        progress(row + 1)
    return collected
