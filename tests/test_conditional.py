"""Conditional tables and their codec: exact integers, round trips, lengths, limits, damage."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.coding.conditional_codec import ConditionalCodec, Reference, symbols_crc32c
from bitneck.coding.conditional_model import KEEP_TOTAL, KERNEL_TOTAL, ConditionalModel
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig, MalformedFrame
from bitneck_testing.tiny_bundles import conditional, make_tiny_bundle

GOLDEN_SIMILAR = "d69ef90d72a95661ad3c"
GOLDEN_OTHER = "b3cf96f663dc99c0c92c1cc69ac0199a577055410baba8"


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConditionalCodec, FactorizedModel, NDArray[np.int32], NDArray[np.int32]]:
    """A codec, and two latents anywhere inside its tables: alike or not."""
    channels, h, w = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = rng.uniform(0.0, 9.0, (1, channels, 1, 1))
    train = np.rint(rng.laplace(size=(draw(st.integers(1, 20)), channels, h, w)) * scale).astype(np.int32)
    tables = FactorizedModel.fit(train, margin=draw(st.integers(0, 3)))
    motions, kernels = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    model = ConditionalModel(
        rng.integers(1, KERNEL_TOTAL + 1, (kernels, draw(st.integers(1, 9)))),
        rng.integers(0, kernels, (motions, channels), dtype=np.uint8),
        rng.integers(0, kernels, (motions, channels), dtype=np.uint8),
        rng.integers(0, KEEP_TOTAL + 1, (motions, channels), dtype=np.uint8),
    )
    lo, hi = tables.lo[:, None, None], tables.hi[:, None, None]
    before = rng.integers(lo, hi + 1, (channels, h, w), dtype=np.int32)
    s = rng.integers(lo, hi + 1, (channels, h, w), dtype=np.int32)
    if draw(st.booleans()):
        s = np.where(rng.random(s.shape) < 0.1, s, before)
    return ConditionalCodec("p", tables, model, (channels, h, w)), tables, before, s


@settings(max_examples=150, deadline=None)
@given(cases())
def test_decode_inverts_encode_and_length_is_ideal(
    case: tuple[ConditionalCodec, FactorizedModel, NDArray[np.int32], NDArray[np.int32]],
) -> None:
    codec, _, before, s = case
    reference = codec.keep(before)
    payload = codec.encode(s, reference)
    np.testing.assert_array_equal(codec.decode(payload, reference), s)
    assert len(payload) <= codec.ideal_bits(s, reference) / 8 * 1.01 + 2
    assert len(payload) <= codec.max_payload_bytes
    np.testing.assert_array_equal(reference.symbols, before)
    assert reference.crc32c == symbols_crc32c(before)
    again = Reference("p", before, reference.crc32c)  # the type that it is kept in is no matter
    assert codec.encode(s, again) == payload


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rows_are_what_the_formula_says_in_whole_numbers(
    case: tuple[ConditionalCodec, FactorizedModel, NDArray[np.int32], NDArray[np.int32]],
) -> None:
    codec, tables, _, _ = case
    model = codec._conditional
    for motion in range(model.motions):
        rows = model.rows(tables, motion)
        assert (rows.sum(1) == TOTAL).all()
        at = 0
        for c, counts in enumerate(tables.counts):
            size, keep = len(counts), int(model.keep[motion, c])
            for before in range(size):
                d = [min(abs(k - before), model.kernels.shape[1] - 1) for k in range(size)]
                near = [int(model.kernels[model.near[motion, c], x]) for x in d]
                like = [int(n) * int(model.kernels[model.like[motion, c], x]) for n, x in zip(counts, d, strict=True)]
                free = TOTAL - size
                expected = [
                    1
                    + free * keep * n // (KEEP_TOTAL * sum(near))
                    + free * (KEEP_TOTAL - keep) * p // (KEEP_TOTAL * sum(like))
                    for n, p in zip(near, like, strict=True)
                ]
                expected[before] += TOTAL - sum(expected)
                assert rows[at + before, :size].tolist() == expected
                assert not rows[at + before, size:].any()
            at += size


def test_the_widest_tables_do_not_overflow() -> None:
    tables = FactorizedModel(lo=np.zeros(1, np.int32), counts=(np.array([TOTAL - 2047] + [1] * 2047),))
    kernels = np.stack([np.full(256, KERNEL_TOTAL), np.append(KERNEL_TOTAL, np.ones(255, np.int64))])
    for near, like, keep in ((0, 0, 0), (0, 0, KEEP_TOTAL), (1, 1, 33), (0, 1, 1)):
        one = np.ones((1, 1), np.uint8)
        rows = ConditionalModel(kernels, one * near, one * like, one * keep).rows(tables, 0)
        assert rows.min() >= 1
        assert (rows.sum(1) == TOTAL).all()
        assert rows[0, 0] < TOTAL


@pytest.mark.parametrize(("shape", "scale"), [((8, 2, 2), 2.0), ((24, 2, 2), 9.0), ((3, 5, 4), 0.3), ((1, 1, 1), 50.0)])
def test_any_bytes_give_symbols_inside_the_tables_or_a_malformed_frame(
    shape: tuple[int, int, int], scale: float
) -> None:
    rng = np.random.default_rng(1)
    train = np.rint(rng.laplace(size=(50, *shape)) * scale).astype(np.int32)
    tables = FactorizedModel.fit(train)
    codec = ConditionalCodec("p", tables, conditional(shape[0]), shape)
    refused = 0
    for k in range(4000):
        reference = codec.keep(train[k % 50])
        payload = rng.bytes(int(rng.integers(0, codec.max_payload_bytes + 8)))
        try:
            s = codec.decode(payload, reference)
        except MalformedFrame:
            refused += 1
        else:
            assert (s.shape, s.dtype) == (shape, np.int32)
            assert (s >= tables.lo[:, None, None]).all()
            assert (s <= tables.hi[:, None, None]).all()
    assert 0 < refused < 4000


def test_what_does_not_fit_is_refused() -> None:
    tables = FactorizedModel.fit(np.zeros((1, 4, 2, 2), np.int32) + 3)
    codec = ConditionalCodec("p", tables, conditional(4), (4, 2, 2))
    s = np.full((4, 2, 2), 3, np.int32)
    reference = codec.keep(s)
    payload = codec.encode(s, reference)
    with pytest.raises(MalformedFrame, match="at most"):
        codec.decode(bytes(codec.max_payload_bytes + 1), reference)
    with pytest.raises(MalformedFrame, match="longer than its symbols need"):
        codec.decode(payload + b"\0", reference)
    strangers = [
        Reference("q", s, reference.crc32c),
        Reference("p", s[:2], reference.crc32c),
        Reference("p", s + 100, reference.crc32c),
    ]
    for stranger in strangers:
        with pytest.raises(MalformedFrame, match="the frame of p"):
            codec.decode(payload, stranger)
        with pytest.raises(InvalidConfig, match="none of p"):
            codec.encode(s, stranger)
        with pytest.raises(InvalidConfig, match="none of p"):
            codec.ideal_bits(s, stranger)
    with pytest.raises(InvalidConfig, match="outside its table"):
        codec.encode(s + 100, reference)
    with pytest.raises(InvalidConfig, match="expected"):
        codec.encode(s.astype(np.int64), reference)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="does not match"):
        ConditionalCodec("p", tables, conditional(4), (5, 2, 2))
    with pytest.raises(InvalidConfig, match="5 channels, the tables have 4"):
        ConditionalCodec("p", tables, conditional(5), (4, 2, 2))
    far = FactorizedModel.fit(np.full((1, 1, 1, 1), 40_000, np.int32))
    with pytest.raises(InvalidConfig, match="up to 40001 are too wide"):
        ConditionalCodec("p", far, conditional(1), (1, 1, 1))
    wide = FactorizedModel.fit(np.array([-3000, 3000], np.int32).reshape(2, 1, 1, 1))
    with pytest.raises(InvalidConfig, match="too wide"):
        ConditionalCodec("p", wide, conditional(1), (1, 1, 1))


def test_symbols_are_kept_in_little_and_wide_ones_are_right() -> None:
    for top, kind in ((5, np.int8), (125, np.int8), (126, np.int16), (30_000, np.int16)):
        s = np.array([[[top]], [[-1]]], np.int32)
        tables = FactorizedModel.fit(np.stack([s, s + 1]))
        codec = ConditionalCodec("p", tables, conditional(2), (2, 1, 1))
        reference = codec.keep(s)
        assert reference.symbols.dtype == kind
        np.testing.assert_array_equal(codec.decode(codec.encode(s + 1, reference), reference), s + 1)


def test_a_latent_of_sure_symbols_costs_next_to_nothing() -> None:
    tables = FactorizedModel.fit(np.zeros((1, 3, 1, 1), np.int32), margin=0)
    codec = ConditionalCodec("p", tables, conditional(3), (3, 1, 1))
    s = np.zeros((3, 1, 1), np.int32)
    reference = codec.keep(s)
    assert len(codec.encode(s, reference)) <= 1
    np.testing.assert_array_equal(codec.decode(codec.encode(s, reference), reference), s)


def test_golden_bytes() -> None:
    """A payload of an earlier version still decodes, and is still what is written."""
    rng = np.random.default_rng(5)
    train = np.rint(rng.laplace(size=(40, 6, 2, 3)) * 4).astype(np.int32)
    codec = ConditionalCodec("p", FactorizedModel.fit(train), conditional(6), (6, 2, 3))
    reference = codec.keep(train[0])
    s = np.where(rng.random(train[0].shape) < 0.2, train[1], train[0])
    assert codec.encode(s, reference).hex() == GOLDEN_SIMILAR
    assert codec.encode(train[1], reference).hex() == GOLDEN_OTHER
    np.testing.assert_array_equal(codec.decode(bytes.fromhex(GOLDEN_SIMILAR), reference), s)


def test_files_are_the_same_and_damage_is_found() -> None:
    model = conditional(5)
    data = model.to_npz()
    assert conditional(5).to_npz() == data
    again = ConditionalModel.from_npz(data)
    for name in ("kernels", "near", "like", "keep"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name))
    for size in range(0, len(data), 7):
        with pytest.raises(BundleCorrupt, match="conditional tables are unreadable"):
            ConditionalModel.from_npz(data[:size])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": np.zeros((1, 4))}, "integers"),
        ({"kernels": np.zeros((1, 4), np.int64)}, "at least 1"),
        ({"kernels": np.full((1, 4), KERNEL_TOTAL + 1)}, "at most"),
        ({"kernels": np.ones((1, 300), np.int64)}, "at most 256"),
        ({"kernels": np.ones((300, 4), np.int64)}, "B <= 255"),
        ({"kernels": np.array([[1, 0]])}, "weights of at least 1"),
        ({"near": np.full((1, 2), 1, np.uint8)}, "at most 0"),
        ({"like": np.full((1, 2), 9, np.uint8)}, "at most 0"),
        ({"keep": np.full((1, 2), 65, np.uint8)}, "at most 64"),
        ({"keep": np.zeros((1, 3), np.uint8)}, "keep is"),
        ({"near": np.zeros((1, 2), np.int64)}, "near is"),
        ({"near": np.zeros((0, 2), np.uint8)}, "motions"),
        ({"near": np.zeros((17, 2), np.uint8)}, "motions"),
        ({"near": np.array([[object()]])}, "expected integers"),
    ],
)
def test_impossible_content_is_corrupt(change: dict[str, NDArray[np.generic]], text: str) -> None:
    zeros = np.zeros((1, 2), np.uint8)
    arrays = {"kernels": np.ones((1, 4), np.int64), "near": zeros, "like": zeros, "keep": zeros} | change
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleCorrupt, match=text):
        ConditionalModel.from_npz(buffer.getvalue())


def test_a_bundle_may_have_them_and_needs_the_right_ones(tmp_path: Path, tiny_bundle: Bundle) -> None:
    assert not tiny_bundle.has_conditional
    assert tiny_bundle.conditional("s1-r2") is None
    bundle = make_tiny_bundle(tmp_path / "bundle", similar=("s1-r2",))
    assert bundle.has_conditional
    assert bundle.conditional("s2-r1") is None
    found = bundle.conditional("s1-r2")
    assert found is not None
    assert found.channels == 8
    for side in ("edge", "cloud"):
        assert "points/s1-r2/conditional.npz" in bundle.manifest.files_for(side)  # type: ignore[arg-type]
    bundle.path("points/s1-r2/conditional.npz").write_bytes(conditional(7).to_npz())
    with pytest.raises(BundleCorrupt, match="7 channels, the tables have 8"):
        bundle.conditional("s1-r2")
