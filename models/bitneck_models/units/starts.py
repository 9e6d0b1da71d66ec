"""Where the training of a bottleneck unit begins.

``principal``, ``task``: pooling, and a rotation to the components that matter. The Karhunen-Loeve transform (principal
components) of the pooled feature is the best linear code for the squared error of the FEATURE. What counts is the error
of the network's OUTPUT, so ``task`` takes the components in the metric ``G = E[J^T J]``, with J the Jacobian of the
output by the pooled feature. With ``G = I`` it is the plain transform, PAPER.md's training-free baseline.

``next``, for inverted units: the encoder's first layer is a copy of the network's next layer, a 1x1 expansion with its
batch norm, which has learned from far more photographs than a unit ever sees. What it gives is pooled and rotated to
the components that matter for the output, which a linear regression tells. The decoder begins as the regression from
the pooled activations back to the places of the feature.

A nested unit begins as a separable one, ``principal``, ``task`` or trained, with the Karhunen-Loeve transform of its
groups of windows on top. The latents of a trained unit are in the metric that counts already: the rate term has made
an error of one step in any of them cost the task about the same.

Dimensions: N batch, C feature channels, D filters a channel, H hidden channels, Cr latent channels, K kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.units.units import BottleneckUnit, Geometry, SpaceToDepth

__all__ = ["init_linear", "init_nested", "init_next"]

_RIDGE = 0.02
"""Share of the identity in a metric: keeps directions that the sample missed."""
_CHUNK = 200


def init_linear(
    unit: BottleneckUnit, tail: nn.Module, features: Tensor, *, task_metric: bool, probes: int = 24
) -> None:
    """Set a unit's weights, in place, to pooling, rotation, and their inverses; a second layer passes them on.

    Args:
        unit: with identity activations (a fresh PReLU is one); not an inverted one.
        tail: the frozen network after the split point.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.
        task_metric: weigh directions by their effect on the output; else plain principal components.
        probes: random projections of the output that the metric is estimated with.

    Raises:
        InvalidConfig: an inverted unit, or a number of filters that has no grid.
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
    pool, spread = _pooling(unit.geometry, unit.filters)  # (D, K, K) each
    with torch.no_grad():
        pooled = _pooled(unit.geometry, features, pool)  # (N, C * D, h, w)
    covariance, mean = _moments(pooled)
    channels = covariance.shape[0]
    metric = torch.eye(channels)
    if task_metric:
        metric = _normalized(_output_metric(unit.geometry, tail, pooled, spread, probes))
    count = unit.latent_shape[0] if unit.topology in ("separable", "conv") else unit.hidden
    analysis, synthesis = _components(covariance, metric, min(count, channels))
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
        unit: nested; H must be the latent channels of the other.
        inner: separable, of the same feature, stride, kernel and filters.
        latents: of `inner`, (N, H, h * G1, w * G2) float32.

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
    covariance, mean = _moments(SpaceToDepth(unit.group)(latents))  # (H * G1 * G2,) each way
    analysis, synthesis = _components(covariance, torch.eye(len(covariance)), unit.latent_shape[0])
    encoder.mix.weight.copy_(analysis[:, :, None, None])
    encoder.mix_norm.bias.copy_(-analysis @ mean)
    decoder.mix.weight.copy_(synthesis[:, :, None, None])
    _norm(decoder.body, "mix_norm").bias.copy_(mean)


def init_next(unit: BottleneckUnit, tail: nn.Module, features: Tensor) -> None:
    """Set an inverted unit's weights, in place, from the network's next layer.

    Args:
        unit: inverted; H must be the number of channels of that layer.
        tail: the frozen network after the split point; its first convolution must be a 1x1 expansion with a norm.
        features: a sample, (N, C, Hf, Wf) float32; a few thousand are enough.

    Raises:
        InvalidConfig: another topology, or a network that goes on otherwise.
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
    pool, _ = _pooling(unit.geometry, 1)
    with torch.no_grad():
        _conv(encoder, "expand").weight.copy_(conv.weight)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(_norm(encoder, "expand_norm"), name).copy_(getattr(norm, name))
        _norm(encoder, "expand_norm").eps = norm.eps
        _conv(encoder, "spatial").weight.copy_(pool[:, None].expand(unit.hidden, 1, -1, -1))
        kernels, spread = _pooling(unit.geometry, unit.filters)  # (D, K, K) each
        _conv(decoder, "spatial").weight.copy_(spread[:, None].repeat(unit.feature_shape[0], 1, 1, 1))
        pooled = torch.cat([encoder(chunk) for chunk in torch.split(features, _CHUNK)])  # (N, H, h, w)
        outputs = torch.cat([tail(chunk).flatten(1) for chunk in torch.split(features, _CHUNK)])  # (N, ...)
        covariance, mean = _moments(pooled)
        metric = _normalized(_regression_metric(pooled, outputs))
        analysis, synthesis = _components(covariance, metric, unit.latent_shape[0])
        scale = (analysis @ covariance @ analysis.T).diagonal().mean().rsqrt()  # then the latent's variance is 1
        analysis, synthesis = analysis * scale, synthesis / scale
        unit.encoder.mix.weight.copy_(analysis[:, :, None, None])
        unit.encoder.mix_norm.bias.copy_(-analysis @ mean)
        back, offset = _regression(pooled, _pooled(unit.geometry, features, kernels))
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
    raise InvalidConfig("the network does not go on with a 1x1 convolution and a batch norm: start from 'random'")


def _regression(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over photographs and places: (C * D, H) and (C * D,), of (N, H, h, w) and (N, C * D, h, w)."""
    a, b = (t.transpose(0, 1).flatten(1) for t in (inputs, targets))
    a = torch.cat([a, torch.ones(1, a.shape[1])])  # (H + 1, N * h * w)
    gram = a @ a.T
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    solution: Tensor = torch.linalg.solve(gram, a @ b.T).T  # (C * D, H + 1)
    return solution[:, :-1], solution[:, -1]


