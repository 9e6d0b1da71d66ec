"""Quantizer, factorized model and codec: round trips, lengths, limits, golden bytes."""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import oracle
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.coding.symbols import dequantize, quantize
from bitneck.errors import BundleCorrupt, InvalidConfig, MalformedFrame, ModelFailure

GOLDEN = Path(__file__).parent / "golden" / "codec.json"


@st.composite
def coded(draw: st.DrawFn) -> tuple[FactorizedModel, NDArray[np.int32]]:
    """Tables, and symbols anywhere inside them: not only likely ones."""
    channels, h, w = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = rng.uniform(0.0, 6.0, (1, channels, 1, 1))
    train = np.rint(rng.laplace(size=(draw(st.integers(1, 20)), channels, h, w)) * scale).astype(np.int32)
    model = FactorizedModel.fit(train, margin=draw(st.integers(0, 3)))
    s = rng.integers(model.lo[:, None, None], model.hi[:, None, None] + 1, (channels, h, w), dtype=np.int32)
    return model, s if draw(st.booleans()) else train[0]


@settings(max_examples=150, deadline=None)
@given(coded())
def test_decode_inverts_encode_and_length_is_ideal(case: tuple[FactorizedModel, NDArray[np.int32]]) -> None:
    model, s = case
    codec = FactorizedCodec(model, s.shape)  # type: ignore[arg-type]
    payload = codec.encode(s)
    np.testing.assert_array_equal(codec.decode(payload), s)
    ideal = model.ideal_bits(s) / 8
    assert len(payload) <= ideal * 1.01 + 2
    assert len(payload) <= codec.max_payload_bytes


@settings(max_examples=30, deadline=None)
@given(coded())
def test_the_exact_coder_agrees(case: tuple[FactorizedModel, NDArray[np.int32]]) -> None:
    model, s = case
    exact = oracle.encode(model, s)
    np.testing.assert_array_equal(oracle.decode(model, exact, s.shape), s)  # type: ignore[arg-type]
    ours = FactorizedCodec(model, s.shape).encode(s)  # type: ignore[arg-type]
    # The shortest code of an interval has this many bytes. By luck it has fewer: then it would end with zeros.
    longest = math.ceil(model.ideal_bits(s) / 8 + 0.01) + 1
    assert len(exact) <= longest
    assert len(ours) <= longest


@pytest.mark.parametrize(("shape", "scale"), [((8, 2, 2), 2.0), ((24, 2, 2), 9.0), ((3, 5, 4), 0.3), ((1, 1, 1), 50.0)])
def test_any_bytes_give_symbols_inside_the_tables_or_a_malformed_frame(
    shape: tuple[int, int, int], scale: float
) -> None:
    rng = np.random.default_rng(1)
    train = np.rint(rng.laplace(size=(50, *shape)) * scale).astype(np.int32)
    codec = FactorizedCodec(FactorizedModel.fit(train), shape)
    refused = 0
    for _ in range(5000):
        payload = rng.bytes(int(rng.integers(0, codec.max_payload_bytes + 8)))
        try:
            s = codec.decode(payload)
        except MalformedFrame:
            refused += 1
        else:
            assert s.shape == shape
            assert s.dtype == np.int32
            assert (s >= codec.tables.lo[:, None, None]).all()
            assert (s <= codec.tables.hi[:, None, None]).all()
            assert len(codec.encode(s)) == len(payload)  # so no byte of a payload is without meaning
    assert 0 < refused < 5000


@pytest.mark.parametrize("likely", [True, False])
def test_long_payloads_stay_near_the_ideal(likely: bool) -> None:
    """At the size of a real 14x14 latent, with sure, flat and steep tables side by side."""
    rng = np.random.default_rng(7)
    shape = (32, 14, 14)
    rows = []
    for c in range(shape[0]):
        k = int(rng.integers(2, 200))
        rows.append(1 + rng.multinomial(TOTAL - k, rng.dirichlet(np.full(k, 0.02 * (1 + c)))).astype(np.int64))
    model = FactorizedModel(lo=rng.integers(-90, 90, shape[0]).astype(np.int32), counts=tuple(rows))
    index = [rng.choice(len(r), shape[1:], p=r / TOTAL) if likely else np.full(shape[1:], r.argmin()) for r in rows]
    s = (np.stack(index) + model.lo[:, None, None]).astype(np.int32)
    codec = FactorizedCodec(model, shape)
    payload = codec.encode(s)
    np.testing.assert_array_equal(codec.decode(payload), s)
    assert len(payload) <= model.ideal_bits(s) / 8 * 1.001 + 2
    assert len(payload) <= codec.max_payload_bytes
    assert len(codec.encode(s.copy(order="F"))) == len(payload)  # memory layout is no matter


