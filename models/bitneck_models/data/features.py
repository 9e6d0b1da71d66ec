"""Cached features of the frozen head. They are computed once, so that a unit then trains in minutes on a CPU.

A cache is a folder with ``features.npy`` (M, C, Hf, Wf) float16, ``done.npy`` (M,) bool and ``key.json``, which says
what it was made from. Another key makes another folder. Interrupted computation continues where it stopped.

Dimensions: M views, C x Hf x Wf feature, H x W input.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from bitneck.errors import InvalidConfig
from bitneck.image import crop, load_photo, normalize
from bitneck.manifest import InputSpec, Task
from bitneck.runtime import OnnxModule
from bitneck_models.data.class_maps import VOID, ViewRange, load_class_map, random_view
from bitneck_models.data.photos import augment
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx

__all__ = ["FeatureSpec", "cached_features", "head_module", "random_input", "sized_class_map", "view_maps"]

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """What a cache is made from.

    Attributes:
        split: the split point.
        photos: files, each with its number of views.
        augmented: take random views; else one view each, with the backbone's own preprocessing.
        seed: seed of the random views.
    """

    split: str
    photos: tuple[tuple[Path, int], ...]
    augmented: bool
    seed: int

    def key(self, backbone: Backbone) -> str:
        """Digest of everything that decides the contents. A photograph counts by path, size and time of change."""
        lines = [f"{backbone.name} {self.split} {self.augmented} {self.seed} 1"]
        if backbone.weights_sha256 or backbone.task != "classification":
            lines.append(f"{backbone.weights_sha256} {backbone.task} {_views(backbone.input)}")
        for path, views in self.photos:
            stat = path.stat()
            lines.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {views}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def rng(self, path: Path, view: int) -> np.random.Generator:
        """Source of randomness for one view."""
        digest = hashlib.sha256(f"{self.seed} {view} {path.parent.name}/{path.name}".encode()).digest()
        return np.random.default_rng(list(digest))


def view_maps(backbone: Backbone, spec: FeatureSpec, maps: Mapping[Path, Path]) -> NDArray[np.uint8]:
    """Class maps of the views of `cached_features`, in the same order.

    Args:
        backbone: a segmentation network.
        spec: the views.
        maps: file of the class map of each photograph that has one.

    Returns:
        (M, H, W) uint8 at the input's height and width, `VOID` where unknown.
    """
    size = backbone.input.width, backbone.input.height
    found = []
    for path, count in spec.photos:
        classes = sized_class_map(maps[path], len(backbone.labels), backbone.input) if path in maps else None
        for view in range(count):
            if classes is None:
                found.append(np.full(size[::-1], VOID, np.uint8))
            elif spec.augmented:
                blank = Image.new("RGB", classes.shape[::-1])
                found.append(random_view(blank, classes, _views(backbone.input), spec.rng(path, view))[1])
            else:
                found.append(classes)
    return np.stack(found)


def _views(spec: InputSpec) -> ViewRange:
    """Views for segmentation networks: a whole photograph or a part of it, and nothing outside of it."""
    return ViewRange(height=spec.height, width=spec.width, scale_min=1.0, scale_max=1.5, light=0.3)


def random_input(
    path: Path, classes: NDArray[np.uint8] | None, spec: InputSpec, task: Task, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """A random view of a photograph as the network gets it.

    Args:
        path: file of the photograph.
        classes: its class map, at the input's size; None without one.
        spec: the network's input.
        task: the network's; it decides the kind of view.
        rng: source of randomness.

    Returns:
        (1, 3, H, W) float32, and the classes of the view; None for classification.

    Raises:
        ImageError: the photograph cannot be read.
    """
    image = load_photo(path)
    if task == "classification":
        return normalize(augment(image, spec, rng), spec), None
    if image.size != (spec.width, spec.height):  # as serving does; its class map may have another size
        image = image.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    view, found = random_view(image, classes, _views(spec), rng)
    return normalize(view, spec), found


def sized_class_map(path: Path, classes: int, spec: InputSpec) -> NDArray[np.uint8]:
    """A photograph's class map at the input's size, (H, W)."""
    found = load_class_map(path, classes)
    if found.shape != (spec.height, spec.width):
        found = np.array(Image.fromarray(found).resize((spec.width, spec.height), Image.Resampling.NEAREST))
    return found


def head_module(backbone: Backbone, split: str, folder: Path) -> OnnxModule:
    """The head as an ONNX Runtime module, which is several times faster on a CPU than eager torch.

    Args:
        backbone: the network.
        split: the split point.
        folder: keeps the exported module.
    """
    path = folder / f"{backbone.name}-{split}-head{backbone.weights_sha256[:16]}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(to_onnx(backbone.head(split), backbone.input_shape))
        temporary.rename(path)
    return OnnxModule(path)


def cached_features(
    backbone: Backbone, spec: FeatureSpec, folder: Path, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> NDArray[np.float16]:
    """Features from the cache; missing ones are computed first.

    Args:
        backbone: the network.
        spec: what to compute.
        folder: folder of the caches.
        progress: called with (views done, views in all).

    Returns:
        (M, C, Hf, Wf) float16, memory-mapped and read-only. The views of one photograph follow one another.

    Raises:
        InvalidConfig: there are no photographs.
        ImageError: a photograph cannot be read.
    """
    views = [(path, view) for path, count in spec.photos for view in range(count)]
    if not views:
        raise InvalidConfig("no photographs to take features from")
    key = spec.key(backbone)
    place = folder / f"{backbone.name}-{spec.split}-{key[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    features_path, done_path = place / "features.npy", place / "done.npy"
    shape = (len(views), *backbone.feature_shape(spec.split))
    if not done_path.is_file():
        open_memmap(features_path, "w+", np.float16, shape).flush()
        (place / "key.json").write_text(json.dumps({"key": key, "split": spec.split, "views": len(views)}))
        open_memmap(done_path, "w+", np.bool_, (len(views),)).flush()
    done = open_memmap(done_path, "r+")
    if not done.all():
        features = open_memmap(features_path, "r+")
        head = head_module(backbone, spec.split, folder)
        missing = np.flatnonzero(~done)
        for rows, x in _batches(backbone, spec, views, missing):
            features[rows] = head.run(x)
            done[rows] = True
            progress(int(done.sum()), len(views))
        features.flush()
        done.flush()
    result: NDArray[np.float16] = open_memmap(features_path, "r")
    return result


def _batches(
    backbone: Backbone, spec: FeatureSpec, views: Sequence[tuple[Path, int]], rows: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """Batches of rows and their inputs (N, 3, H, W) float32. Threads read the photographs ahead."""

    def one(row: int) -> NDArray[np.float32]:
        path, view = views[row]
        if spec.augmented:
            return random_input(path, None, backbone.input, backbone.task, spec.rng(path, view))[0]
        return normalize(crop(load_photo(path), backbone.input), backbone.input)

    def batch(start: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        chunk = rows[start : start + _BATCH]
        return chunk, np.concatenate([one(int(row)) for row in chunk])

    starts = iter(range(0, len(rows), _BATCH))
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(batch, start) for _, start in zip(range(4), starts, strict=False)]
        while ahead:
            current = ahead.pop(0).result()
            if (start := next(starts, None)) is not None:
                ahead.append(pool.submit(batch, start))
            yield current
