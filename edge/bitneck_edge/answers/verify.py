"""What the cloud answered, checked: nothing of it is believed because it came from a server."""

import math
from collections.abc import Sequence

from bitneck.coding.class_map import MAX_CLASSES, count_classes, decode_map
from bitneck.errors import BundleCorrupt, ProtocolError
from bitneck.manifest import Manifest
from bitneck.wire.messages import Classification, ClassShare, CodedMap, Label, Result
from bitneck_edge.answers.results import Segmentation

__all__ = ["check_classes", "labels_of", "segmentation_of"]

_TOLERANCE = 1e-6
"""Of a share, a float32 on the wire."""


def check_classes(manifest: Manifest, labels: Sequence[str]) -> None:
    """Whether a class map can name the classes of a bundle.

    Raises:
        BundleCorrupt: more classes than a byte counts, or none.
    """
    if not 1 <= len(labels) <= MAX_CLASSES:
        raise BundleCorrupt(f"{manifest.labels} has {len(labels)} classes, a class map can name 1 to {MAX_CLASSES}")


def labels_of(result: Result) -> tuple[Label, ...]:
    """The labels of an answer.

    Raises:
        ProtocolError: none, or one whose score is no number.
    """
    labels = result.output.labels if isinstance(result.output, Classification) else ()
    if not labels or not all(math.isfinite(label.score) for label in labels):
        raise ProtocolError(
            f"the answer to frame {result.seq} has {len(labels)} labels, expected one or more, each with a finite score"
        )
    return labels


def segmentation_of(result: Result, manifest: Manifest, names: Sequence[str]) -> Segmentation:
    """The class map of an answer, and the shares of its classes.

    Args:
        result: the cloud's.
        manifest: of the bundle in use; its input says how large the map is.
        names: of the classes, by index: the bundle's own, whatever the cloud calls them.

    Raises:
        ProtocolError: no class map, one that is not as large as the input or names other classes, or shares that are
            not those of the map.
    """
    answer, spec = result.output, manifest.input
    if not isinstance(answer, CodedMap):
        raise ProtocolError(f"the answer to frame {result.seq} has no class map; {manifest.name} is for segmentation")
    if (answer.height, answer.width) != (spec.height, spec.width):
        raise ProtocolError(
            f"the answer to frame {result.seq} is a class map of {answer.height}x{answer.width} pixels, "
            f"expected {spec.height}x{spec.width}"
        )
    try:
        classes = decode_map(answer.map, height=spec.height, width=spec.width, number=len(names))
    except ProtocolError as exc:
        raise ProtocolError(f"the answer to frame {result.seq}: {exc}") from exc
    counts = count_classes(classes, len(names))  # (K,)
    said = {share.index: share.share for share in answer.classes}
    real = {k: int(counts[k]) / classes.size for k in range(len(names)) if counts[k]}
    if said.keys() != real.keys() or not all(abs(said[k] - share) <= _TOLERANCE for k, share in real.items()):
        raise ProtocolError(f"the answer to frame {result.seq} states shares that are not those of its class map")
    shares = [ClassShare(k, names[k], real[k]) for k in sorted(real, key=lambda k: -real[k])]
    return Segmentation(map=classes, classes=tuple(shares), map_bytes=len(answer.map))
