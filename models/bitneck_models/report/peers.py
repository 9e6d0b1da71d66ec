"""What other systems published: not measured here, and neither our network nor our photographs.

All are ResNet-50 on ImageNet's validation set; the first source gives its top-1 without compression, 75.6 %. Figures of
curves are read off pictures, within 0.2 points and 5 % of the bits.
"""

from dataclasses import dataclass

__all__ = ["PEERS", "PEERS_KEY", "PEERS_UNCOMPRESSED", "Peer"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A published curve.

    Attributes:
        name: of the system and the curve.
        source: where it is published.
        curve: (bits per input pixel, top-1 in percent).
    """

    name: str
    source: str
    curve: tuple[tuple[float, float], ...]

    @property
    def lost(self) -> list[tuple[float, float]]:
        """(bits per input pixel, top-1 lost against the uncompressed network as a share)."""
        return [(bpp, (PEERS_UNCOMPRESSED - top1) / 100) for bpp, top1 in self.curve]


PEERS_KEY = "top1"
"""Name of the accuracy that they publish; see `bitneck_models.measure.meter.Metric`."""

PEERS_UNCOMPRESSED = 75.6
"""Top-1 of ResNet-50, in percent."""

_PAPER = "Ahuja et al., CVPR 2023"
PEERS = (
    Peer(
        "split-DNN, S1 supervised", _PAPER,
        ((0.0054, 70.2), (0.0068, 70.6), (0.0088, 72.7), (0.013, 73.7), (0.024, 74.4), (0.048, 74.7), (0.083, 74.9)),
    ),
    Peer(
        "split-DNN, S2 supervised", _PAPER,
        ((0.0072, 66.0), (0.0147, 69.6), (0.027, 73.3), (0.062, 73.8), (0.095, 74.6)),
    ),
    Peer(
        "split-DNN, S3 supervised", _PAPER,
        ((0.0405, 64.1), (0.047, 68.9), (0.083, 72.0), (0.115, 73.2), (0.14, 73.8), (0.225, 74.1)),
    ),
    Peer(
        "scale hyperprior codec", f"measured by {_PAPER}",
        ((0.31, 52.3), (0.455, 62.2), (0.66, 68.2), (0.94, 71.8), (1.25, 73.7), (1.6, 74.6)),
    ),
    Peer(
        "Entropic Student", "Matsubara et al., 2108.11898",
        ((0.16, 57.3), (0.35, 71.5), (0.61, 74.3), (0.91, 75.0)),
    ),
    Peer(
        "edge-cloud-rac, n = 8", "its repository",
        ((0.093, 67.9), (0.14, 70.6), (0.225, 71.5), (0.315, 73.0), (0.717, 74.6)),
    ),
)  # fmt: skip
