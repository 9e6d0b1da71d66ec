"""The bottleneck unit: a trained encoder and decoder at a split point.

    f (N, C, Hf, Wf) --encoder--> y (N, Cr, h, w)         h = ceil(Hf / S), w = ceil(Wf / S)
    y_hat            --decoder--> f_hat (N, C, Hf, Wf)

    separable    depthwise K x K at S, 1x1 to Cr                            the paper's unit (section 3, Table 3)
    separable2   the same, then depthwise 3x3, 1x1
    conv         K x K at S to Cr
    conv2        the same, then 3x3
    inverted     1x1 to H, depthwise K x K at S, 1x1 to Cr               ours: can begin with the network's next layer
    nested       depthwise K x K at S, 1x1 to H, G1 x G2 windows to Cr   ours: codes what windows share once

Each decoder mirrors its encoder; that of ``inverted`` is the one of ``separable``. With ``nested`` the latent is
smaller, h = ceil(Hf / S) / G1 and w = ceil(Wf / S) / G2. Every convolution has a batch norm.
Differences from the paper, each measured in ``docs/decisions.md``: the kernel covers its stride; a depthwise layer may
have several filters a channel; the latent and the decoder's output have no activation, because the features at our
split points have none; and the activations inside are PReLUs that start as the identity, so that a unit can be started
from a linear solution and still become non-linear.
"""

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck.errors import InvalidConfig

__all__ = ["BottleneckUnit", "Decoder", "Encoder", "Geometry", "SpaceToDepth", "Topology", "prune_channels"]

Activation = Literal["prelu", "relu", "none"]
Topology = Literal["separable", "separable2", "conv", "conv2", "inverted", "nested"]


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


class _Pad(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, f: Tensor) -> Tensor:
        return self.geometry.pad(f)


class _Crop(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, f: Tensor) -> Tensor:
        return self.geometry.crop(f)


class SpaceToDepth(nn.Module):
    """Groups of positions to channels; those of one channel stand together, row by row.

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


class _DepthToSpace(nn.Module):
    """The inverse of `SpaceToDepth`."""

    def __init__(self, group: tuple[int, int]) -> None:
        super().__init__()
        self.group = group

    def forward(self, t: Tensor) -> Tensor:
        """(N, H * G1 * G2, h, w) to (N, H, h * G1, w * G2)."""
        (rows, columns), (n, c, h, w) = self.group, t.shape
        t = t.reshape(n, c // (rows * columns), rows, columns, h, w).permute(0, 1, 4, 2, 5, 3)
        return t.reshape(n, c // (rows * columns), h * rows, w * columns)


def _activation(kind: Activation, channels: int) -> nn.Module:
    match kind:
        case "prelu":
            return nn.PReLU(channels, init=1.0)
        case "relu":
            return nn.ReLU()
        case "none":
            return nn.Identity()


class _Spread(nn.ConvTranspose2d):
    """Transposed depthwise K x K at stride S, D channels in for each channel out.

    Where windows do not overlap it is a product with the kernel, which is many times faster than a grouped transposed
    convolution (measured on two AVX-512 cores, 128 x 1280 x 1 x 1 to 7 x 7, forward and backward: 24 ms against 92 ms
    in float32, and 21 ms against 965 ms in bfloat16).
    """

    def forward(self, t: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or self.kernel_size != self.stride:
            with torch.autocast(t.device.type, enabled=False):  # bfloat16 is slower here
                return super().forward(t.float(), output_size)
        n, _, h, w = t.shape
        k, c = self.kernel_size[0], self.out_channels
        kernels = self.weight.view(c, -1, k, k)  # (C, D, K, K)
        spread = torch.einsum("ncdhw,cdij->nchiwj", t.reshape(n, c, -1, h, w), kernels)
        return spread.reshape(n, c, h * k, w * k)


class Encoder(nn.Module):
    """``body``, then ``mix`` to Cr channels, batch norm, activation.

    Args:
        body: the layers before the last; may be empty.
        mix: the last convolution.
        outer: activation of the latent.
    """

    def __init__(self, body: nn.Sequential, mix: nn.Conv2d, outer: Activation) -> None:
        super().__init__()
        self.body = body
        self.mix = mix
        self.mix_norm = nn.BatchNorm2d(mix.out_channels)
        self.outer = _activation(outer, mix.out_channels)

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, Hf, Wf) to (N, Cr, h, w)."""
        return self.latent(self.body(f))

    def latent(self, t: Tensor) -> Tensor:
        """The body's output to the latent (N, Cr, h, w)."""
        y: Tensor = self.outer(self.mix_norm(self.mix(t)))
        return y


