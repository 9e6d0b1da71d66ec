"""Where the training of a unit starts.

``principal`` and ``task``: pooling, and a rotation to the most important components. The Karhunen-Loeve transform
(principal components) of the pooled feature is the best linear code for the squared error of the FEATURE. But the error
of the network's OUTPUT is what counts, so ``task`` takes the components in the metric ``G = E[J^T J]``, with J the
Jacobian of the output by the pooled feature. With ``G = I`` it is the plain transform, the training-free baseline.

``next``, for inverted units: the encoder's first layer is a copy of the network's next layer, a 1x1 expansion with its
batch norm, which has learned from far more photographs than a unit ever sees. Its output is pooled and rotated to the
components that matter for the network's output, which a linear regression finds. The decoder starts as the regression
from the pooled activations back to the positions of the feature.

A nested unit starts as a separable one (``principal``, ``task`` or trained), followed by the Karhunen-Loeve transform
of its groups of windows. The latents of a trained unit are already in the metric that counts: training made an error of
one step cost the task about the same in each of them.

Dimensions: N batch, C feature channels, D filters a channel, H hidden channels, Cr latent channels, K kernel.
"""

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
from bitneck_models.units.layers import SpaceToDepth
from bitneck_models.units.unit import BottleneckUnit

__all__ = ["init_linear", "init_nested", "init_next"]

_CHUNK = 200


def init_linear(
    unit: BottleneckUnit, tail: nn.Module, features: Tensor, *, task_metric: bool, probes: int = 24
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
    if unit.topology == "inverted":
        raise InvalidConfig(f"an inverted unit starts from {'next'!r} or {'random'!r}, its first layer is not linear")
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
        first, first_norm, last, last_norm = encoder.mix, encoder.mix_norm, decoder.mix, _norm(decoder.body, "mix_norm")
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


def init_next(unit: BottleneckUnit, tail: nn.Module, features: Tensor) -> None:
    """Set an inverted unit's weights, in place, from the network's next layer.

    Args:
        unit: an inverted unit; its H must be the number of channels of that layer.
        tail: the frozen network after the split point; its first layers must be a 1x1 convolution and a batch norm.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.

    Raises:
        InvalidConfig: another topology, or other first layers of the network.
    """
    if unit.topology != "inverted":
        raise InvalidConfig(f"only an inverted unit starts from the next layer, this one is {unit.topology}")
    conv, norm = _next_layer(tail)
    expected = (unit.hidden, unit.feature_shape[0], 1, 1)
    if conv.weight.shape != expected:
        raise InvalidConfig(
            f"the network's next layer is a convolution {tuple(conv.weight.shape)}, an inverted unit with hidden = "
            f"{unit.hidden} needs {expected}; set hidden, or start from 'random'"
        )
    _identity_norms(unit)
    encoder, decoder = unit.encoder.body, unit.decoder.body
    pool, _ = pooling_kernels(unit.geometry, 1)
    with torch.no_grad():
        _conv(encoder, "expand").weight.copy_(conv.weight)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(_norm(encoder, "expand_norm"), name).copy_(getattr(norm, name))
        _norm(encoder, "expand_norm").eps = norm.eps
        _conv(encoder, "spatial").weight.copy_(pool[:, None].expand(unit.hidden, 1, -1, -1))
        kernels, spread = pooling_kernels(unit.geometry, unit.filters)  # (D, K, K) each
        _conv(decoder, "spatial").weight.copy_(spread[:, None].repeat(unit.feature_shape[0], 1, 1, 1))
        pooled = torch.cat([encoder(chunk) for chunk in torch.split(features, _CHUNK)])  # (N, H, h, w)
        outputs = torch.cat([tail(chunk).flatten(1) for chunk in torch.split(features, _CHUNK)])  # (N, ...)
        covariance, mean = moments(pooled)
        metric = normalized(regression_metric(pooled, outputs))
        analysis, synthesis = principal_components(covariance, metric, unit.latent_shape[0])
        scale = (analysis @ covariance @ analysis.T).diagonal().mean().rsqrt()  # then the latent's variance is 1
        analysis, synthesis = analysis * scale, synthesis / scale
        unit.encoder.mix.weight.copy_(analysis[:, :, None, None])
        unit.encoder.mix_norm.bias.copy_(-analysis @ mean)
        back, offset = regression(pooled, pool_channels(unit.geometry, features, kernels))
        unit.decoder.mix.weight.copy_((back @ synthesis)[:, :, None, None])
        _norm(decoder, "mix_norm").bias.copy_(back @ mean + offset)


def _conv(body: nn.Sequential, name: str) -> nn.Conv2d | nn.ConvTranspose2d:
    layer = body.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return layer


def _norm(body: nn.Sequential, name: str) -> nn.BatchNorm2d:
    layer = body.get_submodule(name)
    assert isinstance(layer, nn.BatchNorm2d)
    return layer


def _next_layer(tail: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    layers = [m for m in tail.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))][:2]
    match layers:
        case [nn.Conv2d(kernel_size=(1, 1), groups=1) as conv, nn.BatchNorm2d() as norm]:
            return conv, norm
    raise InvalidConfig("the network's next layers are not a 1x1 convolution and a batch norm: start from 'random'")


def _identity_norms(unit: BottleneckUnit) -> None:
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
