"""Checks of what the cloud answered: a result is not trusted only because a server sent it. Pure."""

import math
from collections.abc import Sequence

import numpy as np

from bitneck.coding.class_map import MAX_CLASSES, count_classes, decode_map
from bitneck.coding.coarse_map import coarse_size, refined
from bitneck.errors import BundleCorrupt, ProtocolError
from bitneck.manifest import Manifest
from bitneck.wire.messages import Answers, Classification, ClassShare, CodedMap, Label, Result, Shares
from bitneck_edge.answers.results import Segmentation

__all__ = ["check_classes", "labels_of", "segmentation_of"]

_TOLERANCE = 1e-6
"""Of a share; it is a float32 on the wire."""


def check_classes(manifest: Manifest, labels: Sequence[str]) -> None:
    """Check that a class map can name every class of a bundle.

    Raises:
        BundleCorrupt: there are no classes, or more than one byte can number.
    """
    if not 1 <= len(labels) <= MAX_CLASSES:
        raise BundleCorrupt(f"{manifest.labels} has {len(labels)} classes, a class map can name 1 to {MAX_CLASSES}")


def labels_of(result: Result, names: Sequence[str]) -> tuple[Label, ...]:
    """The labels of an answer.

    Args:
        result: from the cloud.
        names: the bundle's names of the classes, by index, for labels that came without.

    Raises:
        ProtocolError: there are none, a score is not a finite number, or a label has neither a name nor a known index.
    """
    labels = result.output.labels if isinstance(result.output, Classification) else ()
    if not labels:
        raise ProtocolError(f"the answer to frame {result.seq} has no labels, expected one or more")
    return tuple(_named(label, names, result.seq) for label in labels)


def _named(label: Label, names: Sequence[str], seq: int) -> Label:
    """A label of the answer to a frame, with its name."""
    if not math.isfinite(label.score):
        raise ProtocolError(f"the answer to frame {seq} has the score {label.score}, expected a finite number")
    if label.name:
        return label
    if label.index >= len(names):
        raise ProtocolError(f"the answer to frame {seq} has a class that none of the {len(names)} labels is for")
    return Label(label.index, names[label.index], label.score)


def segmentation_of(
    result: Result, manifest: Manifest, names: Sequence[str], answers: Answers = Answers.ALL
) -> Segmentation:
    """The class map of an answer, and the shares of its classes.

    Args:
        result: from the cloud.
        manifest: of the bundle in use; the map has the size of its input.
        names: the bundle's names of the classes, by index; the names in the result are not used.
        answers: what the cloud was asked for.

    Raises:
        ProtocolError: there is no class map, it has another size or unknown classes, or the shares do not fit it; or
            there are no shares where these were asked for.
    """
    answer, spec = result.output, manifest.input
    if answers is Answers.SHARES:
        return Segmentation(map=np.empty((0, 0), dtype=np.uint8), classes=_shares(result, names), map_bytes=0)
    if not isinstance(answer, CodedMap):
        raise ProtocolError(
            f"the answer to frame {result.seq} has no class map, but {manifest.name} is for segmentation"
        )
    if (answer.height, answer.width) not in ((spec.height, spec.width), (0, 0)):
        raise ProtocolError(
            f"the answer to frame {result.seq} is a class map of {answer.height}x{answer.width} pixels, "
            f"expected {spec.height}x{spec.width}"
        )
    if answer.step != answers.map_step:
        raise ProtocolError(
            f"the answer to frame {result.seq} has each {answer.step}. pixel of the class map, expected each "
            f"{answers.map_step}."
        )
    height, width = (coarse_size(size, answer.step) for size in (spec.height, spec.width))
    try:
        classes = decode_map(answer.map, height=height, width=width, number=len(names))
    except ProtocolError as exc:
        raise ProtocolError(f"the answer to frame {result.seq}: {exc}") from exc
    classes = refined(classes, answer.step, height=spec.height, width=spec.width)
    counts = count_classes(classes, len(names))  # (K,)
    said = {share.index: share.share for share in answer.classes}
    real = {k: int(counts[k]) / classes.size for k in range(len(names)) if counts[k]}
    if not said:  # we have counted them ourselves
        said = real
    elif answer.step > 1:  # of the whole map: better than ours
        real = {k: share for k, share in said.items() if k < len(names) and 0 <= share <= 1}
    if said.keys() != real.keys() or not all(abs(said[k] - share) <= _TOLERANCE for k, share in real.items()):
        raise ProtocolError(f"the answer to frame {result.seq} states shares that its class map does not have")
    shares = [ClassShare(k, names[k], real[k]) for k in sorted(real, key=lambda k: -real[k])]
    return Segmentation(map=classes, classes=tuple(shares), map_bytes=len(answer.map))


def _shares(result: Result, names: Sequence[str]) -> tuple[ClassShare, ...]:
    """The shares of an answer without a class map."""
    shares = result.output.classes if isinstance(result.output, Shares) else ()
    if not shares or not all(share.index < len(names) and 0 <= share.share <= 1 for share in shares):
        raise ProtocolError(
            f"the answer to frame {result.seq} has {len(shares)} shares, expected one or more, each from 0 to 1 and of "
            f"one of {len(names)} classes"
        )
    return tuple(ClassShare(share.index, names[share.index], share.share) for share in shares)
