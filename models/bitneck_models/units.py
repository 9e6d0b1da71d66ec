"""The bottleneck unit: a trained encoder and decoder at a split point.

    f (N, C, Hf, Wf) --encoder--> y (N, Cr, h, w)         h = ceil(Hf / S), w = ceil(Wf / S)
    y_hat            --decoder--> f_hat (N, C, Hf, Wf)

The depthwise-separable topology of the paper (section 3, Table 3), with four differences, each measured in
``docs/decisions.md``: the depthwise kernel covers its stride; it may have several filters a channel; the latent and the
decoder's output have no activation, because the features at our split points have none; and the activation inside is a
PReLU that starts as the identity, so that a unit can be started from a linear solution and still become non-linear.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck.errors import InvalidConfig

__all__ = ["BottleneckUnit", "Decoder", "Encoder", "Geometry", "prune_channels"]

Activation = Literal["prelu", "relu", "none"]


class Geometry:
    """How a feature of Hf x Wf is covered by windows of K x K at stride S, padded evenly on both sides.

    Args:
        size: (Hf, Wf).
        stride: S.
        kernel: K >= S, so that no position is skipped; None for the smallest odd number >= S, or S itself where the
            windows then tile the feature exactly.

    Raises:
        InvalidConfig: a stride larger than the feature, or a kernel smaller than the stride.
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
        self.latent = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        spare = [(m - 1) * stride + kernel - n for m, n in zip(self.latent, size, strict=True)]
        self.before = (spare[0] // 2, spare[1] // 2)
        self.after = (spare[0] - self.before[0], spare[1] - self.before[1])

    def pad(self, f: Tensor) -> Tensor:
        """Zeros around a feature, so that the windows fit exactly."""
        return F.pad(f, (self.before[1], self.after[1], self.before[0], self.after[0]))

    def crop(self, f: Tensor) -> Tensor:
        """The inverse of `pad`, after a transposed convolution."""
        return f[..., self.before[0] : self.before[0] + self.size[0], self.before[1] : self.before[1] + self.size[1]]


def _activation(kind: Activation, channels: int) -> nn.Module:
    match kind:
        case "prelu":
            return nn.PReLU(channels, init=1.0)
        case "relu":
            return nn.ReLU()
        case "none":
            return nn.Identity()


class Encoder(nn.Module):
    """Depthwise K x K at stride S with D filters a channel, batch norm, activation; 1x1 to Cr, batch norm, activation.

    Args:
        channels: C.
        latent_channels: Cr.
        geometry: windows over the feature.
        filters: D.
        inner: activation after the depthwise layer.
        outer: activation of the latent.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        geometry: Geometry,
        filters: int,
        inner: Activation,
        outer: Activation,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        wide = channels * filters
        self.spatial = nn.Conv2d(channels, wide, geometry.kernel, geometry.stride, groups=channels, bias=False)
        self.spatial_norm = nn.BatchNorm2d(wide)
        self.inner = _activation(inner, wide)
        self.mix = nn.Conv2d(wide, latent_channels, 1, bias=False)
        self.mix_norm = nn.BatchNorm2d(latent_channels)
        self.outer = _activation(outer, latent_channels)

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, Hf, Wf) to (N, Cr, h, w)."""
        t = self.inner(self.spatial_norm(self.spatial(self.geometry.pad(f))))  # (N, C * D, h, w)
        y: Tensor = self.outer(self.mix_norm(self.mix(t)))  # (N, Cr, h, w)
        return y


class Decoder(nn.Module):
    """1x1 to C * D, batch norm, activation; transposed depthwise K x K at stride S, batch norm, activation.

    Args:
        channels: C.
        latent_channels: Cr.
        geometry: windows over the feature.
        filters: D.
        inner: activation after the 1x1 layer.
        outer: activation of the output; none where the head ends without one.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        geometry: Geometry,
        filters: int,
        inner: Activation,
        outer: Activation,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        wide = channels * filters
        self.mix = nn.Conv2d(latent_channels, wide, 1, bias=False)
        self.mix_norm = nn.BatchNorm2d(wide)
        self.inner = _activation(inner, wide)
        self.spatial = nn.ConvTranspose2d(wide, channels, geometry.kernel, geometry.stride, groups=channels, bias=False)
        self.spatial_norm = nn.BatchNorm2d(channels)
        self.outer = _activation(outer, channels)

    def forward(self, y_hat: Tensor) -> Tensor:
        """(N, Cr, h, w) to (N, C, Hf, Wf)."""
        t = self.inner(self.mix_norm(self.mix(y_hat)))  # (N, C * D, h, w)
        f_hat: Tensor = self.outer(self.spatial_norm(self.geometry.crop(self.spatial(t))))  # (N, C, Hf, Wf)
        return f_hat


def prune_channels(unit: "BottleneckUnit", keep: Tensor) -> "BottleneckUnit":
    """A unit with some of the latent channels only; what the others added at symbol zero was nothing.

    Args:
        unit: with linear latents (``outer="none"``).
        keep: indices of the channels to keep, (k,) int64.

    Returns:
        A new unit, in evaluation mode.

    Raises:
        InvalidConfig: no channel is kept, or the latents have an activation.
    """
    if keep.numel() == 0:
        raise InvalidConfig("every latent channel would be pruned: the latent has collapsed")
    if unit.outer != "none":
        raise InvalidConfig("only units with linear latents can be pruned")
    stride, kernel = unit.geometry.stride, unit.geometry.kernel
    channels = int(keep.numel())
    small = BottleneckUnit(unit.feature_shape, channels, stride, kernel, unit.filters, unit.inner, unit.outer)
    state = unit.state_dict()
    for name, value in state.items():
        if name.startswith(("encoder.mix.", "encoder.mix_norm.")) and value.ndim:
            state[name] = value[keep]
        elif name == "decoder.mix.weight":
            state[name] = value[:, keep]
    small.load_state_dict(state)
    return small.eval()


class BottleneckUnit(nn.Module):
    """Encoder and decoder of one operating point.

    Args:
        feature_shape: (C, Hf, Wf) at the split point.
        latent_channels: Cr.
        stride: S.
        kernel: see `Geometry`.
        filters: D, depthwise filters a channel. With D = 1, as in the paper, every window is coded by itself; with
            D = g * g a window can be as large as the feature and still keep g x g places of it, and the 1x1 layers
            see them together, so that what neighbouring places share is coded once.
        inner: activation between a half's two layers.
        outer: activation of the latent and of the decoder's output.

    Raises:
        InvalidConfig: a geometry that does not fit, or more latent channels than C * D.
    """

    def __init__(
        self,
        feature_shape: tuple[int, int, int],
        latent_channels: int,
        stride: int,
        kernel: int | None = None,
        filters: int = 1,
        inner: Activation = "prelu",
        outer: Activation = "none",
    ) -> None:
        super().__init__()
        channels, height, width = feature_shape
        if not 1 <= latent_channels <= channels * filters:
            raise InvalidConfig(f"{latent_channels} latent channels, expected 1 to {channels} x {filters} filters")
        geometry = Geometry((height, width), stride, kernel)
        self.feature_shape = feature_shape
        self.latent_shape = (latent_channels, *geometry.latent)
        self.geometry = geometry
        self.filters = filters
        self.inner: Activation = inner
        self.outer: Activation = outer
        self.encoder = Encoder(channels, latent_channels, geometry, filters, inner, outer)
        self.decoder = Decoder(channels, latent_channels, geometry, filters, inner, outer)

    @property
    def parameters_count(self) -> int:
        """Number of trained parameters, batch norm included."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, f: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Encode, round with a straight-through gradient, decode.

        Args:
            f: feature, (N, C, Hf, Wf).
            step: quantizer step Q.

        Returns:
            The latent y (N, Cr, h, w) before rounding, and f_hat (N, C, Hf, Wf).
        """
        y = self.encoder(f)
        y_hat = y + (torch.round(y / step) * step - y).detach()
        return y, self.decoder(y_hat)
