"""Frames: sealed at the edge, checked in the cloud before anything is decoded. Pure: values in, values out."""

import itertools

import google_crc32c

from bitneck.errors import CorruptPayload, MalformedFrame, ReferenceUnknown
from bitneck.wire.messages import Frame, Pack

__all__ = [
    "MAX_MESSAGE_BYTES",
    "check_frame",
    "crc32c_hex",
    "frame_crc32c",
    "pack_bytes",
    "pack_positions",
    "pack_references",
    "pack_times",
    "seal_frame",
    "wire_bytes",
]

MAX_MESSAGE_BYTES = 1 << 18
"""gRPC's receive limit for what a client sends. The largest frame of a 64x14x14 latent at 16 bits a symbol is 25 KB."""


def frame_crc32c(point: str, payload: bytes, reference_crc32c: int | None = None) -> int:
    """CRC-32C of the operating point's id, one zero byte and the payload.

    Args:
        point: the id.
        payload: the coded bytes.
        reference_crc32c: CRC-32C of the reference's symbols, if there is a reference. One zero byte and these four
            bytes, little-endian, are then added.
    """
    data = point.encode() + b"\0" + payload
    if reference_crc32c is not None:
        data += b"\0" + reference_crc32c.to_bytes(4, "little")
    crc: int = google_crc32c.value(data)
    return crc


def seal_frame(
    *,
    seq: int,
    point: str,
    payload: bytes,
    deadline_ms: int = 0,
    captured_unix_us: int = 0,
    reference: int = 0,
    reference_crc32c: int | None = None,
    position: int = 0,
    acknowledge: bool = False,
) -> Frame:
    """A frame with its CRC.

    Args:
        seq: counting from 1, each frame its own.
        point: id of the operating point that coded the payload.
        payload: the coded bytes.
        deadline_ms: from receipt in the cloud; 0 for none.
        captured_unix_us: when the picture was taken; 0 if unknown.
        reference: how far back in seq the reference is; 0 for none.
        reference_crc32c: of that frame's symbols.
        position: see `Frame`.
        acknowledge: likewise.
    """
    return Frame(
        seq=seq,
        point=point,
        payload=payload,
        crc32c=frame_crc32c(point, payload, reference_crc32c),
        deadline_ms=deadline_ms,
        captured_unix_us=captured_unix_us,
        reference=reference,
        position=position,
        acknowledge=acknowledge,
    )


def wire_bytes(frame: Frame) -> int:
    """Bytes of a frame's message on the stream, as protobuf codes it; the headers of gRPC and HTTP/2 are not counted.

    A field that has its default takes no bytes; every field number fits into a tag of one byte.
    """
    point_bytes = 0 if frame.position else len(frame.point.encode())
    size = (5 if frame.crc32c else 0) + (2 if frame.acknowledge else 0)
    for value in (frame.seq, frame.deadline_ms, frame.captured_unix_us, frame.reference, frame.position):
        if value:
            size += 1 + _varint_bytes(value)
    for length in (point_bytes, len(frame.payload)):
        if length:
            size += 1 + _varint_bytes(length) + length
    return 1 + _varint_bytes(size) + size


def pack_bytes(pack: Pack) -> int:
    """Bytes of a pack's message on the stream, counted as `wire_bytes` does."""
    first, count = pack.frames[0], len(pack.frames)
    size = sum(1 + _varint_bytes(len(frame.payload)) + len(frame.payload) for frame in pack.frames)
    size += sum(1 + _varint_bytes(value) for value in (first.seq, first.deadline_ms) if value)
    lists = [[4] * count]  # bytes of each entry of the packed lists
    lists.append([_varint_bytes(value) for value in pack_positions(pack)])
    lists.append([_varint_bytes(value) for value in pack_references(pack)])
    lists.append([_varint_bytes(2 * value if value >= 0 else -2 * value - 1) for value in pack_times(pack)])
    size += sum(1 + _varint_bytes(sum(each)) + sum(each) for each in lists if each)
    size += 2 if any(frame.acknowledge for frame in pack.frames) else 0
    return 1 + _varint_bytes(size) + size


def pack_positions(pack: Pack) -> list[int]:
    """The frames' positions as a pack has them: one for all, if all are the same."""
    positions = [frame.position for frame in pack.frames]
    return positions[:1] if len(set(positions)) == 1 else positions


def pack_references(pack: Pack) -> list[int]:
    """The frames' references as a pack has them: none, if no frame has one."""
    references = [frame.reference for frame in pack.frames]
    return references if any(references) else []


def pack_times(pack: Pack) -> list[int]:
    """The frames' times of capture as a pack has them: none if unknown, else the first, and then differences."""
    times = [frame.captured_unix_us for frame in pack.frames]
    return [times[0], *(b - a for a, b in itertools.pairwise(times))] if any(times) else []


def _varint_bytes(value: int) -> int:
    """Bytes of a protobuf varint: 7 bits each."""
    return max(1, -(-value.bit_length() // 7))


def crc32c_hex(data: bytes) -> str:
    """CRC-32C as 8 hexadecimal digits, to compare payloads and symbols by eye."""
    return f"{google_crc32c.value(data):08x}"


def check_frame(frame: Frame, reference_crc32c: int | None = None) -> None:
    """Check a frame's number and CRC. Its operating point and length are checked elsewhere.

    Args:
        frame: as it arrived.
        reference_crc32c: CRC-32C of the reference's symbols; None if they are not known here.

    Raises:
        MalformedFrame: no seq.
        ReferenceUnknown: the frame names a reference, and that is not known.
        CorruptPayload: the CRC does not match.
    """
    if frame.seq == 0:
        raise MalformedFrame("a frame needs a seq of 1 or more")
    if frame.reference and reference_crc32c is None:
        raise ReferenceUnknown(
            f"frame {frame.seq} is coded against the frame {frame.reference} before it, which is not known here; "
            "send it again, coded by itself"
        )
    crc = frame_crc32c(frame.point, frame.payload, reference_crc32c if frame.reference else None)
    if crc != frame.crc32c:
        raise CorruptPayload(
            f"CRC-32C {crc:#010x}, the frame says {frame.crc32c:#010x} "
            f"(frame {frame.seq}, {len(frame.payload)} bytes, point {frame.point[:80]!r}); frame dropped, send it again"
        )
