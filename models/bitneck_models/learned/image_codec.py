"""The scale hyperprior image codec: Balle, Minnen, Singh, Hwang, Johnston 2018 (1802.01436).

    x --g_a--> y --round--> y_hat --g_s--> x_hat         y_hat ~ N(0, sigma^2) integrated over bins of 1
               |--abs, h_a--> z --round--> z_hat --h_s--> sigma

Dimensions: N batch, H x W picture, M latent channels.
"""

from collections.abc import Sequence

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.coding.range_coder import range_coded, range_decoder
from bitneck_models.learned.layers import Gdn, begin_large, down, up
from bitneck_models.losses.rate_terms import FactorizedDensity, Noise, gaussian_bin_bits, lower_bound

__all__ = ["ImageCodec", "ImageCoder"]

_LEAST_SIGMA = 0.11
_LARGEST_SYMBOL = 1023
_PIXEL = 255.0**2
_SYMBOLS = constriction.stream.model.QuantizedGaussian(-_LARGEST_SYMBOL, _LARGEST_SYMBOL)


class ImageCodec(nn.Module):
    """The four transforms and the density of z.

    Args:
        channels: of the layers, N in the paper.
        latent_channels: M.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        n, m = channels, latent_channels
        self.g_a = nn.Sequential(down(3, n), Gdn(n), down(n, n), Gdn(n), down(n, n), Gdn(n), down(n, m))
        self.g_s = nn.Sequential(
            up(m, n), Gdn(n, inverse=True), up(n, n), Gdn(n, inverse=True), up(n, n), Gdn(n, inverse=True), up(n, 3)
        )
        self.h_a = nn.Sequential(
            nn.Conv2d(m, n, 3, padding=1), nn.ReLU(), down(n, n), nn.ReLU(), down(n, n)
        )  # fmt: skip
        self.h_s = nn.Sequential(
            up(n, n), nn.ReLU(), up(n, n), nn.ReLU(), nn.Conv2d(n, m, 3, padding=1), nn.ReLU()
        )  # fmt: skip
        self.density = FactorizedDensity(n)
        begin_large(self.g_a, self.g_s)

    def sigma(self, z_hat: Tensor, size: Sequence[int]) -> Tensor:
        """Standard deviations of the latent of height and width `size`."""
        scales: Tensor = self.h_s(z_hat)[:, :, : size[0], : size[1]]
        return lower_bound(scales, _LEAST_SIGMA)

    def coded(self, x: Tensor) -> Tensor:
        """What the density codes: z of pictures (N, 3, H, W)."""
        z: Tensor = self.h_a(self.g_a(x).abs())
        return z

    def loss(self, lambda_: float, x: Tensor, noise: Noise) -> tuple[Tensor, float, float]:
        """Bits a pixel plus lambda times the squared error, with noise in place of rounding.

        Args:
            lambda_: weight of the squared error of pixels from 0 to 255.
            x: pictures, (N, 3, H, W), values from 0 to 1.
            noise: the noise.

        Returns:
            The loss; bits a pixel; the mean squared error.
        """
        y = self.g_a(x).float()  # (N, M, H / 16, W / 16)
        z = self.h_a(y.abs()).float()
        z = z + noise(z)
        y_noisy = y + noise(y)
        bits = gaussian_bin_bits(y_noisy, self.sigma(z, y.shape[2:]).float()).sum() + self.density.bits(z).sum()
        rate = bits / (len(x) * x.shape[2] * x.shape[3])
        error = (self.g_s(y_noisy).float()[:, :, : x.shape[2], : x.shape[3]] - x).square().mean() * _PIXEL
        return rate + lambda_ * error, rate.item(), error.item()

    @torch.no_grad()
    def symbols(self, x: Tensor) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Rounded y and z of pictures, int32."""
        y = self.g_a(x)
        return _rounded(y), _rounded(self.h_a(y.abs()))


def _rounded(t: Tensor) -> NDArray[np.int32]:
    return t.round().clamp(-_LARGEST_SYMBOL, _LARGEST_SYMBOL).int().numpy()


class ImageCoder:
    """Codes pictures as bytes. Both ends have to be the same machine: sigma is a float.

    Args:
        codec: the trained codec, in evaluation mode.
        hyper_tables: tables of z.
    """

    def __init__(self, codec: ImageCodec, hyper_tables: FactorizedModel) -> None:
        self.codec, self.tables = codec, hyper_tables
        self._hyper: dict[tuple[int, int, int], FactorizedCodec] = {}

    def _coder(self, shape: tuple[int, int, int]) -> FactorizedCodec:
        if shape not in self._hyper:
            self._hyper[shape] = FactorizedCodec(self.tables, shape)
        return self._hyper[shape]

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[bytes, bytes]:
        """The two payloads of one picture (1, 3, H, W): of z, and of y."""
        y, z = (symbols[0] for symbols in self.codec.symbols(x))
        z = z.clip(self.tables.lo[:, None, None], self.tables.hi[:, None, None])
        symbols = range_coded([(y.ravel(), _SYMBOLS, *self._gaussians(z, y.shape[1:]))])
        return self._coder(z.shape).encode(z), symbols

    @torch.no_grad()
    def decode(self, payloads: tuple[bytes, bytes], size: tuple[int, int]) -> Tensor:
        """The picture (1, 3, H, W) of two payloads, values from 0 to 1.

        Args:
            payloads: from `encode`.
            size: height and width of the picture.
        """
        latent = tuple(_halved(side, 4) for side in size)
        hyper = tuple(_halved(side, 2) for side in latent)
        z = self._coder((self.tables.channels, hyper[0], hyper[1])).decode(payloads[0])
        with range_decoder(payloads[1]) as decoder:
            flat = decoder.decode(_SYMBOLS, *self._gaussians(z, latent))
        y_hat = torch.from_numpy(flat.reshape(1, -1, *latent)).float()
        picture: Tensor = self.codec.g_s(y_hat)[:, :, : size[0], : size[1]]
        return picture.clamp(0, 1)

    def _gaussians(self, z: NDArray[np.int32], size: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means and standard deviations of every symbol of y, flat."""
        sigma = self.codec.sigma(torch.from_numpy(z[None]).float(), size).double().numpy().ravel()
        return np.zeros_like(sigma), sigma


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = -(-side // 2)
    return side