def test_too_long_and_padded_payloads_are_refused() -> None:
    codec = FactorizedCodec(FactorizedModel.fit(np.zeros((1, 4, 2, 2), np.int32) + 3), (4, 2, 2))
    payload = codec.encode(np.full((4, 2, 2), 3, np.int32))
    with pytest.raises(MalformedFrame, match="at most"):
        codec.decode(bytes(codec.max_payload_bytes + 1))
    with pytest.raises(MalformedFrame, match="longer than its symbols need"):
        codec.decode(payload + b"\0")


def test_codec_refuses_what_does_not_fit() -> None:
    model = FactorizedModel.fit(np.zeros((1, 2, 1, 1), np.int32))
    codec = FactorizedCodec(model, (2, 1, 1))
    with pytest.raises(InvalidConfig, match="outside its table"):
        codec.encode(np.full((2, 1, 1), 9, np.int32))
    with pytest.raises(InvalidConfig, match="expected"):
        codec.encode(np.zeros((2, 1, 2), np.int32))
    with pytest.raises(InvalidConfig, match="expected"):
        codec.encode(np.zeros((2, 1, 1), np.int64))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="does not match"):
        FactorizedCodec(model, (3, 1, 1))


@settings(max_examples=60, deadline=None)
@given(coded())
def test_one_matrix_and_one_model_a_channel_write_the_same_bytes(
    case: tuple[FactorizedModel, NDArray[np.int32]],
) -> None:
    model, s = case
    shape: tuple[int, int, int] = s.shape  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitneck.coding.factorized_codec._MATRIX_ENTRIES", 0)
        by_channel = FactorizedCodec(model, shape)
    payload = FactorizedCodec(model, shape).encode(s)
    assert by_channel.encode(s) == payload
    np.testing.assert_array_equal(by_channel.decode(payload), s)