def _regression_metric(pooled: Tensor, outputs: Tensor) -> Tensor:
    """``B^T B``, with B the linear regression of the output on the pooled activations, (H, H)."""
    t = pooled.mean(dim=(2, 3))  # (N, H)
    t, outputs = t - t.mean(0), outputs - outputs.mean(0)
    gram = t.T @ t
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    weights = torch.linalg.solve(gram, t.T @ outputs)  # (H, outputs)
    weights -= weights.mean(dim=1, keepdim=True)  # what all outputs share changes no decision
    metric: Tensor = weights @ weights.T
    return metric


def _identity_norms(unit: BottleneckUnit) -> None:
    for module in unit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def _moments(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance and mean over photographs and places, of (N, C, h, w)."""
    flat = pooled.transpose(0, 1).flatten(1)  # (C, N*h*w)
    mean = flat.mean(dim=1)
    centred = flat - mean[:, None]
    return centred @ centred.T / flat.shape[1], mean


def _normalized(metric: Tensor) -> Tensor:
    """Mean eigenvalue 1, with a share of the identity."""
    channels = len(metric)
    return metric * (channels / metric.trace()) * (1 - _RIDGE) + torch.eye(channels) * _RIDGE


def _components(covariance: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rotation to the most important components, (count, C), and back, (C, count)."""
    root, inverse_root = _roots(metric)
    _, vectors = torch.linalg.eigh(root @ covariance @ root)
    components = vectors.flip(1)[:, :count]  # the most important first
    return components.T @ root, inverse_root @ components


def _pooled(geometry: Geometry, features: Tensor, pool: Tensor) -> Tensor:
    """(N, C, Hf, Wf) to (N, C * D, h, w), channel by channel, its filters together."""
    channels = features.shape[1]
    kernels = pool[:, None].repeat(channels, 1, 1, 1)  # (C * D, 1, K, K)
    pooled: Tensor = F.conv2d(geometry.pad(features), kernels, stride=geometry.stride, groups=channels)
    return pooled


def _pooling(geometry: Geometry, filters: int) -> tuple[Tensor, Tensor]:
    """Kernels of the depthwise layers: averages over a window, and their spread, (D, K, K) each."""
    kernel, stride = geometry.kernel, geometry.stride
    if filters > 1:
        return _grid(geometry, filters)
    taps = torch.ones(kernel)
    overlap = kernel - stride
    if overlap > 0:  # a position in two windows counts half in each
        taps[:overlap] = 0.5
        taps[stride:] = 0.5
    spread = torch.outer(taps, taps)[None]
    covered = geometry.size[0] * geometry.size[1] / (geometry.latent[0] * geometry.latent[1])
    return spread / covered, spread


def _grid(geometry: Geometry, filters: int) -> tuple[Tensor, Tensor]:
    """With D = g * g filters: averages over a g x g grid of a window's places, as cosine components.

    Raises:
        InvalidConfig: D is no square, or windows overlap.
    """
    kernel, grid = geometry.kernel, math.isqrt(filters)
    if grid * grid != filters or grid > kernel or kernel != geometry.stride:
        raise InvalidConfig(
            f"{filters} filters start from a grid of places: they must be a square, 4 or 9 say, and the kernel "
            f"({kernel}) must equal the stride ({geometry.stride})"
        )
    places = torch.zeros(grid, kernel)  # which taps belong to a place, as in adaptive pooling: they may share one
    for i in range(grid):
        places[i, i * kernel // grid : -(-(i + 1) * kernel // grid)] = 1.0
    pool = places / places.sum(dim=1, keepdim=True)  # (g, K): averages
    spread = places / places.sum(dim=0, keepdim=True)  # (g, K): each tap shared among its places
    k = torch.arange(grid)
    cosines = torch.cos(math.pi / grid * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / grid)  # (g, g), orthonormal
    cosines[0] = 1 / math.sqrt(grid)

    def kernels(taps: Tensor) -> Tensor:
        return torch.einsum("ur,vc->uvrc", taps, taps).reshape(filters, kernel, kernel)

    return kernels(cosines @ pool), kernels(cosines @ spread)


def _output_metric(geometry: Geometry, tail: nn.Module, pooled: Tensor, spread: Tensor, probes: int) -> Tensor:
    """``E[J^T J]`` of the output by one position of the pooled feature, (C * D, C * D)."""
    total = torch.zeros(pooled.shape[1], pooled.shape[1])
    channels = pooled.shape[1] // len(spread)
    kernels = spread[:, None].repeat(channels, 1, 1, 1)
    for k, chunk in enumerate(torch.split(pooled[: 64 * probes], 64)):
        t = chunk.clone().requires_grad_()
        f_hat = F.conv_transpose2d(t, kernels, stride=geometry.stride, groups=channels)
        output = tail(geometry.crop(f_hat))  # (n, ...)
        generator = torch.Generator().manual_seed(k)
        probe = torch.randn(output.shape, generator=generator)
        (gradient,) = torch.autograd.grad((output * probe).sum(), t)  # (n, C * D, h, w)
        flat = gradient.transpose(0, 1).flatten(1)
        total += flat @ flat.T
    return total


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
