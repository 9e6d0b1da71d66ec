"""Class maps as pictures: a colour for each class, an indexed PNG, and the photograph with the colours over it."""

import re
import threading
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path

from PIL import Image

from bitneck.coding.colours import colours
from bitneck.errors import InvalidConfig, ProtocolError
from bitneck_edge.answers.results import Answer, Segmentation, Written
from bitneck_edge.sources.photo import Photo, picture_of

__all__ = ["MapWriter", "colours", "indexed", "overlay"]

_NAME_CHARACTERS = 80
_SHARE = 0.5
"""Of the colours in an overlay; the rest is the photograph."""


def indexed(segmentation: Segmentation, size: tuple[int, int]) -> Image.Image:
    """A class map in a photograph's size; each pixel has the class of the nearest pixel of the map.

    Args:
        segmentation: the map.
        size: of the photograph, (width, height) in pixels.

    Returns:
        A palette picture whose values are class indices.
    """
    image = Image.fromarray(segmentation.map).resize(size, Image.Resampling.NEAREST)
    image.putpalette(colours().tobytes())  # makes it a palette picture
    return image


def overlay(photo: Image.Image, classes: Image.Image) -> Image.Image:
    """A photograph with the colours of its classes over it.

    Args:
        photo: RGB.
        classes: from `indexed`, of the same size.
    """
    return Image.blend(photo, classes.convert("RGB"), _SHARE)


class MapWriter:
    """Writes the class map of each answer and an overlay into a folder. Several threads may use it at once.

    A file is named after its photograph. Characters other than letters, digits, ``.``, ``-`` and ``_`` become ``_``. If
    two photographs have the same name, the later one gets a number. Files of an earlier run are replaced.

    Args:
        folder: for the files; `prepare` makes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}
        self._reserved: defaultdict[str, deque[str]] = defaultdict(deque)

    def prepare(self) -> None:
        """Make the folder if it does not exist.

        Raises:
            InvalidConfig: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InvalidConfig(f"{self.folder} cannot be made ({exc.strerror}); choose another folder") from exc

    def reserve(self, file: str) -> None:
        """Give a photograph its name now. Answers are written by several threads, so their order may change."""
        name = self._new_name(file)
        with self._lock:
            self._reserved[file].append(name)

    def write(self, photo: Photo, answer: Answer) -> Answer:
        """Write an answer: ``NAME.map.png`` and ``NAME.overlay.jpg``, both in the photograph's size, upright.

        Returns:
            The answer, with the files' paths.

        Raises:
            ImageError: the photograph cannot be read any more.
            InvalidConfig: a file cannot be written.
        """
        if answer.segmentation is None:
            raise ProtocolError(f"the answer to frame {answer.seq} has no class map to write")
        image = picture_of(photo)
        classes = indexed(answer.segmentation, image.size)
        name = self._name(answer.file)
        map_file, overlay_file = self.folder / f"{name}.map.png", self.folder / f"{name}.overlay.jpg"
        try:
            classes.save(map_file)
            overlay(image, classes).save(overlay_file, quality=90)
        except OSError as exc:
            raise InvalidConfig(f"{self.folder}/{name}.*: cannot write ({exc.strerror or exc})") from exc
        return replace(answer, written=Written(str(map_file), str(overlay_file)))

    def _name(self, file: str) -> str:
        """The reserved name of a photograph, or a new one."""
        with self._lock:
            names = self._reserved.get(file)
            if names is not None:
                name = names.popleft()
                if not names:
                    del self._reserved[file]
                return name
        return self._new_name(file)

    def _new_name(self, file: str) -> str:
        """A name of harmless characters that no other photograph of this run has."""
        path = Path(file)
        frame = path.suffix.partition("#")[2]  # of a video: street.mp4#12
        stem = f"{path.stem}-{frame}" if frame else path.stem
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip(".-")[:_NAME_CHARACTERS] or "photograph"
        with self._lock:
            name, number = safe, self._taken.get(safe.casefold(), 0)
            while number:
                number += 1
                name = f"{safe}-{number}"
                if name.casefold() not in self._taken:
                    break
            self._taken[safe.casefold()] = max(1, number)
            self._taken.setdefault(name.casefold(), 1)
        return name