def test_a_payload_that_means_a_missing_symbol_is_refused() -> None:
    """A narrow channel's model has the widest one's length: what lies beyond its own symbols is nobody's."""
    counts = (np.array([1, 2**16 - 1]), np.array([2**16 // 8] * 8))
    narrow = FactorizedModel(lo=np.zeros(2, np.int32), counts=counts)
    codec = FactorizedCodec(narrow, (2, 1, 1))
    with pytest.raises(MalformedFrame, match="outside its table"):
        codec.decode(b"\xff\xff\xfc")  # in the top six parts of 2**24, which the six missing symbols share
    for s in ([0, 7], [1, 0], [1, 7]):
        symbols = np.array(s, np.int32).reshape(2, 1, 1)
        np.testing.assert_array_equal(codec.decode(codec.encode(symbols)), symbols)


def test_the_file_of_tables_is_the_same_with_every_python() -> None:
    """Headers of members whose size is unknown differ between versions of Python; those of known size do not."""
    data = FactorizedModel.fit(np.zeros((1, 3, 1, 1), np.int32)).to_npz()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            assert (member.create_system, member.create_version, member.extract_version) == (3, 20, 20)
            assert (member.flag_bits, member.extra, member.date_time) == (0, b"", (1980, 1, 1, 0, 0, 0))
            header = data[member.header_offset : member.header_offset + 30]
            assert header[4:6] == bytes([20, 0])  # no ZIP64
            assert header[18:22] == member.compress_size.to_bytes(4, "little")


def test_golden_bytes() -> None:
    """Payloads of an earlier version still decode, and are still what is written."""
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) >= 4
    for case in cases:
        lo = np.array(case["lo"], dtype=np.int32)
        model = FactorizedModel(lo=lo, counts=tuple(np.array(row, dtype=np.int64) for row in case["counts"]))
        s = np.array(case["symbols"], dtype=np.int32)
        codec = FactorizedCodec(model, s.shape)  # type: ignore[arg-type]
        assert codec.encode(s).hex() == case["payload"], case["name"]
        np.testing.assert_array_equal(codec.decode(bytes.fromhex(case["payload"])), s)


@given(st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_fitted_tables_cover_what_was_seen(seed: int, margin: int) -> None:
    rng = np.random.default_rng(seed)
    train = rng.integers(-40, 40, (3, 4, 2, 3), dtype=np.int32)
    model = FactorizedModel.fit(train, margin=margin)
    for c, row in enumerate(model.counts):
        assert row.sum() == TOTAL
        assert row.min() >= 1
        assert model.lo[c] == train[:, c].min() - margin
        assert model.hi[c] == train[:, c].max() + margin
    assert model.to_npz() == FactorizedModel.fit(train, margin=margin).to_npz()  # the same file, byte by byte
    again = FactorizedModel.from_npz(model.to_npz())
    assert all((a == b).all() for a, b in zip(model.counts, again.counts, strict=True))
    assert (again.lo == model.lo).all()


def test_frequent_symbols_cost_what_their_frequency_says() -> None:
    train = np.zeros((1000, 1, 1, 1), np.int32)
    train[:250] = 1
    model = FactorizedModel.fit(train)
    assert model.ideal_bits(np.zeros((1, 1, 1), np.int32)) == pytest.approx(-np.log2(0.75), abs=0.02)
    assert model.ideal_bits(np.ones((1, 1, 1), np.int32)) == pytest.approx(2.0, abs=0.05)


def test_any_damage_of_the_tables_is_found() -> None:
    """A cut or a flipped bit anywhere is refused, or changed nothing but the archive's own marks."""
    model = FactorizedModel.fit(np.rint(np.random.default_rng(2).laplace(size=(9, 5, 2, 2)) * 3).astype(np.int32))
    data = model.to_npz()
    for size in range(len(data)):
        with pytest.raises(BundleCorrupt):
            FactorizedModel.from_npz(data[:size])
    refused = 0
    for k in range(len(data)):
        for bit in (1, 128):
            try:
                read = FactorizedModel.from_npz(data[:k] + bytes([data[k] ^ bit]) + data[k + 1 :])
            except BundleCorrupt:
                refused += 1
            else:
                np.testing.assert_array_equal(read.lo, model.lo)
                np.testing.assert_array_equal(np.concatenate(read.counts), np.concatenate(model.counts))
    assert refused > len(data)


@pytest.mark.parametrize(
    ("lo", "size", "counts"),
    [
        ([0], [2], [TOTAL]),  # sizes do not add up
        ([0], [0], []),
        ([0, 0], [-1, 2], [TOTAL]),
        ([0], [1], [TOTAL - 1]),
        ([0], [2], [0, TOTAL]),
        ([[0]], [[1]], [TOTAL]),
        ([0], [1, 1], [TOTAL, TOTAL]),
        ([0.5], [1], [TOTAL]),
        ([2**31 + 5], [1], [TOTAL]),  # would wrap around in int32
        ([2**31 - 1], [1], [TOTAL]),
        ([-(2**40)], [1], [TOTAL]),
        ([], [], []),
        ([0] * 5000, [1] * 5000, [TOTAL] * 5000),
    ],
)
def test_tables_of_impossible_content_are_corrupt(lo: list[int], size: list[int], counts: list[int]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, lo=np.array(lo), size=np.array(size), counts=np.array(counts))
    with pytest.raises(BundleCorrupt, match="tables are unreadable"):
        FactorizedModel.from_npz(buffer.getvalue())


@pytest.mark.parametrize("damage", ["cut", "flip", "pickle", "short", "empty"])
def test_damaged_tables_are_corrupt_and_never_unpickled(damage: str) -> None:
    data = FactorizedModel.fit(np.zeros((1, 3, 1, 1), np.int32)).to_npz()
    buffer = io.BytesIO()
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "flip":
            data = bytes([data[0] ^ 255]) + data[1:]
        case "pickle":
            np.savez(buffer, lo=np.array([object()]), size=np.array([1]), counts=np.array([TOTAL]), allow_pickle=True)
            data = buffer.getvalue()
        case "short":
            np.savez(buffer, lo=np.array([0]), size=np.array([2]), counts=np.array([TOTAL]))
            data = buffer.getvalue()
        case "empty":
            zipfile.ZipFile(buffer, "w").close()
            data = buffer.getvalue()
    with pytest.raises(BundleCorrupt, match="tables are unreadable"):
        FactorizedModel.from_npz(data)


def test_bad_tables_are_refused() -> None:
    lo = np.zeros(1, np.int32)
    for row in ([TOTAL - 1], [0, TOTAL], [TOTAL + 1, -1], [1 << 62] * 4 + [TOTAL]):  # the last sum wraps around
        with pytest.raises(InvalidConfig, match="frequencies must be"):
            FactorizedModel(lo=lo, counts=(np.array(row),))
    with pytest.raises(InvalidConfig, match="int64"):
        FactorizedModel(lo=lo, counts=(np.array([TOTAL], np.float64),))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="int32"):
        FactorizedModel(lo=lo + np.int32(2**31 - 1), counts=(np.array([1, TOTAL - 1]),))
    with pytest.raises(InvalidConfig, match="channels"):
        FactorizedModel(lo=np.zeros(2, np.int32), counts=(np.array([TOTAL]),))


def test_tables_are_not_fitted_to_nonsense() -> None:
    one = np.zeros((1, 1, 1, 1), np.int32)
    for values in ({"margin": -1}, {"prior_weight": 0.0}, {"prior_weight": -1.0}, {"prior_weight": float("nan")}):
        with pytest.raises(InvalidConfig, match="margin must be"):
            FactorizedModel.fit(one, **values)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="integer symbols"):
        FactorizedModel.fit(one.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="larger step"):
        FactorizedModel.fit(one + np.int32(2**31 - 1))
    with pytest.raises(InvalidConfig, match="N >= 1"):
        FactorizedModel.fit(np.zeros((0, 1, 1, 1), np.int32))
    with pytest.raises(InvalidConfig, match="larger step"):
        FactorizedModel.fit(np.array([-(10**6), 10**6], np.int32).reshape(2, 1, 1, 1))


def test_narrow_integers_fit_like_wide_ones() -> None:
    s = np.array([-128, 127, 0, 5], np.int8).reshape(4, 1, 1, 1)
    narrow, wide = FactorizedModel.fit(s), FactorizedModel.fit(s.astype(np.int32))  # type: ignore[arg-type]
    assert narrow.to_npz() == wide.to_npz()


def test_ideal_bits_refuses_what_the_tables_do_not_cover() -> None:
    model = FactorizedModel.fit(np.zeros((1, 2, 1, 1), np.int32))
    for outside in (2, -2, 2**31 - 1, -(2**31)):
        with pytest.raises(InvalidConfig, match="channel 0 is outside"):
            model.ideal_bits(np.full((2, 1, 1), outside, np.int32))
    with pytest.raises(InvalidConfig, match="do not match"):
        model.ideal_bits(np.zeros((3, 1, 1), np.int32))


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), st.floats(0.1, 10))
def test_quantize_rounds_clips_and_inverts_within_half_a_step(values: list[float], step: float) -> None:
    y = np.array(values, np.float32).reshape(1, 1, -1)
    wide = np.array([10**6], np.int32)
    s = quantize(y, step, -wide, wide)
    assert s.dtype == np.int32
    assert np.abs(dequantize(s, step) - y).max() <= step / 2 * (1 + 1e-4) + 1e-4
    narrow = quantize(y, step, np.array([-2], np.int32), np.array([1], np.int32))
    np.testing.assert_array_equal(narrow, np.clip(s, -2, 1))


