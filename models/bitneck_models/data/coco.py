"""COCO 2017 with a class for each pixel: the 20 classes of Pascal VOC and background, drawn from COCO's instances.

    DATA/coco/train2017/*.jpg                              the photographs; a recipe names their folder
    DATA/coco/annotations/instances_train2017.json         found by the folder's name
    DATA/coco/class_maps/train2017/*.png, index.json       written once, by this module

As in torchvision's reference for its published weights, pixels of more than one instance are void, and so are crowds,
which mark a region and not its objects. Instances of COCO's other 60 classes are background. Photographs with at most
1,000 pixels of the 20 classes are left out, in training and in evaluation, as the paper's authors do.

``pycocotools`` decodes polygons and run lengths; the extra ``models`` installs it.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.errors import InvalidConfig
from bitneck.image import MAX_PIXELS
from bitneck_models.networks.voc import VOC_CLASSES

__all__ = ["LEAST_PIXELS", "VOID", "coco_maps", "find_instances", "instance_map"]

VOID = 255
"""Value in class maps of pixels without a class."""

LEAST_PIXELS = 1000
"""Photographs with at most this many pixels of the 20 classes are left out."""

_INDEX = "index.json"
_COCO_NAMES = {
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
    "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip
"""COCO's names of classes that have another name there."""


def find_instances(folder: Path) -> Path | None:
    """The file of instances that belongs to a folder of COCO's photographs, or None."""
    name = f"instances_{folder.name}.json"
    return next((p for up in (folder.parent, folder.parent.parent) if (p := up / "annotations" / name).is_file()), None)


def coco_maps(folder: Path, progress: Callable[[int, int], None] = lambda _done, _all: None) -> list[tuple[Path, Path]]:
    """Photographs and their class maps; missing class maps are drawn first.

    Interrupted drawing continues where it stopped. Another file of instances makes it begin anew.

    Args:
        folder: folder of the photographs, such as ``coco/train2017``.
        progress: called with (class maps drawn, all).

    Returns:
        (photograph, PNG of class indices), in order of their names.

    Raises:
        InvalidConfig: the file of instances is missing or malformed, photographs or pycocotools are missing, or the
            folder of the maps cannot be written.
    """
    instances = find_instances(folder)
    if instances is None:
        raise InvalidConfig(
            f"{folder}: no annotations/instances_{folder.name}.json beside it; unpack COCO's annotations there"
        )
    maps = folder.parent / "class_maps" / folder.name
    stat = instances.stat()
    source = f"{instances.name} {stat.st_size} {stat.st_mtime_ns}"
    kept = _read_index(maps, source)
    if kept is None:
        kept = _draw(folder, instances, maps, source, progress)
    if not kept:
        raise InvalidConfig(f"{instances}: no photograph has more than {LEAST_PIXELS} pixels of the 20 classes")
    return [(folder / name, maps / f"{Path(name).stem}.png") for name in kept]


def _read_index(maps: Path, source: str) -> list[str] | None:
    """Names of the photographs kept, or None if not all class maps are drawn."""
    try:
        index = json.loads((maps / _INDEX).read_bytes())
        return [str(name) for name in index["kept"]] if index["source"] == source else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _draw(folder: Path, instances: Path, maps: Path, source: str, progress: Callable[[int, int], None]) -> list[str]:
    pictures, by_picture, classes = _read_instances(instances)
    started = maps / "started.json"
    try:
        maps.mkdir(parents=True, exist_ok=True)
        if not started.is_file() or started.read_text() != source:
            for old in maps.glob("*.png"):
                old.unlink()
            started.write_text(source)
    except OSError as exc:
        raise InvalidConfig(f"{maps}: class maps cannot be written there ({exc.strerror}); make it writable") from exc
    kept = []
    for done, (name, size, key) in enumerate(pictures, start=1):
        if not (folder / name).is_file():
            raise InvalidConfig(f"{folder / name} is missing, although {instances} lists it; unpack {folder.name}.zip")
        path = maps / f"{Path(name).stem}.png"
        if path.is_file():
            with Image.open(path, formats=("PNG",)) as image:
                drawn = np.asarray(image)
        else:
            drawn = instance_map(by_picture.get(key, ()), size, classes, where=f"{instances}, {name}")
            temporary = path.with_suffix(".part")
            Image.fromarray(drawn).save(temporary, "PNG")
            temporary.rename(path)
        if int(((drawn > 0) & (drawn != VOID)).sum()) > LEAST_PIXELS:
            kept.append(name)
        progress(done, len(pictures))
    (maps / _INDEX).write_text(json.dumps({"source": source, "kept": kept}) + "\n")
    return kept


