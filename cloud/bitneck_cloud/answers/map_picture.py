"""Class maps as pictures."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.coding.class_map import MAX_CLASSES, decode_map
from bitneck.coding.colours import colours

__all__ = ["png_of", "png_of_coded"]


def png_of(classes: NDArray[np.uint8]) -> bytes:
    """An indexed PNG of a class map (H, W): a pixel's value is its class, shown in the class's colour."""
    picture = Image.fromarray(classes)
    picture.putpalette(colours().tobytes())  # makes it a palette picture
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def png_of_coded(coded: bytes, height: int, width: int) -> bytes:
    """The same of a map as `bitneck.coding.class_map` codes it.

    Raises:
        BitneckError: it is no map of this size.
    """
    return png_of(decode_map(coded, height=height, width=width, number=MAX_CLASSES))
