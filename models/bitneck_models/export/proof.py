"""The proof that a bundle equals the network and the units that it was exported from.

Compared, on the images given:
- every head and tail of the chain with the backbone, so that each split point is a true cut;
- each encoder and decoder with torch's latent and feature;
- after a decoder that was imported, and so does not exist in torch, the tail with torch's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.errors import ModelFailure
from bitneck.image import find_photos, load_photo, preprocess
from bitneck.manifest import InputSpec
from bitneck_models.networks.backbone import Backbone
from bitneck_models.units.unit import BottleneckUnit

__all__ = ["TOLERANCE", "Proof", "proof_count", "proof_images", "prove"]

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of the reference."""

_PIXELS = 8 * 224 * 224


@dataclass(frozen=True, slots=True)
class Proof:
    """Largest relative differences between a bundle and torch.

    Attributes:
        chain: of heads and tails, by what was compared.
        encoders: of encoders, by unit.
        decoders: of decoders, by unit.
    """

    chain: dict[str, float]
    encoders: dict[str, float]
    decoders: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest difference; NaN if one of them is."""
        return float(np.max([*self.chain.values(), *self.encoders.values(), *self.decoders.values()]))


def proof_count(spec: InputSpec) -> int:
    """Number of images for a proof: 8 of 224x224, fewer if they are larger, at least 2."""
    return max(2, min(8, _PIXELS // spec.pixels))


def proof_images(spec: InputSpec, source: Path | None, count: int = 8) -> NDArray[np.float32]:
    """Make the images for a proof.

    Args:
        spec: the backbone's input.
        source: a folder, whose first photographs are taken; None for generated pictures of smooth random colours.
        count: number of images.

    Returns:
        (count or fewer, 3, H, W) float32, normalized.

    Raises:
        ImageError: there are no photographs, or they are unreadable.
    """
    if source is not None:
        return np.concatenate([preprocess(load_photo(path), spec) for path in find_photos(source)[:count]])
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]
    return np.concatenate([preprocess(p.resize((400, 300), Image.Resampling.BICUBIC), spec) for p in pictures])


@torch.no_grad()
def prove(bundle: Bundle, backbone: Backbone, units: dict[str, BottleneckUnit], images: NDArray[np.float32]) -> Proof:
    """Compare a bundle with torch.

    Args:
        bundle: the exported bundle.
        backbone: the network that the chain must equal.
        units: the units by id. Imported ones have none here, so only the tail after them is compared.
        images: (N, 3, H, W) float32, normalized.

    Raises:
        ModelFailure: a difference is larger than `TOLERANCE`, or the output has not the shape that the task needs.
    """
    x = torch.from_numpy(images)
    output = backbone(x).numpy()
    if output.shape[1:] != backbone.output_shape:
        raise ModelFailure(
            f"{backbone.name} gave an output of shape {output.shape[1:]}, {backbone.task} with {len(backbone.labels)} "
            f"labels needs {backbone.output_shape}"
        )
    chain = SegmentChain(bundle)
    whole: dict[str, float] = {}
    encoders: dict[str, float] = {}
    decoders: dict[str, float] = {}
    for split in bundle.manifest.split_points:
        head = chain.head_length(split.name)
        f = chain.run(images, 0, head)  # (N, C, Hf, Wf)
        reference = backbone.head(split.name)(x)
        whole[f"head {split.name}"] = _difference(f, reference.numpy())
        whole[f"head {split.name} + tail"] = _difference(chain.run(f, head, len(chain)), output)
        whole[f"torch head {split.name} + tail"] = _difference(backbone.tail(split.name)(reference).numpy(), output)
        proven: set[str] = set()
        for point in bundle.manifest.ladder:
            if point.split != split.name or point.unit in proven:
                continue
            proven.add(point.unit)
            unit = units.get(point.unit)
            if unit is None:
                f_hat = PointDecoder(bundle, point).decode(_onnx_latent(bundle, point.id, f))
                answer = chain.run(f_hat, head, len(chain))
                expected = backbone.tail(split.name)(torch.from_numpy(f_hat)).numpy()
                decoders[f"{point.unit} + tail"] = _difference(answer, expected)
                continue
            y = unit.encoder(reference)
            encoders[point.unit] = _difference(_onnx_latent(bundle, point.id, f), y.numpy())
            y_hat = torch.round(y / point.step) * point.step
            decoded = PointDecoder(bundle, point).decode(y_hat.numpy())
            decoders[point.unit] = _difference(decoded, unit.decoder(y_hat).numpy())
    proof = Proof(whole, encoders, decoders)
    if not proof.worst <= TOLERANCE:
        raise ModelFailure(f"the exported bundle differs from torch by {proof.worst:.2e} relative: {proof}")
    return proof


def _onnx_latent(bundle: Bundle, point_id: str, f: NDArray[np.float32]) -> NDArray[np.float32]:
    encoder = PointEncoder(bundle, bundle.manifest.ladder[point_id])
    return np.concatenate([encoder.latent(one[None]) for one in f])


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())
