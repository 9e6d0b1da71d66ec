"""Where the training of a unit starts.

``principal`` and ``task``: pooling, and a rotation to the most important components. The Karhunen-Loeve transform
(principal components) of the pooled feature is the best linear code for the squared error of the FEATURE. But the error
of the network's OUTPUT is what counts, so ``task`` takes the components in the metric ``G = E[J^T J]``, with J the
Jacobian of the output by the pooled feature. With ``G = I`` it is the plain transform, the training-free baseline.

``next``, for inverted units: the encoder's first layer is a copy of the network's next layer, a 1x1 expansion with its
batch norm, which has learned from far more photographs than a unit ever sees. Its output is pooled and rotated to the
components that matter for the network's output, which a linear regression finds. The decoder starts as the regression
from the pooled activations back to the positions of the feature.

``next``, for block units: the encoder is a copy of the network's next inverted residual block without its last layer
(1x1, depthwise, both with ReLU6), and what that layer would project it to is rotated. The tail computes just these
values from the decoder's output, so they are all that it needs to know of the feature.

A nested unit starts as a separable one (``principal``, ``task`` or trained), followed by the Karhunen-Loeve transform
of its groups of windows. The latents of a trained unit are already in the metric that counts: training made an error of
one step cost the task about the same in each of them.

A unit whose decoder has residual blocks may start from one whose decoder has none: a fresh block is the identity.

Dimensions: N batch, C feature channels, D filters a channel, H hidden channels, Cr latent channels, K kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units.components import (
    moments,
    normalized,
    output_metric,
    pool_channels,
    pooling_kernels,
    principal_components,
    regression,
    regression_metric,
)
from bitneck_models.units.geometry import Geometry
from bitneck_models.units.layers import SpaceToDepth
from bitneck_models.units.unit import BottleneckUnit

__all__ = ["init_blocks", "init_deeper", "init_linear", "init_nested", "init_next"]

_CHUNK = 200
_PROBES = 24
"""Random projections of the output, for each of 64 features, that estimate a metric."""
_LEAST = 1e-3
"""Share of the identity in the metric of a block's activations: its last layer maps some directions to nothing."""


def init_linear(
    unit: BottleneckUnit, tail: nn.Module, features: Tensor, *, task_metric: bool, probes: int = _PROBES
) -> None:
    """Set a unit's weights, in place, to pooling, rotation, and their inverses; a second layer passes them on.

    Args:
        unit: a fresh unit whose activations are the identity, as a fresh PReLU is; neither inverted nor nested.
        tail: the frozen network after the split point.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.
        task_metric: weigh directions by their effect on the output; else plain principal components.
        probes: number of random projections of the output that estimate the metric.

    Raises:
        InvalidConfig: another topology, a kernel of more than twice the stride, or filters that form no grid.
    """
    if unit.topology == "nested":
        raise InvalidConfig("a nested unit starts from a separable one, see `init_nested`")
    if unit.topology in ("inverted", "block"):
        raise InvalidConfig(f"{unit.topology} units start from 'next' or 'random': their first layer is not linear")
    if unit.geometry.kernel > 2 * unit.geometry.stride:
        raise InvalidConfig(
            f"a linear start needs a kernel of at most twice the stride, got {unit.geometry.kernel} and "
            f"{unit.geometry.stride}"
        )
    _identity_norms(unit)
    pool, spread = pooling_kernels(unit.geometry, unit.filters)  # (D, K, K) each
    with torch.no_grad():
        pooled = pool_channels(unit.geometry, features, pool)  # (N, C * D, h, w)
    covariance, mean = moments(pooled)
    channels = covariance.shape[0]
    metric = torch.eye(channels)
    if task_metric:
        metric = normalized(output_metric(unit.geometry, tail, pooled, spread, probes))
    count = unit.latent_shape[0] if unit.topology in ("separable", "conv") else unit.hidden
    analysis, synthesis = principal_components(covariance, metric, min(count, channels))
    with torch.no_grad():
        _set_linear(unit, pool, spread, analysis, synthesis, mean)


