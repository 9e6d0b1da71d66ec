"""Rate terms: differentiable bits of a latent, used in training only.

    hyperprior   R = E[-log2 p(z) - log2 p(y|z)], z = h_a(y)     eq. (3) of the paper; Balle et al. 2018
    factorized   R = E[-log2 p(y)], channels independent          the model that codes the symbols in deployment
    l1           R = E[|y / Q|_1]                                 the baseline that eq. (3) replaces (Datta et al. 2022)

The first two take the latent in units of the step, ``y / Q``, with additive uniform noise in place of rounding, and
integrate each density over the quantization bin. l1 is not in bits, so a factorized density beside it estimates them;
the unit gets no gradient from that density. One density serves a unit at many steps: at a multiple m of its own step
the bins are m wide.

Dimensions: N batch, Cr latent channels, Cz hyper-latent channels.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FactorizedDensity",
    "FactorizedRate",
    "HyperpriorRate",
    "L1Rate",
    "Noise",
    "RateKind",
    "RateTerm",
    "build_rate",
    "gaussian_bin_bits",
    "lower_bound",
]

RateKind = Literal["hyperprior", "factorized", "l1"]

_MIN_LIKELIHOOD = 1e-9
_LN2 = math.log(2.0)


class _LowerBound(torch.autograd.Function):
    """See `lower_bound`."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound  # type: ignore[attr-defined]
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        passes = (x >= ctx.bound) | (grad < 0)  # type: ignore[attr-defined]
        return grad * passes, None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """``max(x, bound)``, whose gradient still pushes values below the bound upwards. Same shape."""
    bounded: Tensor = _LowerBound.apply(x, bound)  # type: ignore[no-untyped-call]
    return bounded


def _bits(likelihood: Tensor) -> Tensor:
    return -torch.log(lower_bound(likelihood, _MIN_LIKELIHOOD)) / _LN2


def gaussian_bin_bits(v: Tensor, sigma: Tensor) -> Tensor:
    """Bits of values under a zero-mean Gaussian integrated over bins of width 1.

    ``-log2(Phi((v + 1/2) / sigma) - Phi((v - 1/2) / sigma))``, computed in the left tail, where it is exact.

    Args:
        v: values in units of the bins' width.
        sigma: standard deviations in the same unit, > 0, same shape.
    """
    magnitude = v.abs()
    scale = 1.0 / (sigma * math.sqrt(2.0))
    upper = torch.erfc((magnitude - 0.5) * scale)
    lower = torch.erfc((magnitude + 0.5) * scale)
    return _bits(0.5 * (upper - lower))


class FactorizedDensity(nn.Module):
    """A learned density per channel: four cumulative layers with parameters h, b, a (Balle et al. 2018, appendix 6.1).

    The cumulative distribution is ``c(v) = sigmoid(f4(f3(f2(f1(v)))))`` with ``f(v) = g(softplus(h) v + b)`` and
    ``g(v) = v + tanh(a) tanh(v)``, which is increasing.

    Args:
        channels: number of densities.
        width: hidden units of a layer; 1 in the authors' checkpoints, which have one h, b and a for each channel.
    """

    scale: Tensor

    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        sizes = (1, width, width, width, 1)
        self.register_buffer("scale", torch.ones(channels))
        self.h = nn.ParameterList()
        self.b = nn.ParameterList()
        self.a = nn.ParameterList()
        for layer, (before, after) in enumerate(itertools.pairwise(sizes), start=1):
            start = math.log(math.expm1(1 / after))
            self.h.append(nn.Parameter(torch.full((channels, after, before), start)))
            self.b.append(nn.Parameter(torch.empty(channels, after, 1).uniform_(-0.5, 0.5)))
            if layer < len(sizes) - 1:
                self.a.append(nn.Parameter(torch.zeros(channels, after, 1)))

    @torch.no_grad()
    def fit_scale(self, std: Tensor) -> None:
        """Set the width at the start of training to that of the values.

        Args:
            std: standard deviation of each channel, (C,), in units of the step.
        """
        self.scale.copy_(std.clamp(min=0.1))

    def logits(self, v: Tensor) -> Tensor:
        """Logits of the cumulative distribution.

        Args:
            v: (C, 1, M).
        """
        v = v / self.scale[:, None, None]
        for k, (h, b) in enumerate(zip(self.h, self.b, strict=True)):
            v = F.softplus(h) @ v + b
            if k < len(self.a):
                v = v + torch.tanh(self.a[k]) * torch.tanh(v)
        return v

    def bits(self, v: Tensor, width: float = 1.0) -> Tensor:
        """Bits of values integrated over bins.

        Args:
            v: (N, C, h, w), in units of the step.
            width: of the bins, in units of the step.

        Returns:
            (N, C, h, w).
        """
        n, c, h, w = v.shape
        flat = v.transpose(0, 1).reshape(c, 1, -1)  # (C, 1, N*h*w)
        lower, upper = self.logits(flat - width / 2), self.logits(flat + width / 2)
        sign = -torch.sign(lower + upper).detach()  # the side where the difference of sigmoids is exact
        likelihood = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        return _bits(likelihood).reshape(c, n, h, w).transpose(0, 1)


class Noise:
    """Uniform noise, each sample's from a source of its own, whatever else is in the batch.

    Args:
        seeds: of the samples, (N,).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh noise from -1/2 to 1/2, of the shape and on the device of a tensor (N, ...)."""
        parts = [torch.rand(like.shape[1:], generator=source) for source in self._sources]
        return (torch.stack(parts) - 0.5).to(like.device)


