"""The topologies of a unit: the layers of its encoder and its decoder.

    separable    depthwise K x K at S, 1x1 to Cr                         the paper's unit (section 3, Table 3)
    separable2   the same, then depthwise 3x3, 1x1
    conv         K x K at S to Cr
    conv2        the same, then 3x3
    inverted     1x1 to H, depthwise K x K at S, 1x1 to Cr               ours: can start from the network's next layer
    nested       depthwise K x K at S, 1x1 to H, G1 x G2 windows to Cr   ours: codes once what windows share
    block        1x1 to H, depthwise K x K at S/P, mean of P x P, to Cr  ours: starts from the network's next block

Each decoder mirrors its encoder, except that ``inverted`` and ``block`` have the decoder of ``separable``. Every
convolution outside of residual blocks has a batch norm. The names of the layers are the names of the tensors in units
and bundles.

The encoder runs on the device, the decoder in the cloud, which can afford more: the decoders of ``separable`` and
``block`` may have residual blocks (a light encoder and a heavy decoder, as in Matsubara et al., 2108.11898).

Dimensions: N batch, C x Hf x Wf feature, Cr x h x w latent, D filters a channel, H hidden channels, K kernel, S stride,
(G1, G2) group of windows, P side of a mean, W width of a deep decoder.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from bitneck_models.units.geometry import Geometry
from bitneck_models.units.layers import (
    Activation,
    Crop,
    DepthToSpace,
    Means,
    Pad,
    Residual,
    SpaceToDepth,
    Spread,
    activation,
)

__all__ = ["TOPOLOGIES", "Decoder", "Encoder", "Plan", "Topology", "TopologyTraits"]

Topology = Literal["separable", "separable2", "conv", "conv2", "inverted", "nested", "block"]


class Encoder(nn.Module):
    """``body``, then ``mix`` to Cr channels, batch norm, activation.

    Args:
        body: the layers before the last convolution; may be empty.
        mix: the last convolution.
        outer: activation of the latent.
        copied: number of first layers that encoders may have in common, as copies of the network's next layer.
    """

    def __init__(self, body: nn.Sequential, mix: nn.Conv2d, outer: Activation, copied: int = 0) -> None:
        super().__init__()
        self.copied = copied
        self.body = body
        self.mix = mix
        self.mix_norm = nn.BatchNorm2d(mix.out_channels)
        self.outer = activation(outer, mix.out_channels)

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, Hf, Wf) to (N, Cr, h, w)."""
        return self.latent(self.body(f))

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The copied layers, and the rest: one after the other they are this encoder."""
        rest = nn.Sequential(self.body[self.copied :], self.mix, self.mix_norm, self.outer)
        return self.body[: self.copied].train(self.training), rest.train(self.training)

    def latent(self, t: Tensor) -> Tensor:
        """Output of the body to the latent (N, Cr, h, w)."""
        y: Tensor = self.outer(self.mix_norm(self.mix(t)))
        return y


class Decoder(nn.Module):
    """``mix`` from Cr channels, then ``body``.

    Args:
        mix: the first convolution.
        body: the layers after it; its batch norm is the first.
    """

    def __init__(self, mix: nn.Conv2d | nn.ConvTranspose2d, body: nn.Sequential) -> None:
        super().__init__()
        self.mix = mix
        self.body = body

    def forward(self, y_hat: Tensor) -> Tensor:
        """(N, Cr, h, w) to (N, C, Hf, Wf)."""
        f_hat: Tensor = self.body(self.mix(y_hat))  # (N, C, Hf, Wf)
        return f_hat


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes that the layers of a unit are built from.

    Attributes:
        channels: C.
        latent_channels: Cr.
        geometry: windows over the feature.
        kernel: K as it was given; None for the geometry's own.
        pool: P.
        filters: D.
        hidden: H.
        group: (G1, G2).
        decoder_blocks: residual blocks of the decoder, at the latent's size and at the feature's.
        decoder_width: W, channels of those at the latent's size.
        inner: activation between the layers of a half.
        outer: activation of the latent and of the decoder's output.
    """

    channels: int
    latent_channels: int
    geometry: Geometry
    kernel: int | None
    pool: int
    filters: int
    hidden: int
    group: tuple[int, int]
    decoder_blocks: tuple[int, int]
    decoder_width: int
    inner: Activation
    outer: Activation

    @property
    def wide(self) -> int:
        """C * D, channels after the depthwise layer."""
        return self.channels * self.filters

    @property
    def grouped(self) -> int:
        """H * G1 * G2, channels of a group of windows."""
        return self.hidden * math.prod(self.group)

    def act(self, channels: int) -> nn.Module:
        """An activation between layers."""
        return activation(self.inner, channels)

    def down(self, inputs: int, filters: int) -> nn.Conv2d:
        """Depthwise K x K at stride S."""
        g = self.geometry
        return nn.Conv2d(inputs, inputs * filters, g.kernel, g.stride, groups=inputs, bias=False)

    def up(self) -> nn.ConvTranspose2d:
        """Transposed depthwise K x K at stride S, from C * D to C channels."""
        g = self.geometry
        return Spread(self.wide, self.channels, g.kernel, g.stride, groups=self.channels, bias=False)