def _set_linear(
    unit: BottleneckUnit, pool: Tensor, spread: Tensor, analysis: Tensor, synthesis: Tensor, mean: Tensor
) -> None:
    encoder, decoder = unit.encoder, unit.decoder
    if unit.topology.startswith("separable"):
        channels = unit.feature_shape[0]
        _conv(encoder.body, "spatial").weight.copy_(pool[:, None].repeat(channels, 1, 1, 1))
        _conv(decoder.body, "spatial").weight.copy_(spread[:, None].repeat(channels, 1, 1, 1))
        into, out = analysis[:, :, None, None], synthesis[:, :, None, None]
    else:
        into = analysis[:, :, None, None] * pool  # (Cr, C, K, K)
        out = synthesis.T[:, :, None, None] * spread  # (Cr, C, K, K)
    first: nn.Conv2d | nn.ConvTranspose2d
    last: nn.Conv2d | nn.ConvTranspose2d
    if unit.topology in ("separable", "conv"):
        first, first_norm = encoder.mix, encoder.mix_norm
        last, last_norm = _last_layer(unit)
    else:
        for half in (encoder, decoder):
            nn.init.dirac_(half.mix.weight)
            if unit.topology == "separable2":
                nn.init.dirac_(_conv(half.body, "local").weight, groups=unit.hidden)
        first, first_norm = _conv(encoder.body, "first"), _norm(encoder.body, "first_norm")
        last, last_norm = _conv(decoder.body, "first"), _norm(decoder.body, "first_norm")
    first.weight.zero_()
    last.weight.zero_()
    first.weight[: len(into)].copy_(into)
    if isinstance(last, nn.ConvTranspose2d):
        last.weight[: len(out)].copy_(out)
    else:
        last.weight[:, : out.shape[1]].copy_(out)
    first_norm.bias[: len(into)].copy_(-analysis @ mean)
    last_norm.bias.copy_(mean)


@torch.no_grad()
def init_nested(unit: BottleneckUnit, inner: BottleneckUnit, latents: Tensor) -> None:
    """Set a nested unit's weights, in place, to a separable unit's and a rotation of its groups of windows.

    Args:
        unit: a nested unit; its H must be the number of latent channels of `inner`.
        inner: a separable unit with the same feature, stride, kernel and filters.
        latents: a sample of the latents of `inner`, (N, H, h * G1, w * G2) float32.

    Raises:
        InvalidConfig: another topology, or units that do not fit together.
    """
    if (unit.topology, inner.topology) != ("nested", "separable") or inner.outer != "none":
        raise InvalidConfig(
            f"a nested unit starts from a linear separable one, got {unit.topology} from {inner.topology}"
        )
    fits = [
        (u.feature_shape, u.geometry.stride, u.geometry.kernel, u.filters, width)
        for u, width in ((unit, unit.hidden), (inner, inner.latent_shape[0]))
    ]
    if fits[0] != fits[1] or tuple(latents.shape[1:]) != inner.latent_shape:
        raise InvalidConfig(
            f"a nested unit must be as large as the one it starts from: feature, stride, kernel, filters and channels "
            f"are {fits[0]} and {fits[1]}, the latents {tuple(latents.shape[1:])}"
        )
    _identity_norms(unit)
    encoder, decoder = unit.encoder, unit.decoder
    copies = [
        (encoder.body, inner.encoder.body, ("spatial", "spatial_norm", "inner")),
        (decoder.body, inner.decoder.body, ("inner", "spatial", "spatial_norm", "outer")),
    ]
    pairs = [(whole.get_submodule(name), part.get_submodule(name)) for whole, part, names in copies for name in names]
    pairs += [
        (_conv(encoder.body, "first"), inner.encoder.mix),
        (_norm(encoder.body, "first_norm"), inner.encoder.mix_norm),
        (_conv(decoder.body, "first"), inner.decoder.mix),
        (_norm(decoder.body, "first_norm"), _norm(inner.decoder.body, "mix_norm")),
    ]
    for module, source in pairs:
        module.load_state_dict(source.state_dict())
    covariance, mean = moments(SpaceToDepth(unit.group)(latents))  # (H * G1 * G2,) each way
    analysis, synthesis = principal_components(covariance, torch.eye(len(covariance)), unit.latent_shape[0])
    encoder.mix.weight.copy_(analysis[:, :, None, None])
    encoder.mix_norm.bias.copy_(-analysis @ mean)
    decoder.mix.weight.copy_(synthesis[:, :, None, None])
    _norm(decoder.body, "mix_norm").bias.copy_(mean)


