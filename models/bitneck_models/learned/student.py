"""Entropic Student: Matsubara, Yang, Levorato, Mandt 2022 (2108.11898).

    x --encoder--> y --round--> y_hat --decoder--> f_hat --the rest of the network, tuned--> logits

A small encoder takes the place of the network's first layers; a factorized prior codes its latent.

Dimensions: N batch, H x W input, C x Hf x Wf feature, Cr latent channels.
"""

from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.learned.layers import Gdn, begin_large
from bitneck_models.losses.rate_terms import FactorizedDensity, Noise

__all__ = ["Student"]


class Student(nn.Module):
    """Encoder, density and decoder: the authors' layers, whose normalizations are `Gdn(simple=True)`.

    The authors give the encoder 4 Cr, 2 Cr and Cr channels, for ResNet-50. With 32, 32 and 24 it costs a third of
    EfficientNet-Lite0, as much as the earliest split point.

    Args:
        encoder_channels: of the encoder's first two layers.
        latent_channels: Cr.
        feature_shape: (C, Hf, Wf); the decoder's widths are 2 C, C and C, as the authors' are.
        input_size: height and width.

    Raises:
        InvalidConfig: the feature is not a quarter of the input's height and width.
    """

    def __init__(
        self,
        encoder_channels: int,
        latent_channels: int,
        feature_shape: tuple[int, int, int],
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        channels, *size = feature_shape
        if size != [-(-side // 4) for side in input_size]:
            raise InvalidConfig(
                f"stage: its output is {size[0]}x{size[1]}, and the student's decoder gives a quarter of the input's "
                f"height and width; choose a stage that does so"
            )
        e, c = encoder_channels, channels
        self.encoder = nn.Sequential(
            nn.Conv2d(3, e, 5, 2, padding=2), Gdn(e, simple=True),
            nn.Conv2d(e, e, 5, 2, padding=2), Gdn(e, simple=True),
            nn.Conv2d(e, latent_channels, 2),
        )  # fmt: skip
        self.density = FactorizedDensity(latent_channels)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * c, 2, padding=1), Gdn(2 * c, inverse=True, simple=True),
            nn.Conv2d(2 * c, c, 2), Gdn(c, inverse=True, simple=True),
            nn.Conv2d(c, c, 2, padding=1),
        )  # fmt: skip
        begin_large(self.encoder, self.decoder)

    def coded(self, x: Tensor) -> Tensor:
        """What the density codes: the latent of inputs (N, 3, H, W)."""
        y: Tensor = self.encoder(x)
        return y

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """What training sees, with noise in place of rounding.

        Args:
            x: inputs, (N, 3, H, W).
            noise: the noise.

        Returns:
            f_hat, (N, C, Hf, Wf); mean bits of a photograph.
        """
        y = self.encoder(x).float()
        y = y + noise(y)
        return self.decoder(y), self.density.bits(y).sum() / len(x)
