"""How windows cover a feature."""

import math

import torch.nn.functional as F
from torch import Tensor

from bitneck.errors import InvalidConfig

__all__ = ["Geometry"]


class Geometry:
    """A feature of Hf x Wf, covered by windows of K x K at stride S and padded evenly on both sides.

    Args:
        size: (Hf, Wf).
        stride: S.
        kernel: K >= S, so that no position is skipped. None for S if the windows then tile the feature exactly, else
            for the smallest odd number >= S.

    Raises:
        InvalidConfig: the stride is larger than the feature, or the kernel is smaller than the stride.
    """

    def __init__(self, size: tuple[int, int], stride: int, kernel: int | None = None) -> None:
        if not 1 <= stride <= min(size):
            raise InvalidConfig(f"stride {stride} does not fit a feature of {size[0]}x{size[1]}; use 1 to {min(size)}")
        if kernel is None:
            kernel = stride if all(n % stride == 0 for n in size) else stride | 1
        if kernel < stride:
            raise InvalidConfig(f"kernel {kernel} is smaller than the stride {stride}: it would skip positions")
        self.size = size
        self.stride = stride
        self.kernel = kernel
        self.windows = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        spare = [(m - 1) * stride + kernel - n for m, n in zip(self.windows, size, strict=True)]
        self.before = (spare[0] // 2, spare[1] // 2)
        self.after = (spare[0] - self.before[0], spare[1] - self.before[1])

    def pad(self, f: Tensor) -> Tensor:
        """Add zeros around a feature, so that the windows fit exactly."""
        return F.pad(f, (self.before[1], self.after[1], self.before[0], self.after[0]))

    def crop(self, f: Tensor) -> Tensor:
        """Undo `pad`, after a transposed convolution."""
        return f[..., self.before[0] : self.before[0] + self.size[0], self.before[1] : self.before[1] + self.size[1]]
