"""What the edge gives back for each photograph."""

from dataclasses import asdict, dataclass
from typing import Any

from bitneck.errors import BitneckError

__all__ = ["Answer", "Failure", "Label", "StageTimes", "Switch"]


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its softmax probability."""

    index: int
    name: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where a frame's time went, in milliseconds.

    Attributes:
        wait: from the picture's capture to its turn, and from its encoding to its sending.
        load: reading and decoding the photograph.
        preprocess: resize, crop, normalize.
        head: the network's first part.
        encode: bottleneck encoder, quantizer, range coder.
        link: from sending to the answer, less the cloud's own time; gRPC, event loops and the wire.
        queued: waiting for the cloud's engine.
        decode: range decoding in the cloud.
        compute: bottleneck decoder and tail, the whole batch's.
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
        file: the photograph's path, or what stands for it.
        seq: number of its frame.
        point: operating point.
        split: its split point.
        payload_bytes: coded bytes.
        reference: how many frames before it the one stands that its payload is coded against; 0 for none.
        wire_bytes: of the message on the stream.
        bpp_payload: payload bits per input pixel.
        bpp_wire: message bits per input pixel.
        payload_crc32c: of the payload, 8 hexadecimal digits.
        symbols_crc32c: of the symbols as little-endian int32.
        labels: the best first.
        ms: per stage.
    """

    file: str
    seq: int
    point: str
    split: str
    payload_bytes: int
    reference: int
    wire_bytes: int
    bpp_payload: float
    bpp_wire: float
    payload_crc32c: str
    symbols_crc32c: str
    labels: tuple[Label, ...]
    ms: StageTimes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """A photograph that got no answer, and why."""

    file: str
    error: BitneckError


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of the operating point, asked for when frame `after_seq` was the last one sent.

    A frame that was being encoded at that moment still goes out at the old point; the next one has the new point.
    """

    after_seq: int
    old: str
    new: str
    reason: str
