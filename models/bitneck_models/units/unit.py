"""The bottleneck unit: a trained encoder and decoder at a split point.

    f (N, C, Hf, Wf) --encoder--> y (N, Cr, h, w)         h = ceil(Hf / S), w = ceil(Wf / S)
    y_hat            --decoder--> f_hat (N, C, Hf, Wf)

With ``nested`` the latent is smaller: h = ceil(Hf / S) / G1 and w = ceil(Wf / S) / G2.
`bitneck_models.units.topologies` has the layers. They differ from the paper's in four ways, each of them measured (see
the project's decisions): the kernel covers its stride; a depthwise layer may have several filters a channel; the latent
and the decoder's output have no activation, because the features at our split points have none; the activations inside
are PReLUs that begin as the identity, so that a unit can start from a linear solution and still become non-linear.
"""

import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units.geometry import Geometry
from bitneck_models.units.layers import Activation
from bitneck_models.units.topologies import TOPOLOGIES, Decoder, Encoder, Plan, Topology

__all__ = ["BottleneckUnit"]


class BottleneckUnit(nn.Module):
    """Encoder and decoder of a unit.

    Args:
        feature_shape: (C, Hf, Wf) at the split point.
        latent_channels: Cr.
        stride: S.
        kernel: K; see `Geometry`. For ``block`` it is that of the encoder's depthwise layer alone.
        filters: D, depthwise filters a channel; for ``inverted`` those of the decoder, for ``conv`` and ``conv2``
            always 1. With D = 1, as in the paper, every window is coded by itself. With D = g * g a window can be as
            large as the feature and still keep g x g places of it; the 1x1 layers see these places together, so that
            what neighbouring places share is coded once.
        topology: see `bitneck_models.units.topologies`.
        hidden: H, channels between the layers of ``separable2``, ``conv2`` and ``nested`` (None for Cr) and of
            ``inverted`` (None for 4 C) and ``block`` (None for 6 C).
        inner: activation between the layers of a half.
        outer: activation of the latent and of the decoder's output.
        group: (G1, G2), rows and columns of windows that ``nested`` codes together. The numbers of windows must be
            multiples of them.
        pool: P, for ``block``: its depthwise layer has the stride S / P, and P x P of its values are averaged.
        decoder_blocks: residual blocks of the decoder of ``separable`` and ``block``: at the latent's size, and at the
            feature's.
        decoder_width: W, channels of those at the latent's size; None for Cr.

    Raises:
        InvalidConfig: the geometry or the group does not fit, the topology does not take an option, or the latent has
            more channels than the layer before it.
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
        pool: int = 1,
        decoder_blocks: tuple[int, int] = (0, 0),
        decoder_width: int | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = feature_shape
        if topology not in TOPOLOGIES:
            raise InvalidConfig(f"no topology {topology!r}; known: {', '.join(TOPOLOGIES)}")
        traits = TOPOLOGIES[topology]
        if filters != 1 and not traits.takes_filters:
            raise InvalidConfig(f"topology {topology} has one filter a channel, got filters = {filters}")
        if hidden is not None and not traits.takes_hidden:
            raise InvalidConfig(f"topology {topology} has one layer, so nothing is hidden; got hidden = {hidden}")
        if pool != 1 and not traits.takes_pool:
            raise InvalidConfig(f"topology {topology} averages nothing; got pool = {pool}")
        if any(decoder_blocks) and not traits.takes_blocks:
            raise InvalidConfig(
                f"the decoder of topology {topology} has no residual blocks; got {list(decoder_blocks)}"
            )
        if stride % pool:
            raise InvalidConfig(f"means of {pool}x{pool} do not fit a stride of {stride}")
        geometry = Geometry((height, width), stride, stride if traits.takes_pool else kernel)
        if group != (1, 1) and not traits.takes_group:
            raise InvalidConfig(f"topology {topology} codes each window by itself; got group = {list(group)}")
        rows, columns = geometry.windows
        if any(g < 1 or n % g for n, g in zip(geometry.windows, group, strict=True)):
            raise InvalidConfig(f"groups of {group[0]}x{group[1]} do not tile the {rows}x{columns} windows")
        ratio = traits.hidden_by_channels
        self.hidden = hidden or (latent_channels if ratio is None else ratio * channels)
        plan = Plan(
            channels=channels, latent_channels=latent_channels, geometry=geometry, kernel=kernel, pool=pool,
            filters=filters, hidden=self.hidden, group=group, decoder_blocks=decoder_blocks,
            decoder_width=decoder_width or latent_channels, inner=inner, outer=outer,
        )  # fmt: skip
        if not 1 <= latent_channels <= (most := traits.most_channels(plan)):
            raise InvalidConfig(
                f"{latent_channels} latent channels, expected 1 to {most} (topology {topology}, "
                f"{channels} feature channels, {filters} filters, {self.hidden} hidden, group {group[0]}x{group[1]})"
            )
        self.feature_shape = feature_shape
        self.latent_shape = (latent_channels, rows // group[0], columns // group[1])
        self.group = group
        self.geometry = geometry
        self.kernel = kernel
        self.pool = pool
        self.decoder_blocks = decoder_blocks
        self.decoder_width = plan.decoder_width
        self.filters = filters
        self.topology: Topology = topology
        self.inner: Activation = inner
        self.outer: Activation = outer
        self.encoder: Encoder
        self.decoder: Decoder
        self.encoder, self.decoder = traits.build(plan)

    def forward(self, f: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Encode, round with a straight-through gradient, decode.

        Under `torch.autocast` the layers at the feature's size run in its lower precision. The latent is computed,
        rounded and mixed in float32: its values are the symbols that are coded.

        Args:
            f: feature, (N, C, Hf, Wf).
            step: quantizer step Q.

        Returns:
            The latent y (N, Cr, h, w) before rounding, and f_hat (N, C, Hf, Wf).
        """
        t = self.encoder.body(f)
        with torch.autocast(f.device.type, enabled=False):
            y = self.encoder.latent(t.float())
            t = self.decoder.mix(self.rounded(y, step))
        return y, self.decoder.body(t)

    @staticmethod
    def rounded(y: Tensor, step: float) -> Tensor:
        """The nearest multiples of the step, with a straight-through gradient."""
        return y + (torch.round(y / step) * step - y).detach()
