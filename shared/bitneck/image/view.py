"""A photograph to the backbone's input with little work: only what the network sees is resized; it is turned last.

The pixels that a network sees are those of `preprocess`, sampled at the same places. They differ by
rounding, and, where the picture was decoded at a reduced scale or is more than twice as fine as the input, by the
averages that come first.

Dimensions: H x W input.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.image.exact import RESAMPLING, resized_size
from bitneck.image.read import TURNED
from bitneck.manifest import InputSpec

__all__ = ["to_input", "view"]

_GAP = 2.0
"""A picture that is more than this many times as fine as needed is first averaged over whole pixels."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a stored picture upright, by its EXIF orientation."""


def view(image: Image.Image, spec: InputSpec, orientation: int = 1) -> Image.Image:
    """The part of a photograph that the network sees, upright.

    Args:
        image: RGB, any size, as it is stored.
        spec: the backbone's input.
        orientation: EXIF's, 1 to 8.

    Returns:
        RGB, H x W.

    Raises:
        ImageError: the picture is too long and narrow.
    """
    turned = orientation in TURNED
    new_width, new_height = resized_size(image.size, spec, turned=turned)
    width, height = (spec.height, spec.width) if turned else (spec.width, spec.height)
    shown = (new_height, new_width) if turned else (new_width, new_height)
    left, top = (round((side - seen) / 2.0) for side, seen in zip(shown, (spec.width, spec.height), strict=True))
    x, y = _stored(left, top, shown, spec, orientation)
    box = (
        x * image.width / new_width,
        y * image.height / new_height,
        (x + width) * image.width / new_width,
        (y + height) * image.height / new_height,
    )
    if image.size == (new_width, new_height):
        part = image.crop((x, y, x + width, y + height))
    else:
        part = image.resize((width, height), RESAMPLING[spec.interpolation], box, _GAP)
    turn = _UPRIGHT.get(orientation)
    return part.transpose(turn) if turn is not None else part


def _stored(left: int, top: int, shown: tuple[int, int], spec: InputSpec, orientation: int) -> tuple[int, int]:
    """Where the corner of the crop lies in the resized picture as it is stored.

    Args:
        left: where it lies in the upright one, along x.
        top: the same along y.
        shown: width and height of the upright one.
        spec: the backbone's input.
        orientation: EXIF's.
    """
    right, bottom = shown[0] - left - spec.width, shown[1] - top - spec.height
    corners = {
        2: (right, top),
        3: (right, bottom),
        4: (left, bottom),
        5: (top, left),
        6: (top, right),
        7: (bottom, right),
        8: (bottom, left),
    }
    return corners.get(orientation, (left, top))


def to_input(image: Image.Image, spec: InputSpec, *, bgr: bool = False) -> NDArray[np.float32]:
    """Scale to 0..1, subtract the mean, divide by the standard deviation, with one multiplication and one addition.

    Args:
        image: RGB, H x W.
        spec: the backbone's input.
        bgr: the picture's channels are blue, green, red.

    Returns:
        (1, 3, H, W) float32.
    """
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (spec.mean, spec.std))
    pixels = np.asarray(image)
    if bgr:
        pixels = pixels[:, :, ::-1]
    x: NDArray[np.float32] = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    x *= np.float32(1 / 255) / std
    x -= mean / std
    return x[None]
