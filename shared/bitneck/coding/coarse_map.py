"""Class maps of fewer pixels, for a device that can do without sharp edges. Integers only: the same on every machine.

    map (H, W) -> coarse -> every S-th pixel (h, w) ==> refined -> map (H, W)

Pixel k of a coarse map is pixel ``offset + S * k`` of the map, down and across, where the offset centres the grid.
Between them, each class spreads linearly, and the strongest one takes the pixel.

Dimensions: H x W the map's pixels, h x w those of the coarse map, S the step.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["coarse", "coarse_size", "refined"]


def coarse_size(size: int, step: int) -> int:
    """Pixels of a coarse map along a side of `size` pixels."""
    return (size - 1) // step + 1


def coarse(classes: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Every S-th pixel of a map (H, W) uint8, down and across: (h, w) uint8."""
    rows, columns = (_offset(size, step) for size in classes.shape)
    return np.ascontiguousarray(classes[rows::step, columns::step])


def refined(classes: NDArray[np.uint8], step: int, *, height: int, width: int) -> NDArray[np.uint8]:
    """A coarse map (h, w) uint8 back in full size, (H, W) uint8. Of equally strong classes the smallest index wins.

    Args:
        classes: as `coarse` gives it, of the size that `coarse_size` says.
        step: S, 1 to 15.
        height: H.
        width: W.
    """
    if step == 1:
        return classes
    (above, below, down), (left, right, across) = _places(height, step), _places(width, step)
    best = np.zeros((height, width), dtype=np.uint8)
    strongest = np.zeros((height, width), dtype=np.uint8)
    for k in np.unique(classes):
        plane = (classes == k).view(np.uint8)  # (h, w), 0 or 1
        lines = plane[above] * (step - down)[:, None] + plane[below] * down[:, None]  # (H, w), at most S
        strength = lines[:, left] * (step - across) + lines[:, right] * across  # (H, W), at most S * S
        stronger = strength > strongest
        best[stronger] = k
        np.maximum(strongest, strength, out=strongest)
    return best


def _offset(size: int, step: int) -> int:
    """The place of the first pixel of a coarse map in the map: as many pixels are left out before it as at the end."""
    return (size - 1) % step // 2


def _places(size: int, step: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint8]]:
    """For each pixel of a side: the coarse pixels before and behind it, and how far it is from the first, in pixels."""
    last = coarse_size(size, step) - 1
    at = np.clip(np.arange(size) - _offset(size, step), 0, last * step)
    before = at // step
    return before, np.minimum(before + 1, last), (at % step).astype(np.uint8)
