"""Principal components of a pooled feature, in a metric that counts its effect on the network's output.

    f (N, C, Hf, Wf) --pooling kernels--> t (N, C * D, h, w) --moments--> covariance, mean (C * D)
    covariance, metric --principal components--> analysis (count, C * D), synthesis (C * D, count)

Dimensions: N batch, C feature channels, D filters a channel, H hidden channels, K kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units.geometry import Geometry

__all__ = [
    "moments",
    "normalized",
    "output_metric",
    "pool_channels",
    "pooling_kernels",
    "principal_components",
    "regression",
    "regression_metric",
]

_RIDGE = 0.02
"""Share of the identity in a metric: keeps directions that the sample does not show."""
_DAMPING = 1e-3
"""Share of the mean square that is added to a regression's diagonal."""


def pooling_kernels(geometry: Geometry, filters: int) -> tuple[Tensor, Tensor]:
    """Kernels of the depthwise layers: averages over a window, and the spread of an average over it.

    Args:
        geometry: the windows.
        filters: D; a square number g * g, whose filters average over a g x g grid of places in the window.

    Returns:
        Two tensors (D, K, K).

    Raises:
        InvalidConfig: D > 1 is no square, or the windows overlap.
    """
    kernel, stride = geometry.kernel, geometry.stride
    if filters > 1:
        return _grid(geometry, filters)
    taps = torch.ones(kernel)
    overlap = kernel - stride
    if overlap > 0:  # a position in two windows counts half in each
        taps[:overlap] = 0.5
        taps[stride:] = 0.5
    spread = torch.outer(taps, taps)[None]
    covered = geometry.size[0] * geometry.size[1] / (geometry.windows[0] * geometry.windows[1])
    return spread / covered, spread


def _grid(geometry: Geometry, filters: int) -> tuple[Tensor, Tensor]:
    """Averages over a g x g grid of places, as cosine components."""
    kernel, grid = geometry.kernel, math.isqrt(filters)
    if grid * grid != filters or grid > kernel or kernel != geometry.stride:
        raise InvalidConfig(
            f"{filters} filters start from a grid of places: they must be a square, 4 or 9 say, and the kernel "
            f"({kernel}) must equal the stride ({geometry.stride})"
        )
    places = torch.zeros(grid, kernel)  # 1 where a tap belongs to a place; as in adaptive pooling, places may share one
    for i in range(grid):
        places[i, i * kernel // grid : -(-(i + 1) * kernel // grid)] = 1.0
    pool = places / places.sum(dim=1, keepdim=True)  # (g, K): averages
    spread = places / places.sum(dim=0, keepdim=True)  # (g, K): each tap is divided among its places
    k = torch.arange(grid)
    cosines = torch.cos(math.pi / grid * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / grid)  # (g, g), orthonormal
    cosines[0] = 1 / math.sqrt(grid)

    def kernels(taps: Tensor) -> Tensor:
        return torch.einsum("ur,vc->uvrc", taps, taps).reshape(filters, kernel, kernel)

    return kernels(cosines @ pool), kernels(cosines @ spread)


def pool_channels(geometry: Geometry, features: Tensor, kernels: Tensor) -> Tensor:
    """Pool each channel by itself.

    Args:
        geometry: the windows.
        features: (N, C, Hf, Wf) float32.
        kernels: (D, K, K); see `pooling_kernels`.

    Returns:
        (N, C * D, h, w); the D values of a channel stay together.
    """
    channels = features.shape[1]
    weights = kernels[:, None].repeat(channels, 1, 1, 1)  # (C * D, 1, K, K)
    result: Tensor = F.conv2d(geometry.pad(features), weights, stride=geometry.stride, groups=channels)
    return result


def moments(t: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (C, C) and mean (C,) over photographs and positions of (N, C, h, w)."""
    flat = t.transpose(0, 1).flatten(1)  # (C, N*h*w)
    mean = flat.mean(dim=1)
    centred = flat - mean[:, None]
    return centred @ centred.T / flat.shape[1], mean


def principal_components(covariance: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most important directions, and the way back.

    Args:
        covariance: (C, C).
        metric: (C, C), positive definite; the error that counts is ``e^T metric e``.
        count: number of directions.

    Returns:
        Analysis (count, C), its most important row first, and synthesis (C, count).
    """
    root, inverse_root = _roots(metric)
    _, vectors = torch.linalg.eigh(root @ covariance @ root)
    chosen = vectors.flip(1)[:, :count]  # the most important first
    return chosen.T @ root, inverse_root @ chosen


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T


def normalized(metric: Tensor) -> Tensor:
    """A metric scaled to a mean eigenvalue of 1, with a share of the identity."""
    channels = len(metric)
    return metric * (channels / metric.trace()) * (1 - _RIDGE) + torch.eye(channels) * _RIDGE


def output_metric(geometry: Geometry, tail: nn.Module, t: Tensor, spread: Tensor, probes: int) -> Tensor:
    """``E[J^T J]``, with J the Jacobian of the output by one position of the pooled feature.

    Args:
        geometry: the windows.
        tail: the frozen network after the split point.
        t: pooled features, (N, C * D, h, w).
        spread: see `pooling_kernels`.
        probes: random projections of the output, for each of 64 features.

    Returns:
        (C * D, C * D).
    """
    total = torch.zeros(t.shape[1], t.shape[1])
    channels = t.shape[1] // len(spread)
    kernels = spread[:, None].repeat(channels, 1, 1, 1)
    for k, chunk in enumerate(torch.split(t[: 64 * probes], 64)):
        part = chunk.clone().requires_grad_()
        f_hat = F.conv_transpose2d(part, kernels, stride=geometry.stride, groups=channels)
        output = tail(geometry.crop(f_hat))  # (n, ...)
        generator = torch.Generator().manual_seed(k)
        probe = torch.randn(output.shape, generator=generator)
        (gradient,) = torch.autograd.grad((output * probe).sum(), part)  # (n, C * D, h, w)
        flat = gradient.transpose(0, 1).flatten(1)
        total += flat @ flat.T
    return total


def regression(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over photographs and positions.

    Args:
        inputs: (N, H, h, w).
        targets: (N, C * D, h, w).

    Returns:
        Weights (C * D, H) and offsets (C * D,).
    """
    a, b = (t.transpose(0, 1).flatten(1) for t in (inputs, targets))
    a = torch.cat([a, torch.ones(1, a.shape[1])])  # (H + 1, N * h * w)
    solution: Tensor = torch.linalg.solve(_damped(a @ a.T), a @ b.T).T  # (C * D, H + 1)
    return solution[:, :-1], solution[:, -1]


def regression_metric(t: Tensor, outputs: Tensor) -> Tensor:
    """``B^T B``, with B the linear regression of the output on pooled activations.

    Args:
        t: (N, H, h, w).
        outputs: (N, outputs).

    Returns:
        (H, H).
    """
    means = t.mean(dim=(2, 3))  # (N, H)
    means, outputs = means - means.mean(0), outputs - outputs.mean(0)
    weights = torch.linalg.solve(_damped(means.T @ means), means.T @ outputs)  # (H, outputs)
    weights -= weights.mean(dim=1, keepdim=True)  # what all outputs share changes no decision
    metric: Tensor = weights @ weights.T
    return metric


def _damped(gram: Tensor) -> Tensor:
    return gram + _DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
