"""Frames: what was sealed checks, and whatever was changed on the way is refused."""

from dataclasses import replace

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import CorruptPayload, MalformedFrame, PeerError
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import (
    MAX_MESSAGE_BYTES,
    check_frame,
    crc32c_hex,
    frame_crc32c,
    seal_frame,
    wire_bytes,
)
from bitneck_cloud.api.wire import parse_frame
from bitneck_edge.link.wire import frame_bytes, frame_to_wire

POINTS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,15}", fullmatch=True)


@given(st.integers(1, 2**63), POINTS, st.binary(max_size=300), st.integers(0, 2**31), st.integers(0, 2**62))
def test_a_sealed_frame_travels_unchanged(seq: int, point: str, payload: bytes, deadline: int, captured: int) -> None:
    frame = seal_frame(seq=seq, point=point, payload=payload, deadline_ms=deadline, captured_unix_us=captured)
    check_frame(frame)
    assert parse_frame(frame_bytes(frame), "a.frame") == frame
    assert len(payload) < wire_bytes(frame) == len(pb.ClientMessage(frame=frame_to_wire(frame)).SerializeToString())
    assert wire_bytes(frame) <= len(payload) + 64


@given(POINTS, st.binary(min_size=1, max_size=60), st.data())
def test_every_flipped_bit_of_payload_or_point_is_noticed(point: str, payload: bytes, data: st.DataObject) -> None:
    frame = seal_frame(seq=17, point=point, payload=payload)
    k, bit = data.draw(st.integers(0, len(payload) - 1)), data.draw(st.integers(0, 7))
    frame = replace(frame, payload=payload[:k] + bytes([payload[k] ^ 1 << bit]) + payload[k + 1 :])
    with pytest.raises(CorruptPayload, match=rf"frame 17, {len(payload)} bytes"):
        check_frame(frame)
    k = data.draw(st.integers(0, len(point) - 1))
    frame = seal_frame(seq=17, point=point, payload=payload)
    frame = replace(frame, point=point[:k] + chr(ord(point[k]) ^ 1) + point[k + 1 :])
    with pytest.raises(CorruptPayload):
        check_frame(frame)


def test_the_border_between_point_and_payload_is_in_the_crc() -> None:
    assert frame_crc32c("ab", b"c") != frame_crc32c("a", b"bc")
    assert frame_crc32c("a", b"") != frame_crc32c("", b"a")


def test_the_checksum_is_crc_32c() -> None:
    """The check value of the CRC catalogue: not CRC-32, which zlib has."""
    assert crc32c_hex(b"123456789") == "e3069283"
    assert crc32c_hex(b"") == "00000000"
    assert frame_crc32c("s1-r3", b"\x01\x02") == google_crc32c.value(b"s1-r3\0\x01\x02")


def test_a_frame_without_a_number_is_refused() -> None:
    with pytest.raises(MalformedFrame, match="seq"):
        check_frame(seal_frame(seq=0, point="s1-r1", payload=b"x"))
    with pytest.raises(MalformedFrame, match="seq"):
        parse_frame(b"", "empty.frame")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_the_peers_mistake(data: bytes) -> None:
    try:
        frame = parse_frame(data, "some.frame")
    except PeerError:
        return
    check_frame(frame)


def test_a_damaged_file_is_refused_wherever_it_was_cut() -> None:
    data = frame_bytes(seal_frame(seq=3, point="s1-r1", payload=bytes(range(50))))
    for size in range(len(data)):
        with pytest.raises(PeerError):
            parse_frame(data[:size], "cut.frame")
    with pytest.raises(MalformedFrame, match=r"photo\.jpg: not a frame"):
        parse_frame(b"\xff\xd8\xff\xe0 a photograph", "photo.jpg")


def test_the_largest_frame_fits_a_message() -> None:
    """A 64x14x14 latent at 16 bits a symbol, several times over."""
    assert wire_bytes(seal_frame(seq=1, point="p" * 64, payload=bytes(4 * 64 * 14 * 14 * 2))) < MAX_MESSAGE_BYTES