class Decoder(nn.Module):
    """``mix`` from Cr channels, then ``body``, the mirror of the encoder's.

    Args:
        mix: the first convolution.
        body: what follows it, its batch norm first.
    """

    def __init__(self, mix: nn.Conv2d | nn.ConvTranspose2d, body: nn.Sequential) -> None:
        super().__init__()
        self.mix = mix
        self.body = body

    def forward(self, y_hat: Tensor) -> Tensor:
        """(N, Cr, h, w) to (N, C, Hf, Wf)."""
        f_hat: Tensor = self.body(self.mix(y_hat))  # (N, C, Hf, Wf)
        return f_hat


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, same: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if same else 0, bias=False)


class _Builder:
    """The layers of each topology; C, Cr, D, H, (G1, G2) and activations as in `BottleneckUnit`."""

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        geometry: Geometry,
        filters: int,
        hidden: int,
        group: tuple[int, int],
        inner: Activation,
        outer: Activation,
    ) -> None:
        self.group = group
        self.c, self.cr, self.d, self.h = channels, latent_channels, filters, hidden
        self.geometry, self.inner, self.outer = geometry, inner, outer

    def act(self, channels: int) -> nn.Module:
        return _activation(self.inner, channels)

    def down(self, inputs: int, filters: int) -> nn.Conv2d:
        """Depthwise, K x K at stride S, D filters a channel."""
        g = self.geometry
        return nn.Conv2d(inputs, inputs * filters, g.kernel, g.stride, groups=inputs, bias=False)

    def up(self, outputs: int, filters: int) -> nn.ConvTranspose2d:
        g = self.geometry
        return _Spread(outputs * filters, outputs, g.kernel, g.stride, groups=outputs, bias=False)

    def separable(self) -> tuple[Encoder, Decoder]:
        wide, norm = self.c * self.d, nn.BatchNorm2d
        encoder = _named(
            pad=_Pad(self.geometry), spatial=self.down(self.c, self.d), spatial_norm=norm(wide), inner=self.act(wide)
        )
        return Encoder(encoder, _conv(wide, self.cr, 1), self.outer), self.places()

    def places(self) -> Decoder:
        """1x1 to D values for each channel of the feature, then each window's places."""
        wide, norm = self.c * self.d, nn.BatchNorm2d
        decoder = _named(
            mix_norm=norm(wide), inner=self.act(wide), spatial=self.up(self.c, self.d), crop=_Crop(self.geometry),
            spatial_norm=norm(self.c), outer=_activation(self.outer, self.c),
        )  # fmt: skip
        return Decoder(_conv(self.cr, wide, 1), decoder)

    def separable2(self) -> tuple[Encoder, Decoder]:
        wide, h, norm = self.c * self.d, self.h, nn.BatchNorm2d
        encoder = _named(
            pad=_Pad(self.geometry), spatial=self.down(self.c, self.d), spatial_norm=norm(wide), inner=self.act(wide),
            first=_conv(wide, h, 1), first_norm=norm(h), first_inner=self.act(h),
            local=nn.Conv2d(h, h, 3, padding=1, groups=h, bias=False), local_norm=norm(h), local_inner=self.act(h),
        )  # fmt: skip
        decoder = _named(
            mix_norm=norm(h), local_inner=self.act(h),
            local=nn.Conv2d(h, h, 3, padding=1, groups=h, bias=False), local_norm=norm(h), first_inner=self.act(h),
            first=_conv(h, wide, 1), first_norm=norm(wide), inner=self.act(wide),
            spatial=self.up(self.c, self.d), crop=_Crop(self.geometry), spatial_norm=norm(self.c),
            outer=_activation(self.outer, self.c),
        )  # fmt: skip
        return Encoder(encoder, _conv(h, self.cr, 1), self.outer), Decoder(_conv(self.cr, h, 1), decoder)

    def conv(self) -> tuple[Encoder, Decoder]:
        g, norm = self.geometry, nn.BatchNorm2d
        up = nn.ConvTranspose2d(self.cr, self.c, g.kernel, g.stride, bias=False)
        decoder = _named(crop=_Crop(g), mix_norm=norm(self.c), outer=_activation(self.outer, self.c))
        return Encoder(_named(pad=_Pad(g)), _conv(self.c, self.cr, g.kernel, g.stride), self.outer), Decoder(
            up, decoder
        )

    def conv2(self) -> tuple[Encoder, Decoder]:
        g, h, norm = self.geometry, self.h, nn.BatchNorm2d
        encoder = _named(
            pad=_Pad(g), first=_conv(self.c, h, g.kernel, g.stride), first_norm=norm(h), first_inner=self.act(h)
        )
        decoder = _named(
            mix_norm=norm(h), first_inner=self.act(h),
            first=nn.ConvTranspose2d(h, self.c, g.kernel, g.stride, bias=False), crop=_Crop(g),
            first_norm=norm(self.c), outer=_activation(self.outer, self.c),
        )  # fmt: skip
        mixes = _conv(h, self.cr, 3, same=True), _conv(self.cr, h, 3, same=True)
        return Encoder(encoder, mixes[0], self.outer), Decoder(mixes[1], decoder)

    def inverted(self) -> tuple[Encoder, Decoder]:
        h, norm = self.h, nn.BatchNorm2d
        encoder = _named(
            expand=_conv(self.c, h, 1), expand_norm=norm(h), expand_inner=nn.ReLU6(),
            pad=_Pad(self.geometry), spatial=self.down(h, 1), spatial_norm=norm(h), inner=self.act(h),
        )  # fmt: skip
        return Encoder(encoder, _conv(h, self.cr, 1), self.outer), self.places()

    def nested(self) -> tuple[Encoder, Decoder]:
        wide, h, norm = self.c * self.d, self.h, nn.BatchNorm2d
        grouped = h * math.prod(self.group)
        encoder = _named(
            pad=_Pad(self.geometry), spatial=self.down(self.c, self.d), spatial_norm=norm(wide), inner=self.act(wide),
            first=_conv(wide, h, 1), first_norm=norm(h), first_inner=self.act(h), gather=SpaceToDepth(self.group),
        )  # fmt: skip
        decoder = _named(
            mix_norm=norm(grouped), first_inner=self.act(grouped), scatter=_DepthToSpace(self.group),
            first=_conv(h, wide, 1), first_norm=norm(wide), inner=self.act(wide),
            spatial=self.up(self.c, self.d), crop=_Crop(self.geometry), spatial_norm=norm(self.c),
            outer=_activation(self.outer, self.c),
        )  # fmt: skip
        return Encoder(encoder, _conv(grouped, self.cr, 1), self.outer), Decoder(_conv(self.cr, grouped, 1), decoder)


