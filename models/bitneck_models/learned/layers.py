"""Layers of the learned baselines.

Dimensions: N batch, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gdn", "begin_large", "down", "up"]

_FLOOR = 1e-6
_LATENT_SIZE = 8.0
_COUPLING = 1e-3
"""Square root of what a fresh layer takes from other channels."""


class Gdn(nn.Module):
    """Generalized divisive normalization: Balle, Laparra, Simoncelli 2016 (1511.06281).

    ``x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)``, or with `simple` ``x_i / (beta_i + sum_j gamma_ij |x_j|)``. beta and
    gamma are kept as square roots, so that they stay positive.

    Args:
        channels: C.
        inverse: multiply instead of divide.
        simple: see above; Entropic Student uses this one.
    """

    def __init__(self, channels: int, *, inverse: bool = False, simple: bool = False) -> None:
        super().__init__()
        self.inverse, self.simple = inverse, simple
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.full((channels, channels), _COUPLING) + (0.1**0.5) * torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same size."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            size = x.abs() if self.simple else x.square()
            norm = F.conv2d(size, self.gamma.square()[:, :, None, None], self.beta.square() + _FLOOR)
            norm = norm if self.simple else norm.sqrt()
            return x * norm if self.inverse else x / norm


def down(inputs: int, outputs: int) -> nn.Conv2d:
    """5x5 at stride 2."""
    return nn.Conv2d(inputs, outputs, 5, 2, padding=2)


def up(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """Transposed 5x5 at stride 2, to twice the size."""
    return nn.ConvTranspose2d(inputs, outputs, 5, 2, padding=2, output_padding=1)


@torch.no_grad()
def begin_large(analysis: nn.Sequential, synthesis: nn.Sequential) -> None:
    """Set the weights of two transforms so that they keep the size of what passes, and the latent is large.

    Torch's own weights make a latent that drowns in the noise of rounding, and a short training is spent on raising it.

    Args:
        analysis: picture to latent; its last layer is a convolution.
        synthesis: the way back; its first layer is a convolution.
    """
    for module in [*analysis, *synthesis]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            taps = float(module.kernel_size[0] * module.kernel_size[1])
            if isinstance(module, nn.ConvTranspose2d):
                taps /= module.stride[0] * module.stride[1]
            nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
    for layer, factor in ((analysis[-1], _LATENT_SIZE), (synthesis[0], 1 / _LATENT_SIZE)):
        assert isinstance(layer.weight, Tensor)
        layer.weight.mul_(factor)