def test_quantize_rounds_half_to_even_as_torch_does() -> None:
    y = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32).reshape(1, 1, -1)
    wide = np.array([9], np.int32)
    assert quantize(y, 1.0, -wide, wide).ravel().tolist() == [0, 2, 2, 0, -2]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.floats(1e-37, 1e38),
    st.integers(-1000, 1000),
    st.integers(0, 1000),
)
def test_quantize_gives_symbols_inside_the_tables_whatever_the_latent(
    values: list[float], step: float, lo: int, span: int
) -> None:
    y = np.array(values, np.float32).reshape(1, 1, -1)
    s = quantize(y, step, np.array([lo], np.int32), np.array([lo + span], np.int32))
    assert s.shape == y.shape
    assert lo <= s.min()
    assert s.max() <= lo + span


def test_quantize_refuses_nonsense() -> None:
    y, wide = np.zeros((1, 1, 1), np.float32), np.array([9], np.int32)
    with pytest.raises(ModelFailure, match="not finite"):
        quantize(y * np.nan, 1.0, -wide, wide)
    for step in (0.0, -1.0, float("nan"), float("inf"), 1e-46, 1e39):  # the last two are 0 and infinite in float32
        with pytest.raises(InvalidConfig, match="step"):
            quantize(y, step, -wide, wide)
    with pytest.raises(InvalidConfig, match="does not match"):
        quantize(np.zeros((2, 1, 1), np.float32), 1.0, -wide, wide)
