"""From logits to answers: labels with scores, or a class map with the share of each class.

Dimensions: N frames, K classes, H x W the network's input.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.class_map import MAX_CLASSES, MAX_MAP_BYTES, best_classes, count_classes, encode_map
from bitneck.coding.coarse_map import coarse
from bitneck.errors import BitneckError, BundleCorrupt, ModelFailure
from bitneck.manifest import Manifest
from bitneck.wire.messages import Classification, ClassShare, CodedMap, Label, Output

__all__ = ["OutputTensor", "frames_of_a_pass", "output_of", "output_tensors"]

_LOG = logging.getLogger(__name__)
_TOP = 5

PASS_BYTES = 64 << 20
"""Largest tensor of a batch, unless a single frame has a larger one. Logits of 16 frames of 513x513 pixels and 21
classes are 354 MB."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of an answer. -1 in its shape means that the number differs."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def output_tensors(manifest: Manifest, classes: int) -> tuple[OutputTensor, ...]:
    """The tensors of an answer, in the words of the Open Inference Protocol.

    For classification the best scores are sent. For segmentation the coded map is sent, and the shares above zero.
    """
    if manifest.task == "segmentation":
        spec = manifest.input
        return (
            OutputTensor("classes", "UINT8", (1, spec.height, spec.width)),
            OutputTensor("shares", "FP32", (1, classes)),
        )
    return (OutputTensor("scores", "FP32", (1, classes)),)


def frames_of_a_pass(manifest: Manifest, classes: int) -> int:
    """Number of frames in a batch for which no feature and no logits take more than `PASS_BYTES`.

    Raises:
        BundleCorrupt: more classes than a class map can name.
    """
    if manifest.task == "segmentation" and not 1 <= classes <= MAX_CLASSES:
        raise BundleCorrupt(
            f"{manifest.labels} has {classes} classes, a class map can name 1 to {MAX_CLASSES}; export the bundle again"
        )
    sizes = [math.prod(split.feature_shape) for split in manifest.split_points]
    sizes += [math.prod(unit.decoded_shape) for unit in manifest.units if unit.decoded_shape is not None]
    sizes += [math.prod(tensor.shape) for tensor in output_tensors(manifest, classes)]
    if manifest.task == "segmentation":
        sizes.append(classes * manifest.input.pixels)
    return max(1, PASS_BYTES // (4 * max(sizes)))


def output_of(
    manifest: Manifest, labels: Sequence[str], logits: NDArray[np.float32], map_step: int = 1
) -> Output | BitneckError:
    """One frame's answer from its logits, or an error if they are no logits.

    Args:
        manifest: of the model.
        labels: names of the classes.
        logits: (K,) float32, or (K, H, W) for segmentation.
        map_step: pixels of the input from one pixel of a class map to the next.
    """
    spec = manifest.input
    expected = (len(labels), spec.height, spec.width) if manifest.task == "segmentation" else (len(labels),)
    try:
        if logits.shape != expected:
            raise ModelFailure(f"logits of shape {logits.shape}, expected {expected}")
        if manifest.task == "segmentation":
            return _segmentation(labels, logits, map_step)
        return _classification(labels, logits)
    except ModelFailure as exc:
        _LOG.error("the tail of %s: %s", manifest.name, exc)
        return ModelFailure("the tail gave no finite logits for this frame; the server's log says why")


def _classification(labels: Sequence[str], logits: NDArray[np.float32]) -> Classification:
    """The best labels and their softmax scores from logits (K,)."""
    if not np.isfinite(logits).all():
        raise ModelFailure("the logits are not finite")
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    best = np.argsort(-scores, kind="stable")[:_TOP]
    return Classification(tuple(Label(int(i), labels[i], float(scores[i])) for i in best))


def _segmentation(labels: Sequence[str], logits: NDArray[np.float32], map_step: int) -> CodedMap:
    """The class map, and the shares of the classes that occur, from logits (K, H, W)."""
    classes = best_classes(logits)  # (H, W)
    coded = encode_map(classes if map_step == 1 else coarse(classes, map_step))
    if len(coded) > MAX_MAP_BYTES:
        raise ModelFailure(f"the class map has {len(coded)} bytes, the limit is {MAX_MAP_BYTES}")
    counts = count_classes(classes, len(labels))  # (K,)
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return CodedMap(
        height=classes.shape[0],
        width=classes.shape[1],
        map=coded,
        classes=tuple(ClassShare(k, labels[k], float(counts[k] / classes.size)) for k in order),
        step=map_step,
    )
