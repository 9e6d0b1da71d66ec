"""Removing latent channels from a trained unit."""

from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units.topologies import TOPOLOGIES
from bitneck_models.units.unit import BottleneckUnit

__all__ = ["prune_channels"]


def prune_channels(unit: BottleneckUnit, keep: Tensor) -> BottleneckUnit:
    """Make a unit with some of the latent channels. The others contributed nothing if their symbols were zero.

    Args:
        unit: a unit with linear latents (``outer="none"``).
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
        unit.feature_shape,
        int(keep.numel()),
        unit.geometry.stride,
        unit.kernel,
        unit.filters,
        unit.topology,
        unit.hidden if TOPOLOGIES[unit.topology].takes_hidden else None,
        unit.inner,
        unit.outer,
        unit.group,
        unit.pool,
        unit.decoder_blocks,
        unit.decoder_width,
    )
    state = unit.state_dict()
    for name, value in state.items():
        if name.startswith(("encoder.mix.", "encoder.mix_norm.")) and value.ndim:
            state[name] = value[keep]
        elif name == "decoder.mix.weight":
            transposed = isinstance(unit.decoder.mix, nn.ConvTranspose2d)
            state[name] = value[keep] if transposed else value[:, keep]
    small.load_state_dict(state)
    return small.eval()