class BottleneckUnit(nn.Module):
    """Encoder and decoder of one operating point.

    Args:
        feature_shape: (C, Hf, Wf) at the split point.
        latent_channels: Cr.
        stride: S.
        kernel: see `Geometry`.
        filters: D, depthwise filters a channel; of ``inverted`` the decoder's, of ``conv`` and ``conv2`` always 1. With
            D = 1, as in the paper, every window is coded by itself; with D = g * g a window can be as large as the
            feature and still keep g x g places of it, and the 1x1 layers see them together, so that what neighbouring
            places share is coded once.
        topology: see the module.
        hidden: H, channels between the layers of ``separable2``, ``conv2`` and ``nested`` (None for Cr) and of
            ``inverted`` (None for 4 C).
        group: (G1, G2), windows that ``nested`` codes together, rows and columns; the numbers of windows must be
            multiples of them.
        inner: activation between the layers of a half.
        outer: activation of the latent and of the decoder's output.

    Raises:
        InvalidConfig: a geometry or a group that does not fit, an option the topology has no use for, or more latent
            channels than the layer before them.
    """

    def __init__(
        self,
        feature_shape: tuple[int, int, int],
        latent_channels: int,
        stride: int,
        kernel: int | None = None,
        filters: int = 1,
        topology: Topology = "separable",
        hidden: int | None = None,
        inner: Activation = "prelu",
        outer: Activation = "none",
        group: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        channels, height, width = feature_shape
        if topology not in get_args(Topology):
            raise InvalidConfig(f"no topology {topology!r}; known: {', '.join(get_args(Topology))}")
        if filters != 1 and topology.startswith("conv"):
            raise InvalidConfig(f"topology {topology} has one filter a channel, got filters = {filters}")
        if hidden is not None and topology in ("separable", "conv"):
            raise InvalidConfig(f"topology {topology} has one layer, so nothing is hidden; got hidden = {hidden}")
        geometry = Geometry((height, width), stride, kernel)
        if group != (1, 1) and topology != "nested":
            raise InvalidConfig(f"topology {topology} codes each window by itself; got group = {list(group)}")
        if any(g < 1 or n % g for n, g in zip(geometry.latent, group, strict=True)):
            raise InvalidConfig(
                f"groups of {group[0]}x{group[1]} do not tile the {geometry.latent[0]}x{geometry.latent[1]} windows"
            )
        self.hidden = hidden or (4 * channels if topology == "inverted" else latent_channels)
        limits: dict[str, int] = {
            "separable": channels * filters,
            "separable2": self.hidden,
            "conv": channels * geometry.kernel**2,
            "conv2": 9 * self.hidden,
            "inverted": self.hidden,
            "nested": self.hidden * math.prod(group),
        }
        if not 1 <= latent_channels <= limits[topology]:
            raise InvalidConfig(
                f"{latent_channels} latent channels, expected 1 to {limits[topology]} (topology {topology}, "
                f"{channels} feature channels, {filters} filters, {self.hidden} hidden, group {group[0]}x{group[1]})"
            )
        self.feature_shape = feature_shape
        self.latent_shape = (latent_channels, geometry.latent[0] // group[0], geometry.latent[1] // group[1])
        self.group = group
        self.geometry = geometry
        self.filters = filters
        self.topology: Topology = topology
        self.inner: Activation = inner
        self.outer: Activation = outer
        builder = _Builder(channels, latent_channels, geometry, filters, self.hidden, group, inner, outer)
        self.encoder: Encoder
        self.decoder: Decoder
        self.encoder, self.decoder = getattr(builder, topology)()

    def forward(self, f: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Encode, round with a straight-through gradient, decode.

        Args:
            f: feature, (N, C, Hf, Wf).
            step: quantizer step Q.

        Returns:
            The latent y (N, Cr, h, w) before rounding, and f_hat (N, C, Hf, Wf).
        """
        y = self.encoder(f)
        return y, self.decoder(self.rounded(y, step))

    @staticmethod
    def rounded(y: Tensor, step: float) -> Tensor:
        """The nearest multiples of the step, with a straight-through gradient."""
        return y + (torch.round(y / step) * step - y).detach()


def prune_channels(unit: BottleneckUnit, keep: Tensor) -> BottleneckUnit:
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
    small = BottleneckUnit(
        unit.feature_shape, int(keep.numel()), unit.geometry.stride, unit.geometry.kernel, unit.filters, unit.topology,
        None if unit.topology in ("separable", "conv") else unit.hidden, unit.inner, unit.outer,
        unit.group,
    )  # fmt: skip
    state = unit.state_dict()
    for name, value in state.items():
        if name.startswith(("encoder.mix.", "encoder.mix_norm.")) and value.ndim:
            state[name] = value[keep]
        elif name == "decoder.mix.weight":
            transposed = isinstance(unit.decoder.mix, nn.ConvTranspose2d)
            state[name] = value[keep] if transposed else value[:, keep]
    small.load_state_dict(state)
    return small.eval()