Halves = tuple[Encoder, Decoder]


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, same: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if same else 0, bias=False)


def _local(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def _separable(p: Plan) -> Halves:
    encoder = _named(
        pad=Pad(p.geometry), spatial=p.down(p.channels, p.filters), spatial_norm=nn.BatchNorm2d(p.wide),
        inner=p.act(p.wide),
    )  # fmt: skip
    return Encoder(encoder, _conv(p.wide, p.latent_channels, 1), p.outer), _separable_decoder(p)


def _separable_decoder(p: Plan) -> Decoder:
    """1x1 to D values for each channel of the feature, then the positions of each window."""
    if any(p.decoder_blocks):
        return _deep_decoder(p)
    decoder = _named(
        mix_norm=nn.BatchNorm2d(p.wide), inner=p.act(p.wide), spatial=p.up(), crop=Crop(p.geometry),
        spatial_norm=nn.BatchNorm2d(p.channels), outer=activation(p.outer, p.channels),
    )  # fmt: skip
    return Decoder(_conv(p.latent_channels, p.wide, 1), decoder)


def _deep_decoder(p: Plan) -> Decoder:
    """The same with residual blocks, which begin as the identity."""
    (coarse, fine), w, norm = p.decoder_blocks, p.decoder_width, nn.BatchNorm2d
    decoder = _named(
        mix_norm=norm(w), coarse=nn.Sequential(*(Residual(w) for _ in range(coarse))),
        up=_conv(w, p.wide, 1), up_norm=norm(p.wide), inner=p.act(p.wide),
        spatial=p.up(), crop=Crop(p.geometry), spatial_norm=norm(p.channels),
        fine=nn.Sequential(*(Residual(p.channels) for _ in range(fine))), outer=activation(p.outer, p.channels),
    )  # fmt: skip
    return Decoder(_conv(p.latent_channels, w, 1), decoder)


def _separable2(p: Plan) -> Halves:
    h, norm = p.hidden, nn.BatchNorm2d
    encoder = _named(
        pad=Pad(p.geometry), spatial=p.down(p.channels, p.filters), spatial_norm=norm(p.wide), inner=p.act(p.wide),
        first=_conv(p.wide, h, 1), first_norm=norm(h), first_inner=p.act(h),
        local=_local(h), local_norm=norm(h), local_inner=p.act(h),
    )  # fmt: skip
    decoder = _named(
        mix_norm=norm(h), local_inner=p.act(h), local=_local(h), local_norm=norm(h), first_inner=p.act(h),
        first=_conv(h, p.wide, 1), first_norm=norm(p.wide), inner=p.act(p.wide),
        spatial=p.up(), crop=Crop(p.geometry), spatial_norm=norm(p.channels), outer=activation(p.outer, p.channels),
    )  # fmt: skip
    return Encoder(encoder, _conv(h, p.latent_channels, 1), p.outer), Decoder(_conv(p.latent_channels, h, 1), decoder)


def _plain(p: Plan) -> Halves:
    g = p.geometry
    up = nn.ConvTranspose2d(p.latent_channels, p.channels, g.kernel, g.stride, bias=False)
    decoder = _named(crop=Crop(g), mix_norm=nn.BatchNorm2d(p.channels), outer=activation(p.outer, p.channels))
    mix = _conv(p.channels, p.latent_channels, g.kernel, g.stride)
    return Encoder(_named(pad=Pad(g)), mix, p.outer), Decoder(up, decoder)


def _plain2(p: Plan) -> Halves:
    g, h, norm = p.geometry, p.hidden, nn.BatchNorm2d
    encoder = _named(
        pad=Pad(g), first=_conv(p.channels, h, g.kernel, g.stride), first_norm=norm(h), first_inner=p.act(h)
    )
    decoder = _named(
        mix_norm=norm(h), first_inner=p.act(h),
        first=nn.ConvTranspose2d(h, p.channels, g.kernel, g.stride, bias=False), crop=Crop(g),
        first_norm=norm(p.channels), outer=activation(p.outer, p.channels),
    )  # fmt: skip
    mixes = _conv(h, p.latent_channels, 3, same=True), _conv(p.latent_channels, h, 3, same=True)
    return Encoder(encoder, mixes[0], p.outer), Decoder(mixes[1], decoder)


def _inverted(p: Plan) -> Halves:
    h, norm = p.hidden, nn.BatchNorm2d
    encoder = _named(
        expand=_conv(p.channels, h, 1), expand_norm=norm(h), expand_inner=nn.ReLU6(),
        pad=Pad(p.geometry), spatial=p.down(h, 1), spatial_norm=norm(h), inner=p.act(h),
    )  # fmt: skip
    return Encoder(encoder, _conv(h, p.latent_channels, 1), p.outer, copied=3), _separable_decoder(p)


def _nested(p: Plan) -> Halves:
    h, norm = p.hidden, nn.BatchNorm2d
    encoder = _named(
        pad=Pad(p.geometry), spatial=p.down(p.channels, p.filters), spatial_norm=norm(p.wide), inner=p.act(p.wide),
        first=_conv(p.wide, h, 1), first_norm=norm(h), first_inner=p.act(h), gather=SpaceToDepth(p.group),
    )  # fmt: skip
    decoder = _named(
        mix_norm=norm(p.grouped), first_inner=p.act(p.grouped), scatter=DepthToSpace(p.group),
        first=_conv(h, p.wide, 1), first_norm=norm(p.wide), inner=p.act(p.wide),
        spatial=p.up(), crop=Crop(p.geometry), spatial_norm=norm(p.channels), outer=activation(p.outer, p.channels),
    )  # fmt: skip
    mix = _conv(p.grouped, p.latent_channels, 1)
    return Encoder(encoder, mix, p.outer), Decoder(_conv(p.latent_channels, p.grouped, 1), decoder)


def _block(p: Plan) -> Halves:
    h, norm, size = p.hidden, nn.BatchNorm2d, p.geometry.size
    spatial = Geometry(size, p.geometry.stride // p.pool, p.kernel)
    means = Geometry(spatial.windows, p.pool, p.pool)
    encoder = _named(
        expand=_conv(p.channels, h, 1), expand_norm=norm(h), expand_inner=nn.ReLU6(),
        pad=Pad(spatial), spatial=nn.Conv2d(h, h, spatial.kernel, spatial.stride, groups=h, bias=False),
        spatial_norm=norm(h), inner=nn.ReLU6(), means=Means(p.pool, means.before) if p.pool > 1 else nn.Identity(),
    )  # fmt: skip
    return Encoder(encoder, _conv(h, p.latent_channels, 1), p.outer), _separable_decoder(p)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyTraits:
    """What distinguishes a topology.

    Attributes:
        build: makes both halves. The order in which it makes the layers decides their random weights.
        most_channels: largest Cr.
        takes_filters: D may be more than 1.
        takes_hidden: H may be given.
        takes_group: (G1, G2) may be more than one window.
        takes_blocks: the decoder may have residual blocks.
        takes_pool: P may be more than 1. The windows that are decoded then tile the feature: K is the encoder's alone.
        hidden_by_channels: H without a given value: a multiple of C, or None for Cr.
    """

    build: Callable[[Plan], Halves]
    most_channels: Callable[[Plan], int]
    takes_filters: bool = True
    takes_hidden: bool = True
    takes_group: bool = False
    takes_blocks: bool = False
    takes_pool: bool = False
    hidden_by_channels: int | None = None


TOPOLOGIES: Mapping[Topology, TopologyTraits] = {
    "separable": TopologyTraits(
        build=_separable, most_channels=lambda p: p.wide, takes_hidden=False, takes_blocks=True
    ),
    "separable2": TopologyTraits(build=_separable2, most_channels=lambda p: p.hidden),
    "conv": TopologyTraits(
        build=_plain,
        most_channels=lambda p: p.channels * p.geometry.kernel**2,
        takes_filters=False,
        takes_hidden=False,
    ),
    "conv2": TopologyTraits(build=_plain2, most_channels=lambda p: 9 * p.hidden, takes_filters=False),
    "inverted": TopologyTraits(build=_inverted, most_channels=lambda p: p.hidden, hidden_by_channels=4),
    "nested": TopologyTraits(build=_nested, most_channels=lambda p: p.grouped, takes_group=True),
    "block": TopologyTraits(
        build=_block,
        most_channels=lambda p: p.hidden,
        takes_blocks=True,
        takes_pool=True,
        hidden_by_channels=6,
    ),
}
