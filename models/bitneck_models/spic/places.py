"""The places of the authors' units in their networks, and the geometry that follows: no checkpoint has the padding."""

from collections.abc import Mapping
from dataclasses import dataclass

from bitneck.errors import InvalidConfig

__all__ = ["PLACES", "Place", "SpicGeometry", "spic_geometry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of a unit of the authors, and what its checkpoint does not say.

    Attributes:
        channels: C.
        size: Hf = Wf of the feature, at the network's own input size.
        encoder_padding: padding of `conv2_2`.
        decoders: kernel and padding of `conv2_5`, by stride. The unit can have these strides only.
        module: the module that gives the feature, as torchvision names it.
        true_cut: whether the feature is the only tensor that crosses.
    """

    channels: int
    size: int
    encoder_padding: int
    decoders: Mapping[int, tuple[int, int]]
    module: str
    true_cut: bool = True


_RESNET_LAST = {2: (3, 1), 4: (3, 0), 6: (3, 1)}
_DEEPLAB_BODY = {2: (3, 0), 4: (5, 0), 6: (5, 0)}

PLACES: Mapping[str, Mapping[str, Place]] = {
    "resnet50": {
        "s1": Place(channels=2048, size=7, encoder_padding=1, decoders=_RESNET_LAST, module="layer4.2"),
        "s2": Place(channels=2048, size=7, encoder_padding=1, decoders=_RESNET_LAST, module="layer4.0"),
        "s3": Place(
            channels=1024, size=14, encoder_padding=1, decoders={2: (3, 0), 4: (5, 0), 6: (5, 0)}, module="layer3.4"
        ),
    },
    "deeplabv3_resnet50": {
        "s1": Place(
            channels=256,
            size=65,
            encoder_padding=0,
            decoders={4: (5, 0), 6: (5, 0), 8: (9, 0)},
            module="classifier.0.convs.1",  # one of five branches; the others pass around it
            true_cut=False,
        ),
        "s2": Place(channels=2048, size=65, encoder_padding=0, decoders=_DEEPLAB_BODY, module="backbone.layer4.1"),
        "s3": Place(channels=1024, size=65, encoder_padding=0, decoders=_DEEPLAB_BODY, module="backbone.layer3.5"),
    },
}
"""The authors' units by network and split point. Unsupervised checkpoints (US1, US2) have the geometry of S1 and S2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpicGeometry:
    """Everything that decides the shapes of one unit.

    Attributes:
        backbone: the network.
        split: the split point.
        place: see `Place`.
        stride: S.
        channels: Cr.
        kernel: kernel of the transposed convolution.
        padding: padding of the transposed convolution.
    """

    backbone: str
    split: str
    place: Place
    stride: int
    channels: int
    kernel: int
    padding: int

    def latent_size(self, size: int) -> int:
        """Height or width of the latent, for a feature of this height or width."""
        return (size + 2 * self.place.encoder_padding - 3) // self.stride + 1

    def decoded_size(self, size: int) -> int:
        """Height or width that the decoder returns for a feature of this height or width."""
        return (self.latent_size(size) - 1) * self.stride - 2 * self.padding + self.kernel

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(C, Hf, Wf) at the network's own input size."""
        return self.place.channels, self.place.size, self.place.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(Cr, h, w) at the network's own input size."""
        return self.channels, (n := self.latent_size(self.place.size)), n

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, H', W') of the decoded feature, at the network's own input size."""
        return self.place.channels, (n := self.decoded_size(self.place.size)), n


def spic_geometry(backbone: str, split: str, stride: int, channels: int, kernel: int) -> SpicGeometry:
    """The geometry of a unit.

    Args:
        backbone: a key of `PLACES`.
        split: s1, s2 or s3.
        stride: S.
        channels: Cr, from the checkpoint's shapes.
        kernel: kernel of the transposed convolution, from the checkpoint's shapes.

    Raises:
        InvalidConfig: the authors have no such unit, or the kernel belongs to another stride.
    """
    if backbone not in PLACES:
        raise InvalidConfig(f"the authors have no units for {backbone!r}; they have: {', '.join(PLACES)}")
    places = PLACES[backbone]
    if split not in places:
        raise InvalidConfig(f"the authors have no unit at {split!r} of {backbone}; they have: {', '.join(places)}")
    place = places[split]
    if stride not in place.decoders:
        known = ", ".join(str(s) for s in place.decoders)
        raise InvalidConfig(f"stride {stride} has no unit at {split} of {backbone}; strides there: {known}")
    expected, padding = place.decoders[stride]
    if kernel != expected:
        fits = [str(s) for s, (k, _) in place.decoders.items() if k == kernel]
        raise InvalidConfig(
            f"conv2_5 is {kernel}x{kernel}, stride {stride} at {split} of {backbone} has {expected}x{expected}; "
            + (f"try stride {' or '.join(fits)}" if fits else "is it another network's or split point's checkpoint?")
        )
    return SpicGeometry(
        backbone=backbone, split=split, place=place, stride=stride, channels=channels, kernel=kernel, padding=padding
    )