@torch.no_grad()
def init_deeper(unit: BottleneckUnit, source: BottleneckUnit) -> None:
    """Set the weights of a unit with a deep decoder, in place, to those of a unit whose decoder has no blocks.

    Args:
        unit: a fresh separable or block unit, whose decoder has residual blocks.
        source: a unit of the same sizes, whose decoder has none; both units then compute the same.
    """
    unit.encoder.load_state_dict(source.encoder.state_dict())
    last, last_norm = _last_layer(unit)
    last.weight.zero_()
    last.weight[:, : source.latent_shape[0]].copy_(source.decoder.mix.weight)
    last_norm.load_state_dict(_norm(source.decoder.body, "mix_norm").state_dict())
    for name in ("inner", "spatial", "spatial_norm", "outer"):
        unit.decoder.body.get_submodule(name).load_state_dict(source.decoder.body.get_submodule(name).state_dict())


@torch.no_grad()
def init_blocks(unit: BottleneckUnit, source: BottleneckUnit) -> None:
    """Set the weights of a unit, in place, to those of a unit that has another number of residual blocks.

    Args:
        unit: a fresh unit with a deep decoder. Blocks that only it has stay the identity.
        source: a unit of the same sizes with a deep decoder. Blocks that only it has are left out.
    """
    unit.encoder.load_state_dict(source.encoder.state_dict())
    own = unit.decoder.state_dict()
    unit.decoder.load_state_dict(own | {key: value for key, value in source.decoder.state_dict().items() if key in own})


def init_next(unit: BottleneckUnit, tail: nn.Module, features: Tensor) -> None:
    """Set the weights of an inverted or a block unit, in place, from the network's next layers.

    Args:
        unit: an inverted or a block unit; its H must be the number of channels of the next layer.
        tail: the frozen network after the split point. Its first layers must be a 1x1 convolution and a batch norm;
            for a block unit those of an inverted residual block without a shortcut, whose depthwise layer has the
            unit's kernel and the stride S / P.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.

    Raises:
        InvalidConfig: another topology, or other first layers of the network.
    """
    if unit.topology not in ("inverted", "block"):
        raise InvalidConfig(f"only an inverted or a block unit starts from the next layer, this one is {unit.topology}")
    layers = [m for m in tail.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][:6]
    conv, norm = _next_layer(layers)
    expected = (unit.hidden, unit.feature_shape[0], 1, 1)
    if conv.weight.shape != expected:
        raise InvalidConfig(
            f"the network's next layer is a convolution {tuple(conv.weight.shape)}, a unit with hidden = "
            f"{unit.hidden} needs {expected}; set hidden, or start from 'random'"
        )
    _identity_norms(unit)
    encoder = unit.encoder.body
    with torch.no_grad():
        _copy_layer(encoder, "expand", conv, norm)
    if unit.topology == "block":
        metric = _copy_block(unit, tail, layers, features)
        pooled = _activations(encoder, features)  # (N, H, h, w)
    else:
        pool, _ = pooling_kernels(unit.geometry, 1)
        with torch.no_grad():
            _conv(encoder, "spatial").weight.copy_(pool[:, None].expand(unit.hidden, 1, -1, -1))
        pooled = _activations(encoder, features)
        metric = normalized(regression_metric(pooled, _activations(tail, features).flatten(1)))
    _rotate(unit, features, pooled, metric)


@torch.no_grad()
def _activations(layers: nn.Module, features: Tensor) -> Tensor:
    """Outputs of layers for (N, C, Hf, Wf), computed in chunks."""
    return torch.cat([layers(chunk) for chunk in torch.split(features, _CHUNK)])


