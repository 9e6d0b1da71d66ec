"""What counts as a photograph: a file, bytes, a picture, or pixels; and how it becomes the network's input."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.errors import ImageError
from bitneck.image import load_photo, opened_photo, opened_reduced, preprocess, to_input, view
from bitneck.manifest import InputSpec

__all__ = ["Photo", "PhotoLike", "Pixels", "input_of", "photo_of", "picture_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """A numpy array as a photograph.

    The array is not copied: do not write into it before the photograph is answered.

    Attributes:
        array: (H, W, 3) uint8, or (H, W) for grey.
        order: of the channels: ``rgb``, or ``bgr`` as OpenCV has them.
    """

    array: NDArray[np.uint8]
    order: Literal["rgb", "bgr"]

    def picture(self) -> Image.Image:
        """The array as Pillow's picture; one of ``bgr`` has blue in the place of red.

        Raises:
            ImageError: another shape or type, or an unknown order.
        """
        if self.order not in ("rgb", "bgr"):
            raise ImageError(f"an array with the order {self.order!r}, expected 'rgb' or 'bgr'")
        array = self.array
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise ImageError(f"an array of {getattr(array, 'dtype', type(array).__name__)}, expected uint8, 0 to 255")
        if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
            raise ImageError(f"an array of the shape {array.shape}, expected (height, width, 3) or (height, width)")
        return Image.fromarray(np.ascontiguousarray(array))


Photo = Path | bytes | Image.Image | Pixels
"""A file, a file's bytes, a picture that is loaded already, or an array."""

PhotoLike = Photo | str | bytearray | IO[bytes]
"""What may be given for a photograph: also a path as text, or a binary file, which is read at once."""


def photo_of(photo: object) -> Photo:
    """A photograph from whatever was given; see `PhotoLike`.

    Raises:
        ImageError: it is no photograph, or a file object that cannot be read.
    """
    if isinstance(photo, Path | bytes | Image.Image | Pixels):
        return photo
    if isinstance(photo, str):
        return Path(photo)
    if isinstance(photo, bytearray | memoryview):
        return bytes(photo)
    if isinstance(photo, np.ndarray):
        raise ImageError(
            "a numpy array does not say whether it is RGB or BGR: give Pixels(array, 'rgb'), or Pixels(array, 'bgr') "
            "for one of OpenCV"
        )
    if hasattr(photo, "read"):
        try:
            data: Any = photo.read()
        except (OSError, ValueError) as exc:
            raise ImageError(f"a file object that cannot be read ({exc})") from exc
        if not isinstance(data, bytes):
            raise ImageError("a file object that gives text; open it with mode 'rb'")
        return data
    raise ImageError(
        f"{type(photo).__name__} is no photograph; expected a path, bytes, a binary file, a PIL.Image or Pixels"
    )


def picture_of(photo: Photo) -> Image.Image:
    """The whole photograph as upright RGB.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(photo, Pixels):
        picture = photo.picture().convert("RGB")
        return Image.merge("RGB", picture.split()[::-1]) if photo.order == "bgr" else picture
    return _as_rgb(photo) if isinstance(photo, Image.Image) else load_photo(photo)


@contextlib.contextmanager
def input_of(photo: Photo, spec: InputSpec, *, exact: bool) -> Iterator[tuple[NDArray[np.float32], float]]:
    """A photograph as the network's input. The memory of one that is read here counts until the block ends.

    Args:
        photo: the picture.
        spec: the backbone's input.
        exact: as in training: decoded whole, turned, resized, then cropped. Else with less work; see
            `bitneck.image.view`.

    Returns:
        (1, 3, H, W) float32; and when the picture had been decoded, on `time.perf_counter`'s clock.

    Raises:
        ImageError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        if exact:
            image = stack.enter_context(opened_photo(photo)) if isinstance(photo, Path | bytes) else picture_of(photo)
            decoded = time.perf_counter()
            yield preprocess(image, spec), decoded
            return
        orientation, bgr = 1, False
        if isinstance(photo, Path | bytes):
            image, orientation = stack.enter_context(opened_reduced(photo, spec))
        elif isinstance(photo, Pixels):
            image, bgr = photo.picture(), photo.order == "bgr"
            image = image if image.mode == "RGB" else image.convert("RGB")
        else:
            image = _as_rgb(photo)
        decoded = time.perf_counter()
        yield to_input(view(image, spec, orientation), spec, bgr=bgr), decoded


def _as_rgb(picture: Image.Image) -> Image.Image:
    """A picture that the program opened, as RGB; Pillow may read its pixels only now."""
    if 0 in picture.size:
        raise ImageError(f"a picture of {picture.width}x{picture.height} pixels; expected at least one")
    try:
        if picture.mode == "RGB":
            picture.load()
            return picture
        return picture.convert("RGB")
    except Exception as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"a picture that cannot be read: damaged or cut short ({exc})") from exc
