"""Photographs with a class for each pixel: pairs of files, random views of both, and intersection over union (IoU).

Dimensions: H x W pixels, K classes.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from bitneck.errors import InvalidConfig
from bitneck.image import find_photos
from bitneck_models.data.coco import VOID, coco_maps, find_instances

__all__ = ["VOID", "ViewRange", "class_iou", "confusion", "load_class_map", "mapped_photos", "mean_iou", "random_view"]

_GREY = (124, 116, 104)


def mapped_photos(folder: Path) -> list[tuple[Path, Path]]:
    """Photographs with their class maps.

    Args:
        folder: a folder with ``images/`` and ``labels/``, and the same names in both; or a folder of COCO's
            photographs, such as ``coco/train2017``, beside ``annotations/instances_train2017.json`` (see
            `bitneck_models.data.coco`).

    Raises:
        ImageError: there are no photographs.
        InvalidConfig: a photograph has no class map, or COCO's instances cannot be read.
    """
    if find_instances(folder) is not None:
        return coco_maps(folder)
    images = folder / "images"
    pairs = [
        (photo, (folder / "labels" / photo.relative_to(images)).with_suffix(".png")) for photo in find_photos(images)
    ]
    missing = [str(labels) for _, labels in pairs if not labels.is_file()]
    if missing:
        raise InvalidConfig(f"{folder}: {len(missing)} photographs have no class map, the first is {missing[0]}")
    shared = [str(labels) for labels, count in Counter(labels for _, labels in pairs).items() if count > 1]
    if shared:
        raise InvalidConfig(f"{shared[0]} is the class map of several photographs; give each one a name of its own")
    return pairs


def load_class_map(path: Path, classes: int, ignore: Collection[int] = ()) -> NDArray[np.uint8]:
    """Read a PNG of class indices, (H, W) uint8; pixels without a class become `VOID`.

    Args:
        path: the file.
        classes: number of classes.
        ignore: indices of pixels without a class. Other indices outside the classes are then errors. If empty, every
            index outside the classes is void.

    Raises:
        InvalidConfig: the file is unreadable or no picture of indices, or an index is neither a class nor ignored.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise InvalidConfig(f"{path}: mode {image.mode}, expected a PNG of class indices (L or P)")
            indices = np.array(image, dtype=np.uint8)
    except OSError as exc:
        raise InvalidConfig(f"{path}: not readable as a class map ({exc})") from exc
    void = np.isin(indices, list(ignore)) if ignore else indices >= classes
    if (strange := indices[~void & (indices >= classes)]).size:
        raise InvalidConfig(
            f"{path}: index {int(strange[0])}, but there are {classes} classes and {sorted(ignore)} are ignored"
        )
    indices[void] = VOID
    return indices


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRange:
    """Ranges of random views.

    Attributes:
        height: height of a view, pixels.
        width: width of a view, pixels.
        scale_min: smallest enlargement of the photograph before the view is cut out. Outside the photograph a view is
            grey and void.
        scale_max: largest enlargement.
        light: largest change of brightness, contrast and colour, as a share.
    """

    height: int
    width: int
    scale_min: float
    scale_max: float
    light: float


def random_view(
    image: Image.Image, classes: NDArray[np.uint8] | None, views: ViewRange, rng: np.random.Generator
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A random view of a photograph and of its class map: scale, place, flip, light and colour.

    Args:
        image: RGB.
        classes: its class map, (H, W), or None. The view of the photograph is the same with and without it.
        views: ranges of the view.
        rng: source of randomness.

    Returns:
        RGB of the view's size, and its classes, (height, width) uint8, `VOID` where unknown.
    """
    scale = float(np.exp(rng.uniform(np.log(views.scale_min), np.log(views.scale_max))))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    spare = views.width - size[0], views.height - size[1]
    left, top = (round(float(rng.uniform(min(0, s), max(0, s)))) for s in spare)
    place = left, top
    view = Image.new("RGB", (views.width, views.height), _GREY)
    view.paste(image.resize(size, Image.Resampling.BILINEAR), place)
    mapped = Image.new("L", view.size, VOID)
    if classes is not None:
        mapped.paste(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST), place)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mapped = mapped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(float(rng.uniform(1 - views.light, 1 + views.light)))
    return view, np.array(mapped, dtype=np.uint8)


def confusion(truth: NDArray[np.integer], answer: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """How often class i was answered as j, (K, K). Pixels without a class are ignored."""
    known = truth < classes
    pairs = truth[known].astype(np.int64) * classes + answer[known]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_iou(matrix: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each class.

    Args:
        matrix: how often class i was answered as j, (..., K, K).

    Returns:
        (..., K); NaN for a class that is neither in the class maps nor in the answers.
    """
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)  # (..., K)
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - hits
    shares: NDArray[np.float64] = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
    return shares


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Mean intersection over union of the classes that occur, from a confusion matrix (K, K) that is not all zero."""
    return float(np.nanmean(class_iou(matrix)))