@torch.no_grad()
def _copy_layer(body: nn.Sequential, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Copy a convolution and its batch norm."""
    _conv(body, name).weight.copy_(conv.weight)
    own = _norm(body, f"{name}_norm")
    for key in ("weight", "bias", "running_mean", "running_var"):
        getattr(own, key).copy_(getattr(norm, key))
    own.eps = norm.eps


def _copy_block(unit: BottleneckUnit, tail: nn.Module, layers: Sequence[nn.Module], features: Tensor) -> Tensor:
    """Copy the depthwise layer of the network's next block into a block unit.

    Returns:
        The metric (H, H) of the activations that counts: how the network's output depends on the block's.
    """
    match layers[2:]:
        case [
            nn.Conv2d() as spatial,
            nn.BatchNorm2d() as norm,
            nn.Conv2d(kernel_size=(1, 1), groups=1) as last,
            nn.BatchNorm2d(running_var=Tensor() as variance) as last_norm,
        ] if spatial.groups == last.in_channels == unit.hidden:
            pass
        case _:
            raise InvalidConfig("the network's next layers are no inverted residual block: start from 'random'")
    own = _conv(unit.encoder.body, "spatial")
    if (spatial.kernel_size, spatial.stride) != (own.kernel_size, own.stride):
        raise InvalidConfig(
            f"the depthwise layer of the network's next block has the kernel {spatial.kernel_size[0]} and the stride "
            f"{spatial.stride[0]}, the unit's {own.kernel_size[0]} and {own.stride[0]}: set kernel, stride and pool"
        )
    _copy_layer(unit.encoder.body, "spatial", spatial, norm)
    project = last.weight[:, :, 0, 0] * (last_norm.weight / torch.sqrt(variance + last_norm.eps))[:, None]  # (G, H)
    block, *rest = tail.children()
    g = _activations(block, features[: 64 * _PROBES])  # (n, G, h, w)
    inner = _activations(unit.encoder.body[:-1], features[:_CHUNK])  # before the means
    if not torch.allclose(last_norm(last(inner)), g[:_CHUNK], rtol=1e-3, atol=1e-3):
        raise InvalidConfig("the network's next block is more than three layers: start from 'random'")
    metric = output_metric(Geometry((g.shape[2], g.shape[3]), 1), nn.Sequential(*rest), g, torch.ones(1, 1, 1), _PROBES)
    return (project.T @ normalized(metric) @ project).detach() + _LEAST * torch.eye(unit.hidden)


@torch.no_grad()
def _rotate(unit: BottleneckUnit, features: Tensor, pooled: Tensor, metric: Tensor) -> None:
    """Set the encoder's last layer to the components of its activations, and the decoder to the way back.

    Args:
        unit: its encoder's first layers are set.
        features: (N, C, Hf, Wf).
        pooled: the activations of the encoder's last layer but one, (N, H, h, w).
        metric: (H, H).
    """
    decoder = unit.decoder.body
    kernels, spread = pooling_kernels(unit.geometry, unit.filters)  # (D, K, K) each
    _conv(decoder, "spatial").weight.copy_(spread[:, None].repeat(unit.feature_shape[0], 1, 1, 1))
    covariance, mean = moments(pooled)
    analysis, synthesis = principal_components(covariance, metric, unit.latent_shape[0])
    scale = (analysis @ covariance @ analysis.T).diagonal().mean().rsqrt()  # then the latent's variance is 1
    analysis, synthesis = analysis * scale, synthesis / scale
    unit.encoder.mix.weight.copy_(analysis[:, :, None, None])
    unit.encoder.mix_norm.bias.copy_(-analysis @ mean)
    back, offset = regression(pooled, pool_channels(unit.geometry, features, kernels))
    last, last_norm = _last_layer(unit)
    last.weight.zero_()
    last.weight[:, : unit.latent_shape[0]].copy_((back @ synthesis)[:, :, None, None])
    last_norm.bias.copy_(back @ mean + offset)


@torch.no_grad()
def _last_layer(unit: BottleneckUnit) -> tuple[nn.Conv2d | nn.ConvTranspose2d, nn.BatchNorm2d]:
    """The decoder's layer that undoes the encoder's last one, and its norm; a layer before it passes the latent on."""
    if not any(unit.decoder_blocks):
        return unit.decoder.mix, _norm(unit.decoder.body, "mix_norm")
    nn.init.dirac_(unit.decoder.mix.weight)
    return _conv(unit.decoder.body, "up"), _norm(unit.decoder.body, "up_norm")


def _conv(body: nn.Sequential, name: str) -> nn.Conv2d | nn.ConvTranspose2d:
    layer = body.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return layer


def _norm(body: nn.Sequential, name: str) -> nn.BatchNorm2d:
    layer = body.get_submodule(name)
    assert isinstance(layer, nn.BatchNorm2d)
    return layer


def _next_layer(layers: Sequence[nn.Module]) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    match layers[:2]:
        case [nn.Conv2d(kernel_size=(1, 1), groups=1) as conv, nn.BatchNorm2d() as norm]:
            return conv, norm
    raise InvalidConfig("the network's next layers are not a 1x1 convolution and a batch norm: start from 'random'")


def _identity_norms(unit: BottleneckUnit) -> None:
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