_Picture = tuple[str, tuple[int, int], int]


def _read_instances(path: Path) -> tuple[list[_Picture], dict[int, list[Any]], dict[int, int]]:
    """Photographs in order of their names, annotations by photograph, and class by COCO's category."""
    try:
        document = json.loads(path.read_bytes())
        by_name = {str(c["name"]): int(c["id"]) for c in document["categories"]}
        pictures = sorted(
            (str(p["file_name"]), (int(p["height"]), int(p["width"])), int(p["id"])) for p in document["images"]
        )
        by_picture: dict[int, list[Any]] = {}
        for annotation in document["annotations"]:
            by_picture.setdefault(int(annotation["image_id"]), []).append(annotation)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidConfig(f"{path}: not a file of COCO's instances ({type(exc).__name__}: {exc})") from exc
    missing = [name for name in VOC_CLASSES[1:] if _COCO_NAMES.get(name, name) not in by_name]
    if missing:
        raise InvalidConfig(f"{path}: no category {', '.join(_COCO_NAMES.get(n, n) for n in missing)}; is it COCO's?")
    for name, (height, width), _ in pictures:
        if Path(name).name != name or name.startswith("."):
            raise InvalidConfig(f"{path}: file name {name!r} is no plain name")
        if not 0 < height * width <= MAX_PIXELS:
            raise InvalidConfig(f"{path}: {name} is said to have {width}x{height} pixels, the limit is {MAX_PIXELS}")
    return pictures, by_picture, {by_name[_COCO_NAMES.get(n, n)]: k for k, n in enumerate(VOC_CLASSES) if k}


def instance_map(
    annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], classes: Mapping[int, int], where: str = "COCO"
) -> NDArray[np.uint8]:
    """Draw the class map of one photograph.

    Args:
        annotations: its instances, in COCO's format.
        size: height and width, pixels.
        classes: class by category; other categories are background.
        where: source of the instances, for the message.

    Returns:
        (H, W) uint8: 0 background, 1 to 20 classes, 255 void.

    Raises:
        InvalidConfig: an instance is not in COCO's format.
    """
    height, width = size
    drawn = np.zeros(size, np.uint8)
    covered = np.zeros(size, np.bool_)
    void = np.zeros(size, np.bool_)
    for annotation in annotations:
        try:
            if int(annotation["category_id"]) not in classes:
                continue
            mask = _mask(annotation["segmentation"], height, width)
            if annotation.get("iscrowd", 0):
                void |= mask
                continue
            void |= mask & covered
            covered |= mask
            drawn[mask] = classes[int(annotation["category_id"])]
        except InvalidConfig:
            raise
        except Exception as exc:  # pycocotools raises plain Exception, and Cython's errors
            raise InvalidConfig(f"{where}: an instance cannot be drawn ({type(exc).__name__}: {exc})") from exc
    drawn[void] = VOID
    return drawn


def _mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Polygons or run lengths to (H, W) bool."""
    tool = _pycocotools()
    if isinstance(segmentation, list):
        if not segmentation:
            return np.zeros((height, width), np.bool_)
        encoded = tool.merge(tool.frPyObjects(segmentation, height, width))
    elif list(segmentation["size"]) != [height, width]:
        raise ValueError(f"run lengths for {segmentation['size']}, the photograph is {[height, width]}")
    else:
        encoded = segmentation
        if isinstance(segmentation["counts"], list):
            encoded = tool.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools 2.0, about numpy 2
        mask: NDArray[np.bool_] = tool.decode(encoded).astype(np.bool_)
    return mask


def _pycocotools() -> ModuleType:
    try:
        from pycocotools import mask
    except ImportError as exc:
        raise InvalidConfig("COCO needs the package pycocotools: pip install 'bitneck[models]'") from exc
    module: ModuleType = mask
    return module
