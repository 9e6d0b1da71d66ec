"""Layers of the units that torch does not have.

Dimensions: N batch, C channels, D filters a channel, H hidden channels, K kernel, S stride, (G1, G2) group of windows.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck_models.units.geometry import Geometry

__all__ = [
    "Activation",
    "Crop",
    "DepthToSpace",
    "Means",
    "Pad",
    "Residual",
    "SpaceToDepth",
    "SplitPReLU",
    "Spread",
    "activation",
    "split_prelus",
]

_RESIDUAL_KERNEL = 5
_RESIDUAL_WIDTH = 2

Activation = Literal["prelu", "relu", "none"]


def activation(kind: Activation, channels: int) -> nn.Module:
    """An activation by name; a fresh PReLU is the identity."""
    match kind:
        case "prelu":
            return nn.PReLU(channels, init=1.0)
        case "relu":
            return nn.ReLU()
        case "none":
            return nn.Identity()


class Pad(nn.Module):
    """Zeros around a feature: see `Geometry.pad`."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, Hf, Wf) to its padded size."""
        return self.geometry.pad(f)


class Crop(nn.Module):
    """The inverse of `Pad`: see `Geometry.crop`."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, f: Tensor) -> Tensor:
        """The padded size to (N, C, Hf, Wf)."""
        return self.geometry.crop(f)


class Means(nn.AvgPool2d):
    """Means over windows of P x P that tile a feature; a window that reaches beyond its edge counts what is inside.

    Args:
        side: P.
        before: rows and columns of windows that lie outside, above and to the left.
    """

    def __init__(self, side: int, before: tuple[int, int]) -> None:
        super().__init__(side, padding=before, ceil_mode=True, count_include_pad=False)


class Residual(nn.Module):
    """``x + pointwise(relu(wider(spatial(x))))``, after the block of ConvNeXt (2201.03545).

    It is smaller: 5x5 in place of 7x7, twice as wide inside in place of four times, ReLU, and no norm.

    The last layer's weights begin as zeros, so that a fresh block is the identity.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, k = _RESIDUAL_WIDTH * channels, _RESIDUAL_KERNEL
        self.spatial = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)
        self.wider = nn.Conv2d(channels, wide, 1)
        self.pointwise = nn.Conv2d(wide, channels, 1)
        for parameter in self.pointwise.parameters():
            nn.init.zeros_(parameter)

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, H, W) to the same size."""
        refined: Tensor = f + self.pointwise(F.relu(self.wider(self.spatial(f))))
        return refined


class SpaceToDepth(nn.Module):
    """Moves groups of positions into channels; the positions of one channel stay together, row by row.

    Args:
        group: (G1, G2) windows.
    """

    def __init__(self, group: tuple[int, int]) -> None:
        super().__init__()
        self.group = group

    def forward(self, t: Tensor) -> Tensor:
        """(N, H, h * G1, w * G2) to (N, H * G1 * G2, h, w)."""
        (rows, columns), (n, c, height, width) = self.group, t.shape
        t = t.reshape(n, c, height // rows, rows, width // columns, columns).permute(0, 1, 3, 5, 2, 4)
        return t.reshape(n, c * rows * columns, height // rows, width // columns)


class DepthToSpace(nn.Module):
    """The inverse of `SpaceToDepth`."""

    def __init__(self, group: tuple[int, int]) -> None:
        super().__init__()
        self.group = group

    def forward(self, t: Tensor) -> Tensor:
        """(N, H * G1 * G2, h, w) to (N, H, h * G1, w * G2)."""
        (rows, columns), (n, c, h, w) = self.group, t.shape
        t = t.reshape(n, c // (rows * columns), rows, columns, h, w).permute(0, 1, 4, 2, 5, 3)
        return t.reshape(n, c // (rows * columns), h * rows, w * columns)


class Spread(nn.ConvTranspose2d):
    """Transposed depthwise convolution, K x K at stride S, with D input channels for each output channel.

    If windows do not overlap, it is computed as a product with the kernel, which is many times faster than a grouped
    transposed convolution (measured on two AVX-512 cores, 128 x 1280 x 1 x 1 to 7 x 7, forward and backward: 24 ms
    against 92 ms in float32, and 21 ms against 965 ms in bfloat16). In ONNX Runtime it is the other way round, but for
    a latent of one position (one thread, 1 x 448 x 7 x 7 to 14 x 14: 52 us against 258).
    """

    def forward(self, t: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C * D, h, w) to (N, C, (h - 1) * S + K, (w - 1) * S + K)."""
        if torch.compiler.is_exporting() and max(t.shape[2:]) > 1:
            return super().forward(t)
        if output_size is not None or self.kernel_size != self.stride:
            with torch.autocast(t.device.type, enabled=False):  # bfloat16 is slower here
                return super().forward(t.float(), output_size)
        n, _, h, w = t.shape
        k, c = self.kernel_size[0], self.out_channels
        kernels = self.weight.view(c, -1, k, k)  # (C, D, K, K)
        spread = torch.einsum("ncdhw,cdij->nchiwj", t.reshape(n, c, -1, h, w), kernels)
        return spread.reshape(n, c, h * k, w * k)


class SplitPReLU(nn.Module):
    """A PReLU as ONNX Runtime computes it fastest: two depthwise convolutions, which need no other memory layout.

    ``slope * t + (1 - slope) * relu(t)``; above zero it is rounded once more than a PReLU.

    Args:
        prelu: the trained one.
    """

    def __init__(self, prelu: nn.PReLU) -> None:
        super().__init__()
        slope = prelu.weight.detach()[:, None, None, None]  # (C, 1, 1, 1)
        self.slope = nn.Parameter(slope, requires_grad=False)
        self.above = nn.Parameter(1 - slope, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """(N, C, H, W) to the same size."""
        channels = len(self.slope)
        return F.conv2d(t, self.slope, groups=channels) + F.conv2d(F.relu(t), self.above, groups=channels)


def split_prelus(module: nn.Module) -> nn.Module:
    """A copy of a module for export, with each PReLU as a `SplitPReLU`. It shares the module's weights."""
    copied = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.PReLU):
                setattr(parent, name, SplitPReLU(child))
    return copied
