"""How a spool's files are built. Pure: values to bytes and back.

    file     records, one after another
    record   mark (u16), length of the body (u32), CRC-32C of the body (u32), body
    body     kind (u8), then by kind, all little-endian:
             HEADER   version (u8), seq of the first frame (u64), id of the spool
             TABLE    index (u16), SHA-256 of the bundle's manifest (32 bytes), length (u8) and id of the point, prefix
             FRAME    seq (u64), captured (u64, microseconds since 1970), index (u16), length (u8) and rest of the name,
                      payload
             DONE     seqs (u64 each): these need not be sent any more

What bundle, point and beginning of the name many frames share is written once in a file, as a TABLE. What is no record
is passed over up to the next mark with a right CRC, so that damage costs the records that it hits and no other.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c

from bitneck.ids import ID_PATTERN

__all__ = ["LEAST_FRAME", "Damage", "Done", "FrameEntry", "Header", "Table", "pack", "read"]

VERSION = 1
_MARK = 0x5EB7
_MARK_BYTES = _MARK.to_bytes(2, "little")
_HEAD = struct.Struct("<HII")
_HEADER = struct.Struct("<BQ")
_TABLE = struct.Struct("<H32sB")
_FRAME = struct.Struct("<QQHB")
LEAST_FRAME = _HEAD.size + 1 + _FRAME.size
"""Bytes of a frame's record without name and payload."""
_MOST_BODY = 1 << 20
_MOST_NAME = 255


@dataclass(frozen=True, slots=True)
class Header:
    """The first record of a file: whose it is, and the number of its first frame."""

    first: int
    spool: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Table:
    """What frames share.

    Attributes:
        index: by which they refer to it.
        bundle_id: of the bundle that coded them.
        point: their operating point.
        prefix: what their names begin with.
    """

    index: int
    bundle_id: str
    point: str
    prefix: str


@dataclass(frozen=True, slots=True)
class FrameEntry:
    """A frame, without what it shares.

    Attributes:
        seq: its number in the spool.
        captured_unix_us: when its picture was taken, microseconds since 1970.
        table: index of its `Table`.
        name: the rest of its name.
        payload: the coded bytes, coded by themselves.
    """

    seq: int
    captured_unix_us: int
    table: int
    name: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Frames that need not be sent any more."""

    seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no record, from `begin` to `end`. A file that was being written ends with them."""

    begin: int
    end: int


Entry = Header | Table | FrameEntry | Done

_HEADER_KIND, _TABLE_KIND, _FRAME_KIND, _DONE_KIND = 1, 2, 3, 4


def pack(entry: Entry) -> bytes:
    """The bytes of a record."""
    match entry:
        case Header():
            body = bytes([_HEADER_KIND]) + _HEADER.pack(entry.version, entry.first) + entry.spool.encode()
        case Table():
            digest, point = bytes.fromhex(entry.bundle_id.removeprefix("sha256:")), entry.point.encode()
            table = _TABLE.pack(entry.index, digest, len(point))
            body = bytes([_TABLE_KIND]) + table + point + entry.prefix.encode(errors="replace")
        case FrameEntry():
            name = entry.name.encode(errors="replace")[-_MOST_NAME:]
            frame = _FRAME.pack(entry.seq, entry.captured_unix_us, entry.table, len(name))
            body = bytes([_FRAME_KIND]) + frame + name + entry.payload
        case Done():
            body = bytes([_DONE_KIND]) + struct.pack(f"<{len(entry.seqs)}Q", *entry.seqs)
    return _HEAD.pack(_MARK, len(body), google_crc32c.value(body)) + body


def read(data: bytes, begin: int = 0) -> Iterator[tuple[Entry | Damage, int]]:
    """The records of a file, and what is damaged of it, in order; each with the place where it ends.

    Args:
        data: of the file.
        begin: where a record begins.
    """
    place = begin
    while place < len(data):
        entry, end = _record(data, place)
        if entry is not None:
            yield entry, end
            place = end
            continue
        following = place + 1
        while True:
            following = data.find(_MARK_BYTES, following)
            if following < 0:
                following = len(data)
                break
            if _record(data, following)[0] is not None:
                break
            following += 1
        yield Damage(place, following), following
        place = following


def _record(data: bytes, place: int) -> tuple[Entry | None, int]:
    """The record that begins at a place, and where it ends; None if there is none."""
    start = place + _HEAD.size
    if start > len(data):
        return None, place
    mark, length, crc = _HEAD.unpack_from(data, place)
    if mark != _MARK or not 0 < length <= min(_MOST_BODY, len(data) - start):
        return None, place
    body = data[start : start + length]
    if google_crc32c.value(body) != crc:
        return None, place
    try:
        return _entry(body[0], body[1:]), start + length
    except (struct.error, UnicodeDecodeError):  # of another version, or written by somebody else
        return None, place


def _entry(kind: int, body: bytes) -> Entry | None:
    """What a body says; None for a kind that this version does not know."""
    if kind == _FRAME_KIND:
        seq, captured, table, length = _FRAME.unpack_from(body)
        payload = _FRAME.size + length
        name = body[_FRAME.size : payload].decode(errors="replace")
        return FrameEntry(seq, captured, table, name, body[payload:])
    if kind == _DONE_KIND:
        return Done(_numbers(body))
    if kind == _TABLE_KIND:
        index, digest, length = _TABLE.unpack_from(body)
        prefix = _TABLE.size + length
        point = body[_TABLE.size : prefix].decode()
        return Table(index, f"sha256:{digest.hex()}", point, body[prefix:].decode(errors="replace"))
    if kind == _HEADER_KIND:
        version, first = _HEADER.unpack_from(body)
        spool = body[_HEADER.size :].decode()
        return Header(first, spool, version) if version == VERSION and re.fullmatch(ID_PATTERN, spool) else None
    return None


def _numbers(body: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(body) // 8}Q", body)
