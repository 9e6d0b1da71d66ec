"""The edge's half of a served bundle, run in the server: for photographs that are tried, or compared."""

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.coding.class_map import MAX_CLASSES, decode_map
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.runtime import ModulePool
from bitneck.wire.messages import CodedMap, Output
from bitneck_cloud.engine.outputs import output_of
from bitneck_cloud.engine.served_model import ServedModel

__all__ = ["EdgeHalf", "classes_of"]


class EdgeHalf:
    """The edge's half of a bundle. The encoders are loaded now, a segment when it first runs.

    Attributes:
        bundle_id: of the bundle.
        encoders: of the operating points, by id.

    Args:
        served: the model; its bundle's folder must have the edge's half.
        threads: of ONNX Runtime inside one operator; 0 for every core.

    Raises:
        InvalidConfig: the folder has no edge's half, or another bundle by now.
        ModelFailure: ONNX Runtime cannot load a file.
    """

    def __init__(self, served: ServedModel, threads: int = 0) -> None:
        self._manifest, self._labels = served.manifest, served.labels
        bundle = served.bundle
        self.bundle_id = bundle.bundle_id
        try:
            whole = Bundle.open(bundle.root)
        except BitneckError as exc:
            raise InvalidConfig(f"this server's folder has no edge's half of {bundle.manifest.name} ({exc})") from exc
        if whole.bundle_id != bundle.bundle_id:
            raise InvalidConfig(f"{bundle.root} holds another bundle than the one that is served; reload it first")
        pool = ModulePool()
        self._chain = SegmentChain(whole, threads=threads, pool=pool, precision="float32")
        self.encoders = {point.id: PointEncoder(whole, point, pool=pool) for point in whole.manifest.ladder}

    def features(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The feature at each split point, from an input (1, 3, H, W); each segment of the head runs once."""
        lengths = {point.split: self._chain.head_length(point.split) for point in self._manifest.ladder}
        features, done, f = {}, 0, x
        for split, length in sorted(lengths.items(), key=lambda item: item[1]):
            f = self._chain.run(f, done, length)
            features[split], done = f, length
        return features

    def whole(self, x: NDArray[np.float32]) -> Output:
        """The answer of the uncompressed network to an input (1, 3, H, W).

        Raises:
            ModelFailure: it gave no finite logits.
        """
        logits = self._chain.run(x, 0, len(self._chain))
        output = output_of(self._manifest, self._labels, logits[0], 1)
        if isinstance(output, BitneckError):
            raise output
        return output


def classes_of(coded: CodedMap) -> NDArray[np.uint8]:
    """The class of each pixel, (H, W)."""
    return decode_map(coded.map, height=coded.height, width=coded.width, number=MAX_CLASSES)
