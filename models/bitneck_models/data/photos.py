"""Photographs for training and evaluation: folders, labels, augmentation."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageEnhance

from bitneck.errors import InvalidConfig
from bitneck.image import find_photos
from bitneck.manifest import InputSpec

__all__ = [
    "LabelledPhoto",
    "augment",
    "labelled_photos",
    "split_off_validation",
    "unlabelled_photos",
]


@dataclass(frozen=True, slots=True)
class LabelledPhoto:
    """A photograph and its class.

    Attributes:
        path: file of the photograph.
        label: index of the class.
    """

    path: Path
    label: int


def unlabelled_photos(folders: Sequence[Path]) -> list[Path]:
    """Every photograph in the folders and below them, sorted within each folder.

    Raises:
        ImageError: a folder does not exist or has no photographs.
    """
    return [photo for folder in folders for photo in find_photos(folder)]


def labelled_photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> list[LabelledPhoto]:
    """Photographs with their classes.

    Args:
        folder: a folder with ``labels.csv``, which has the columns ``file`` (relative to the folder) and ``index``; or
            a folder with one folder for each class, named by its WordNet id, its index or its label.
        wnids: WordNet ids by class index, or empty.
        labels: names by class index.

    Raises:
        InvalidConfig: the folder has neither, or names a class or a file that does not exist.
    """
    table = folder / "labels.csv"
    if table.is_file():
        return _from_table(folder, table, len(labels))
    if not folder.is_dir():
        raise InvalidConfig(f"{folder}: no such folder; it needs labels.csv (file, index) or one folder for each class")
    by_name: dict[str, int] = {str(i): i for i in range(len(labels))}
    for i, label in enumerate(labels):
        for name in (label, *label.split(", ")):
            by_name.setdefault(name.casefold(), i)
    by_name |= {wnid: i for i, wnid in enumerate(wnids)}
    photos: list[LabelledPhoto] = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        index = by_name.get(sub.name, by_name.get(sub.name.casefold().replace("_", " ")))
        if index is None:
            raise InvalidConfig(f"{sub}: the folder's name is no class; use a WordNet id, an index or a label's name")
        photos += [LabelledPhoto(path, index) for path in find_photos(sub)]
    if not photos:
        raise InvalidConfig(f"{folder}: neither labels.csv (file, index) nor a folder for each class")
    return photos


def is_below(name: str) -> bool:
    """Whether a name that a data set lists is a path below its folder. Whoever made the list has no say elsewhere."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _from_table(folder: Path, table: Path, classes: int) -> list[LabelledPhoto]:
    photos = []
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InvalidConfig(f"{table} is not UTF-8 ({exc.reason} at byte {exc.start}); save it as UTF-8") from exc
    with io.StringIO(text, newline="") as file:
        rows = csv.DictReader(file)
        if not {"file", "index"} <= set(rows.fieldnames or ()):
            raise InvalidConfig(f"{table}: needs the columns file and index, has {rows.fieldnames}")
        for line, row in enumerate(rows, start=2):
            name, index = row["file"] or "", row["index"] or ""
            if not is_below(name):
                raise InvalidConfig(
                    f"{table}, line {line}: {name!r} is not below {folder}; list files by their paths from there, "
                    "without '..', and copy or link what lies elsewhere into the folder"
                )
            path = folder / name
            if not (index.isascii() and index.isdigit()) or int(index) >= classes:
                raise InvalidConfig(f"{table}, line {line}: index {index!r} is not within 0 and {classes - 1}")
            if not path.is_file():
                raise InvalidConfig(f"{table}, line {line}: no file {path}")
            photos.append(LabelledPhoto(path, int(index)))
    if not photos:
        raise InvalidConfig(f"{table}: no photographs listed")
    return photos


def split_off_validation(photos: Sequence[Path], every: int) -> tuple[list[Path], list[Path]]:
    """Put every n-th photograph aside, the same ones each time.

    Returns:
        Training and validation photographs.
    """
    held = [p for i, p in enumerate(photos) if i % every == every - 1]
    kept = [p for i, p in enumerate(photos) if i % every != every - 1]
    return kept, held


def augment(image: Image.Image, spec: InputSpec, rng: np.random.Generator) -> Image.Image:
    """A random view: area 25 to 100 %, aspect 3:4 to 4:3 of the input's, flip, mild changes of light and colour.

    Args:
        image: RGB.
        spec: gives height and width of the view.
        rng: source of randomness.
    """
    width, height = image.size
    area = width * height * rng.uniform(0.25, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))) * spec.width / spec.height
    w = min(width, max(8, round(float(np.sqrt(area * aspect)))))
    h = min(height, max(8, round(float(np.sqrt(area / aspect)))))
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    box = (left, top, left + w, top + h)
    view = image.resize((spec.width, spec.height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        view = ImageEnhance.Brightness(view).enhance(float(rng.uniform(0.7, 1.3)))
        view = ImageEnhance.Color(view).enhance(float(rng.uniform(0.6, 1.4)))
    return view
