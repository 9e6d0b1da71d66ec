"""Starting a bottleneck unit from a linear solution: pooling, and a rotation to the components that matter.

The Karhunen-Loeve transform (principal components) of the pooled feature is the best linear code for the squared
error of the FEATURE. What counts is the error of the network's OUTPUT, so the components are taken in the metric
``G = E[J^T J]``, with J the Jacobian of the output by the pooled feature: directions that the tail does not see cost
nothing when they are lost. With ``G = I`` it is the plain transform, PAPER.md's training-free baseline.

Dimensions: N batch, C feature channels, D filters a channel, Cr latent channels.
"""

import math

import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units import BottleneckUnit

__all__ = ["init_linear"]

_RIDGE = 0.02
"""Share of the identity in the metric: keeps directions that the sampled Jacobians missed."""


def init_linear(
    unit: BottleneckUnit, tail: nn.Module, features: Tensor, *, task_metric: bool, probes: int = 24
) -> None:
    """Set a unit's weights, in place, to pooling, rotation, and their inverses.

    Args:
        unit: with identity activations (a fresh PReLU is one).
        tail: the frozen network after the split point.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.
        task_metric: weigh directions by their effect on the output; else plain principal components.
        probes: random projections of the output that the metric is estimated with.
    """
    _identity_norms(unit)
    _init_pooling(unit)
    with torch.no_grad():
        pooled = unit.encoder.spatial(unit.geometry.pad(features))  # (N, C, h, w)
        flat = pooled.transpose(0, 1).flatten(1)  # (C, N*h*w)
        mean = flat.mean(dim=1)
        centred = flat - mean[:, None]
        covariance = centred @ centred.T / flat.shape[1]
    channels = covariance.shape[0]
    metric = torch.eye(channels)
    if task_metric:
        metric = _output_metric(unit, tail, pooled, probes)
        metric = metric * (channels / metric.trace()) * (1 - _RIDGE) + torch.eye(channels) * _RIDGE
    root, inverse_root = _roots(metric)
    _, vectors = torch.linalg.eigh(root @ covariance @ root)
    components = vectors.flip(1)[:, : unit.latent_shape[0]]  # (C, Cr), the most important first
    analysis, synthesis = components.T @ root, inverse_root @ components
    with torch.no_grad():
        unit.encoder.mix.weight.copy_(analysis[:, :, None, None])
        unit.encoder.mix_norm.bias.copy_(-analysis @ mean)
        unit.decoder.mix.weight.copy_(synthesis[:, :, None, None])
        unit.decoder.mix_norm.bias.copy_(mean)


def _identity_norms(unit: BottleneckUnit) -> None:
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def _init_pooling(unit: BottleneckUnit) -> None:
    """Depthwise kernels: averages over windows at the encoder, their spread at the decoder."""
    kernel, stride = unit.geometry.kernel, unit.geometry.stride
    if unit.filters > 1:
        _init_grid(unit)
        return
    taps = torch.ones(kernel)
    overlap = kernel - stride
    if 0 < overlap <= stride:  # a position in two windows counts half in each
        taps[:overlap] = 0.5
        taps[stride:] = 0.5
    spread = torch.outer(taps, taps)
    covered = unit.geometry.size[0] * unit.geometry.size[1] / (unit.latent_shape[1] * unit.latent_shape[2])
    with torch.no_grad():
        unit.encoder.spatial.weight.copy_(spread.expand_as(unit.encoder.spatial.weight) / covered)
        unit.decoder.spatial.weight.copy_(spread.expand_as(unit.decoder.spatial.weight))


def _init_grid(unit: BottleneckUnit) -> None:
    """With D = g * g filters: averages over a g x g grid of a window's places, as cosine components.

    Raises:
        InvalidConfig: D is no square, or windows overlap.
    """
    kernel, grid = unit.geometry.kernel, math.isqrt(unit.filters)
    if grid * grid != unit.filters or grid > kernel or kernel != unit.geometry.stride:
        raise InvalidConfig(
            f"{unit.filters} filters start from a grid of places: they must be a square, 4 or 9 say, and the kernel "
            f"({kernel}) must equal the stride ({unit.geometry.stride})"
        )
    places = torch.zeros(grid, kernel)  # which taps belong to a place, as in adaptive pooling: they may share one
    for i in range(grid):
        places[i, i * kernel // grid : -(-(i + 1) * kernel // grid)] = 1.0
    pool = places / places.sum(dim=1, keepdim=True)  # (g, K): averages
    spread = places / places.sum(dim=0, keepdim=True)  # (g, K): each tap shared among its places
    k = torch.arange(grid)
    cosines = torch.cos(math.pi / grid * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / grid)  # (g, g), orthonormal
    cosines[0] = 1 / math.sqrt(grid)
    channels = unit.feature_shape[0]
    with torch.no_grad():
        for layer, taps in ((unit.encoder.spatial, cosines @ pool), (unit.decoder.spatial, cosines @ spread)):
            kernels = torch.einsum("ur,vc->uvrc", taps, taps).reshape(unit.filters, 1, kernel, kernel)
            layer.weight.copy_(kernels.repeat(channels, 1, 1, 1))  # channel by channel, its filters together


def _output_metric(unit: BottleneckUnit, tail: nn.Module, pooled: Tensor, probes: int) -> Tensor:
    """``E[J^T J]`` of the output by one position of the pooled feature, (C, C)."""
    total = torch.zeros(pooled.shape[1], pooled.shape[1])
    for k, chunk in enumerate(torch.split(pooled[: 64 * probes], 64)):
        t = chunk.clone().requires_grad_()
        output = tail(unit.geometry.crop(unit.decoder.spatial(t)))  # (n, ...)
        generator = torch.Generator().manual_seed(k)
        probe = torch.randn(output.shape, generator=generator)
        (gradient,) = torch.autograd.grad((output * probe).sum(), t)  # (n, C, h, w)
        flat = gradient.transpose(0, 1).flatten(1)
        total += flat @ flat.T
    return total


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