def _perturbed(v: Tensor, width: float = 1.0, *, hard: bool, noise: Noise | None = None) -> Tensor:
    """Add uniform noise as wide as a bin, because rounding has no gradient; or round, to get the rate."""
    if hard:
        return torch.round(v / width) * width
    return v + width * (torch.rand_like(v) - 0.5 if noise is None else noise(v))


class RateTerm(nn.Module, ABC):
    """Base of the rate terms."""

    @abstractmethod
    def fit_scale(self, std: Tensor) -> None:
        """Set the width of the densities at the start of training to that of the latent.

        Args:
            std: standard deviation of each latent channel, (Cr,), in units of the step.
        """

    @abstractmethod
    def forward(
        self, y: Tensor, step: float, multiple: float = 1.0, *, hard: bool = False, noise: Noise | None = None
    ) -> Tensor:
        """The rate of a latent.

        Args:
            y: latent before rounding, (N, Cr, h, w).
            step: quantizer step Q that the unit is trained at.
            multiple: of that step, at which the latent is rounded.
            hard: return the estimated bits of the rounded latent, whose gradient is of no use; else the term to
                minimize.
            noise: takes the place of rounding if not ``hard``; None for torch's own.

        Returns:
            (N,), in bits; in steps for `L1Rate` if not ``hard``.
        """


class FactorizedRate(RateTerm):
    """Bits of a latent under one learned density per channel.

    Args:
        latent_channels: Cr.
    """

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.density = FactorizedDensity(latent_channels)

    def fit_scale(self, std: Tensor) -> None:
        """See `RateTerm.fit_scale`."""
        self.density.fit_scale(std)

    def forward(
        self, y: Tensor, step: float, multiple: float = 1.0, *, hard: bool = False, noise: Noise | None = None
    ) -> Tensor:
        """Bits of each latent: see `RateTerm.forward`."""
        return self.density.bits(_perturbed(y / step, multiple, hard=hard, noise=noise), multiple).sum(dim=(1, 2, 3))


class L1Rate(RateTerm):
    """The l1 norm of the latent in units of the step.

    Args:
        latent_channels: Cr.
    """

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.density = FactorizedDensity(latent_channels)

    def fit_scale(self, std: Tensor) -> None:
        """See `RateTerm.fit_scale`."""
        self.density.fit_scale(std)

    def forward(
        self, y: Tensor, step: float, multiple: float = 1.0, *, hard: bool = False, noise: Noise | None = None
    ) -> Tensor:
        """The norm, or the bits of the rounded latent: see `RateTerm.forward`.

        The density beside it learns in the same pass: its bits are added and subtracted again, so that only their
        gradient remains.
        """
        v = y / step
        bits = self.density.bits(_perturbed(v.detach(), multiple, hard=hard, noise=noise), multiple).sum(dim=(1, 2, 3))
        return bits if hard else (v / multiple).abs().sum(dim=(1, 2, 3)) + bits - bits.detach()


class HyperpriorRate(RateTerm):
    """The neural rate estimator of the paper, eq. (3), in the architecture of the authors' checkpoints.

    ``h_a``, the hyper-analysis: depthwise 3x3 with bias, batch norm, ReLU, 1x1 to Cz, batch norm. ``h_s``, the
    hyper-synthesis: 1x1 transposed to Cr, batch norm, ReLU, depthwise 3x3 transposed, batch norm. Its output is the
    logarithm of the Gaussian's standard deviation.

    Args:
        latent_channels: Cr.
        hyper_channels: Cz; 8 at every operating point of the authors.
        density_width: see `FactorizedDensity`; 1 for the authors' checkpoints.
    """

    def __init__(self, latent_channels: int, hyper_channels: int = 8, density_width: int = 3) -> None:
        super().__init__()
        cr, cz = latent_channels, hyper_channels
        self.h_a = nn.Sequential(
            nn.Conv2d(cr, cr, 3, padding=1, groups=cr),
            nn.BatchNorm2d(cr),
            nn.ReLU(),
            nn.Conv2d(cr, cz, 1),
            nn.BatchNorm2d(cz),
        )
        self.h_s = nn.Sequential(
            nn.ConvTranspose2d(cz, cr, 1),
            nn.BatchNorm2d(cr),
            nn.ReLU(),
            nn.ConvTranspose2d(cr, cr, 3, padding=1, groups=cr),
            nn.BatchNorm2d(cr),
        )
        self.density = FactorizedDensity(cz, density_width)

    @torch.no_grad()
    def fit_scale(self, std: Tensor) -> None:
        """See `RateTerm.fit_scale`."""
        norm = self.h_s[4]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.fill_(0.3)
        norm.bias.copy_(std.clamp(min=0.1).log())

    def forward(
        self, y: Tensor, step: float, multiple: float = 1.0, *, hard: bool = False, noise: Noise | None = None
    ) -> Tensor:
        """Bits of each latent and its hyper-latent: see `RateTerm.forward`."""
        v = y / step
        z = _perturbed(self.h_a(v), hard=hard, noise=noise)  # (N, Cz, h, w)
        sigma = torch.exp(self.h_s(z).clamp(-7.0, 7.0))  # (N, Cr, h, w)
        noisy = _perturbed(v, multiple, hard=hard, noise=noise)
        bits = gaussian_bin_bits(noisy / multiple, sigma / multiple).sum(dim=(1, 2, 3))
        return bits + self.density.bits(z).sum(dim=(1, 2, 3))


_KINDS: dict[RateKind, type[FactorizedRate] | type[HyperpriorRate] | type[L1Rate]] = {
    "hyperprior": HyperpriorRate,
    "factorized": FactorizedRate,
    "l1": L1Rate,
}


def build_rate(kind: RateKind, latent_channels: int) -> RateTerm:
    """A rate term by name."""
    return _KINDS[kind](latent_channels)
