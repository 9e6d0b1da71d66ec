"""What a program gets for each photograph."""

from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import BitneckError
from bitneck.manifest import Task
from bitneck.wire.messages import ClassShare, Label

__all__ = ["Answer", "ClassShare", "Failure", "Label", "Segmentation", "StageTimes", "Switch", "Written"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """The best class of every pixel of the network's input, which is the whole photograph, resized.

    Attributes:
        map: (H, W) uint8, class indices, read-only. Comparing two answers leaves it out. If only the shares were asked
            for, it is (0, 0).
        classes: the classes in the map, the largest share first.
        map_bytes: bytes of the coded map that came from the cloud; 0 without one.
    """

    map: NDArray[np.uint8] = field(repr=False, compare=False)
    classes: tuple[ClassShare, ...]
    map_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the pixels."""
        return {"classes": [asdict(share) for share in self.classes], "map_bytes": self.map_bytes}


@dataclass(frozen=True, slots=True)
class Written:
    """The files that an answer was written to."""

    map_file: str
    overlay_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where a frame's time went, in milliseconds.

    Attributes:
        wait: between capture and encoding, and between encoding and sending, for others of its pack for example.
        load: reading and decoding the photograph.
        preprocess: resize, crop, normalize.
        head: the network's first part.
        encode: bottleneck encoder, quantizer, range coder.
        link: from sending to the answer, less the cloud's own time: gRPC, event loops and the wire. Without answers it
            ends with the acknowledgement, for which a frame may wait.
        queued: waiting for the cloud's engine.
        decode: range decoding in the cloud.
        compute: bottleneck decoder and tail, for the whole batch. If the cloud tells no timings (`EdgeSettings.answers`
            other than ``all``), everything in the cloud, and `queued` and `decode` are 0. Without answers all are 0.
        total: all of these.
    """

    wait: float
    load: float
    preprocess: float
    head: float
    encode: float
    link: float
    queued: float
    decode: float
    compute: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The network's answer to one photograph, and what it cost.

    Attributes:
        file: the photograph's path, or the name of its `Capture`.
        seq: number of its frame.
        point: operating point.
        split: its split point.
        payload_bytes: coded bytes.
        reference: how far back in seq the frame lies that the payload is coded against; 0 for none.
        message_bytes: of the frame's message on the stream, or its share of a pack.
        link_bytes_up: what crossed this device's interface to the cloud since the answer before, headers of packets
            included; see `bitneck.wire.link_bytes`. Frames that are answered together share it.
        link_bytes_down: the same from the cloud.
        bpp_payload: payload bits per input pixel.
        bpp_wire: message bits per input pixel.
        payload_crc32c: CRC-32C of the payload, 8 hexadecimal digits.
        symbols_crc32c: CRC-32C of the symbols as little-endian int32.
        ms: time of each stage.
        task: what the network is for: ``classification`` or ``segmentation``.
        labels: of a classification network, the best first; else empty. Without answers it is empty too.
        segmentation: of a segmentation network; else, and without answers, None.
        written: the files that the answer was written to; None if it was not written.
        spool: id of the spool that the frame was sent from, whose number `seq` then is; else empty. Of such a frame the
            edge's times and `symbols_crc32c` are not known: they are 0 and empty.
        session: id of the session that the frame was sent on. `seq` counts from 1 in each, but for frames from a spool.
        captured_unix_us: of a frame from a spool: when the picture was taken, microseconds since 1970; of a file: when
            it was read.
    """

    file: str
    seq: int
    point: str
    split: str
    payload_bytes: int
    reference: int
    message_bytes: float
    link_bytes_up: float
    link_bytes_down: float
    bpp_payload: float
    bpp_wire: float
    payload_crc32c: str
    symbols_crc32c: str
    ms: StageTimes
    task: Task = "classification"
    labels: tuple[Label, ...] = ()
    segmentation: Segmentation | None = None
    written: Written | None = None
    spool: str = ""
    session: str = ""
    captured_unix_us: int = 0

    def without_map(self) -> "Answer":
        """The same answer without the pixels of its class map, which saves memory if many are kept."""
        if self.segmentation is None:
            return self
        return replace(self, segmentation=replace(self.segmentation, map=np.empty((0, 0), dtype=np.uint8)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``labels``, or ``classes`` and ``map_bytes``; the files if it was written; no pixels.

        Without answers ``labels`` is empty, and of a segmentation network there is none of these. A frame from a spool
        has ``spooled``, ``spool`` and ``captured``.
        """
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        document["ms"] = asdict(self.ms)
        document["labels"] = [asdict(label) for label in self.labels]
        for name in ("task", "segmentation", "written", "spool", "captured_unix_us"):
            del document[name]
        if self.spool:
            captured = datetime.fromtimestamp(self.captured_unix_us / 1e6, UTC).isoformat(timespec="microseconds")
            document |= {"spooled": True, "spool": self.spool, "captured": captured.replace("+00:00", "Z")}
        if self.task == "segmentation" or self.segmentation is not None:
            del document["labels"]
        if self.segmentation is not None:
            document |= self.segmentation.to_dict()
        if self.written is not None:
            document |= asdict(self.written)
        return document


@dataclass(frozen=True, slots=True)
class Failure:
    """A photograph that got no answer, and why."""

    file: str
    error: BitneckError


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of the operating point, at a moment when frame `after_seq` was the last one sent.

    A frame that was being encoded at that moment is still sent at the old point; the next one has the new point.
    """

    after_seq: int
    old: str
    new: str
    reason: str
