"""Class maps: the argmax, the coding there and back, and whatever bytes a server may send."""

import contextlib
import lzma
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from bitneck.coding.class_map import _FILTERS, MAX_MAP_BYTES, best_classes, count_classes, decode_map, encode_map
from bitneck.errors import ModelFailure, ProtocolError

MAPS = arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 255))


def coarse(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A map of a few areas."""
    blocks = np.random.default_rng(seed).integers(0, 11, (6, 8), dtype=np.uint8)
    return np.kron(blocks, np.ones((height // 6, width // 8), dtype=np.uint8))


@given(MAPS)
@settings(deadline=None)
def test_a_map_comes_back(classes: NDArray[np.uint8]) -> None:
    height, width = classes.shape
    data = encode_map(classes)
    assert (decode_map(data, height=height, width=width, number=256) == classes).all()
    assert len(data) <= 2 * classes.size + 16
    counts = count_classes(classes, 256)
    assert counts.sum() == classes.size
    assert [counts[k] for k in range(256)] == [(classes == k).sum() for k in range(256)]


def test_areas_take_few_bytes() -> None:
    assert len(encode_map(coarse(360, 480))) < 150


@given(arrays(np.float32, (5, 4, 6), elements=st.floats(-10, 10, width=16)))
def test_the_best_class_is_the_first_of_the_largest(logits: NDArray[np.float32]) -> None:
    assert (best_classes(logits) == logits.argmax(axis=0)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("plane", [0, 2])
def test_logits_that_are_not_finite(value: float, plane: int) -> None:
    logits = np.zeros((3, 4, 5), dtype=np.float32)
    logits[plane, 2, 3] = value
    with pytest.raises(ModelFailure, match=f"class {plane} are not finite"):
        best_classes(logits)


def test_the_argmax_makes_no_copy_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(21, 200, 200)).astype(np.float32)
    tracemalloc.start()
    best_classes(logits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * logits[0].nbytes


def raw(values: list[int]) -> bytes:
    """Any bytes, coded as a map's are."""
    return lzma.compress(bytes(values), lzma.FORMAT_RAW, filters=_FILTERS)


GOOD = coarse(24, 40)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cut short"),
        (b"\x00", "of 0 pixels"),
        (encode_map(GOOD)[:-1], "cut short"),
        (encode_map(GOOD)[: len(encode_map(GOOD)) // 2], "cut short"),
        (encode_map(GOOD) + b"x", "more than one map"),
        (encode_map(GOOD[:-1]), "of 920 pixels, expected 24x40 = 960"),
        (encode_map(np.vstack([GOOD, GOOD[:1]])), "of 1000 pixels"),
        (encode_map(coarse(360, 480)), "more than one map"),
        (raw([3, 1] * 320 + [0, 1]), "in runs of 1 or more"),
        (raw([3, 1] * 319 + [3]), "cut short"),
        (raw([1, 1] * 961), "more than one map"),
        (lzma.compress(GOOD.tobytes()), "no class map"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no class map"),
        (encode_map(np.where(GOOD == 3, 11, GOOD).astype(np.uint8)), "class 11, there are 11"),
        (encode_map(np.full_like(GOOD, 255)), "class 255"),
        (bytes(MAX_MAP_BYTES + 1), "the limit is"),
    ],
)
def test_maps_that_are_refused(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode_map(data, height=24, width=40, number=11)
    assert (decode_map(encode_map(GOOD), height=24, width=40, number=11) == GOOD).all()


def test_a_bomb_is_not_unpacked() -> None:
    bomb = raw([0] * 16_000_000)
    assert len(bomb) < 5000
    many = raw([255, 1] * 960)  # as many pairs as pixels, each of 255
    tracemalloc.start()
    for data in (bomb, many):
        with pytest.raises(ProtocolError, match="class map"):
            decode_map(data, height=24, width=40, number=11)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000  # LZMA2's window


@given(st.binary(max_size=400), st.integers(0, 60), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_map_or_a_protocol_error(noise: bytes, place: int, value: int) -> None:
    damaged = bytearray(encode_map(GOOD))
    damaged[place % len(damaged)] = value
    for data in (noise, bytes(damaged), encode_map(GOOD)[:place] + noise):
        with contextlib.suppress(ProtocolError):
            classes = decode_map(data, height=24, width=40, number=11)
            assert classes.shape == (24, 40)
            assert classes.max() < 11
