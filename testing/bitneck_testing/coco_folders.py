"""A tiny data set laid out as COCO is: photographs in a folder, their annotations beside it."""

import json
from pathlib import Path
from typing import Any

from bitneck_models.networks.voc import VOC_CLASSES
from bitneck_testing.photographs import photo

__all__ = ["CLASSES", "DOG", "IDS", "PERSON", "TRUCK", "document", "instance", "make_coco_folder", "square", "write"]

_NAMES = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
_NAMES |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
IDS = {name: 10 * k for k, name in enumerate(VOC_CLASSES) if k}
"""Category id by class name."""
PERSON, DOG, TRUCK = IDS["person"], IDS["dog"], 7
CLASSES = {number: VOC_CLASSES.index(name) for name, number in IDS.items()}
"""Class index by category id."""


def square(left: int, top: int, size: int) -> list[list[float]]:
    """A segmentation: one square polygon, in pixels."""
    return [[left, top, left + size, top, left + size, top + size, left, top + size]]


def instance(picture: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    """An annotation: picture and category by their ids."""
    return {"image_id": picture, "category_id": category, "segmentation": segmentation, "iscrowd": crowd}


def document(**changes: Any) -> dict[str, Any]:
    """The annotations of five photographs of 64x48: large instances, a small one, another class, a crowd, one dog.

    `changes` replace the document's keys.
    """
    categories = [{"id": number, "name": _NAMES.get(name, name)} for name, number in IDS.items()]
    pictures = [{"id": k, "file_name": f"{k:03d}.jpg", "width": 64, "height": 48} for k in (5, 4, 3, 2, 1)]
    crowd = {"size": [48, 64], "counts": [48 * 20, 48 * 30, 48 * 14]}  # columns 20 to 49
    annotations = [
        instance(1, PERSON, square(2, 3, 40)),
        instance(1, DOG, square(30, 10, 20)),
        instance(2, PERSON, square(0, 0, 10)),
        instance(3, TRUCK, square(0, 0, 40)),
        instance(4, PERSON, crowd, crowd=1),
        instance(4, DOG, square(0, 0, 15)),
        instance(5, DOG, square(0, 0, 45)),
    ]
    return {"categories": [*categories, {"id": TRUCK, "name": "truck"}], "images": pictures} | {
        "annotations": annotations
    } | changes  # fmt: skip


def make_coco_folder(root: Path) -> Path:
    """The five photographs of `document` with their annotations below `root`. Returns the photographs' folder."""
    folder = root / "coco" / "tiny2017"
    folder.mkdir(parents=True)
    (root / "coco" / "annotations").mkdir()
    for k in range(1, 6):
        photo(k, (64, 48)).save(folder / f"{k:03d}.jpg")
    write(folder, document())
    return folder


def write(folder: Path, values: Any) -> Path:
    """Write the annotations of a folder of photographs where COCO has them. Returns the file."""
    path = folder.parent / "annotations" / f"instances_{folder.name}.json"
    path.write_text(json.dumps(values))
    return path
