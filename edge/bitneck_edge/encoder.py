"""Photograph to symbols and payload: the edge's half of the network, with the time that each stage took."""

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass

from PIL import Image

from bitneck.bundle import Bundle
from bitneck.chain import Encoded, PointEncoder, SegmentChain
from bitneck.coding.conditional_codec import Reference
from bitneck.errors import BitneckError
from bitneck.ladder import OperatingPoint
from bitneck.runtime import ModulePool, return_freed_memory
from bitneck_edge.answers.verify import check_classes
from bitneck_edge.sources.photo import Photo, PhotoLike, input_of, photo_of

__all__ = ["FIRST_RUN_S", "EdgeEncoder", "EncodedPhoto", "Photo"]


FIRST_RUN_S = 60.0
"""Seconds that the first run of a file of the server may take. `bitneck.onnx_file.cost` has bounded its operations; how
long these take here is not known before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPhoto:
    """An encoded photograph, and what each stage took.

    Attributes:
        point: operating point.
        split: its split point.
        encoded: symbols and payload.
        symbols: for later frames that refer to this one; None if none may.
        load_ms: reading and decoding the photograph.
        preprocess_ms: resize, crop, normalize.
        head_ms: the network's first part.
        encode_ms: bottleneck encoder, quantizer, range coder.
    """

    point: str
    split: str
    encoded: Encoded
    symbols: Reference | None
    load_ms: float
    preprocess_ms: float
    head_ms: float
    encode_ms: float


class EdgeEncoder:
    """Head segments, loaded once, and one bottleneck encoder per operating point, loaded when first used.

    Switching the operating point reads no segment again. Several threads may use it at once.

    Attributes:
        bundle: the edge's half.
        ladder: its operating points.
        chain: the head's segments.
        labels: names of the classes.

    Args:
        bundle: the edge's half.
        threads: of ONNX Runtime inside one operator of the head; 0 for every core.
        pool: loads the ONNX modules; encoders with one pool share equal modules.
        exact: decode and resize photographs as in training, with more work; see
            `bitneck_edge.sources.photo.input_of`.

    Raises:
        BundleCorrupt: the names of the classes are unreadable.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, pool: ModulePool | None = None, exact: bool = False
    ) -> None:
        self.exact = exact
        self.bundle = bundle
        self.ladder = bundle.manifest.ladder
        self._pool = pool or ModulePool(first_run_s=FIRST_RUN_S)
        self.chain = SegmentChain(bundle, threads=threads, pool=self._pool)
        self.labels = bundle.labels()
        if bundle.manifest.task == "segmentation":
            check_classes(bundle.manifest, self.labels)
        self._encoders: dict[str, PointEncoder] = {}
        self._loading = threading.Lock()

    def point_encoder(self, point_id: str) -> PointEncoder:
        """The encoder of an operating point.

        Raises:
            UnknownPoint: the bundle has no such point; the message lists them.
            BundleError, ModelFailure: its files cannot be used.
        """
        encoder = self._encoders.get(point_id)
        if encoder is None:
            point = self.ladder[point_id]
            with self._loading:
                encoder = self._encoders.get(point_id)
                if encoder is None:
                    self.chain.load(0, self.chain.head_length(point.split))
                    encoder = self._encoders[point_id] = PointEncoder(self.bundle, point, pool=self._pool)
                    self._load_tables_of(point)
                    return_freed_memory()
        return encoder

    def _load_tables_of(self, loaded: OperatingPoint) -> None:
        """Load the tables of the other points of a unit, so that a switch among them loads nothing."""
        for point in self.ladder:
            tables = self.bundle.path(self.bundle.manifest.point(point.id).tables)
            if point.unit == loaded.unit and point.id not in self._encoders and tables.is_file():
                with contextlib.suppress(BitneckError):  # whoever uses the point is told
                    self._encoders[point.id] = PointEncoder(self.bundle, point, pool=self._pool)

    def encode(
        self, photo: PhotoLike, point_id: str, *, similar: bool = False, reference: Reference | None = None
    ) -> EncodedPhoto:
        """Run one photograph through the edge's half.

        Args:
            photo: the picture.
            point_id: the operating point.
            similar: whether later frames may refer to this one.
            reference: code the photograph against these symbols, too.

        Raises:
            ImageError: it cannot be read.
            UnknownPoint: no such operating point.
            ModelFailure: ONNX Runtime failed.
        """
        encoder = self.point_encoder(point_id)
        times = [time.perf_counter()]
        with input_of(photo_of(photo), self.bundle.manifest.input, exact=self.exact) as (x, decoded):  # (1, 3, H, W)
            times.append(decoded)
        times.append(time.perf_counter())
        f = self.chain.run(x, 0, self.chain.head_length(encoder.point.split))  # (1, C, Hf, Wf)
        times.append(time.perf_counter())
        encoded = encoder.encode(f, reference)
        conditional = encoder.conditional if similar else None
        symbols = conditional.keep(encoded.symbols) if conditional is not None else None
        times.append(time.perf_counter())
        load, prepare, head, encode = ((b - a) * 1e3 for a, b in itertools.pairwise(times))
        return EncodedPhoto(
            point=point_id,
            split=encoder.point.split,
            encoded=encoded,
            symbols=symbols,
            load_ms=load,
            preprocess_ms=prepare,
            head_ms=head,
            encode_ms=encode,
        )

    def time_splits(self, runs: int = 3) -> dict[str, float]:
        """Seconds of head and encoder on this device, by split point: the best of some runs."""
        best: dict[str, float] = {}
        spec = self.bundle.manifest.input
        blank = Image.new("RGB", (spec.width, spec.height), (128, 128, 128))
        for split in dict.fromkeys(point.split for point in self.ladder):
            point = next(point for point in self.ladder if point.split == split)
            times = [self.encode(blank, point.id) for _ in range(runs)]
            best[split] = min(t.head_ms + t.encode_ms for t in times) / 1e3
        return best
