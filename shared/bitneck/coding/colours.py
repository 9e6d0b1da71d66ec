"""A colour for each class of a class map, for pictures of it. Pure."""

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.class_map import MAX_CLASSES

__all__ = ["colours"]


def colours() -> NDArray[np.uint8]:
    """The colour of each class, (256, 3) uint8 RGB: the same on every machine, and no two are equal.

    It is the colour map of PASCAL VOC: the bits of the index, three at a time, are the highest bits of red, green and
    blue. VOC begins with black for the background. There is no background class here, so this map begins with VOC's
    second colour, and black comes last.
    """
    index = (np.arange(MAX_CLASSES) + 1) % MAX_CLASSES
    rgb = np.zeros((MAX_CLASSES, 3), dtype=np.uint8)
    for bit in range(8):
        rgb[:, bit % 3] |= (((index >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return rgb
