"""The context model and its codec, and how contexts are fitted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitneck.coding.arrays import written_arrays
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.context_model import ContextModel, neighbours, passes, table_rows
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig, MalformedFrame
from bitneck_models.fitting.contexts import fit_contexts

SHAPES = ((5, 7, 7), (6, 3, 3), (4, 2, 5), (3, 1, 4), (2, 1, 1), (3, 6, 8))


def smooth(rng: np.random.Generator, count: int, shape: tuple[int, int, int], spread: float) -> NDArray[np.int32]:
    """Symbols whose neighbours are alike: (N, Cr, h, w)."""
    channels, height, width = shape
    noise = rng.normal(size=(count, channels, height + 2, width + 2))
    mean = sum(noise[..., i : i + height, j : j + width] for i in range(3) for j in range(3)) / 3
    return np.rint(mean * spread * np.linspace(3, 0.3, channels)[:, None, None]).astype(np.int32)


def fitted(seed: int, shape: tuple[int, int, int]) -> tuple[FactorizedModel, ContextModel, NDArray[np.int32]]:
    rng = np.random.default_rng(seed)
    train = smooth(rng, 60, shape, 2.0)
    tables = FactorizedModel.fit(train)
    s = smooth(rng, 8, shape, 2.0)
    return tables, fit_contexts(tables, train), np.clip(s, tables.lo[:, None, None], tables.hi[:, None, None])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SHAPES))
def test_symbols_come_back_and_cost_what_the_tables_say(seed: int, shape: tuple[int, int, int]) -> None:
    tables, contexts, symbols = fitted(seed, shape)
    codec = ContextCodec(tables, contexts, shape)
    for s in symbols:
        payload = codec.encode(s)
        np.testing.assert_array_equal(codec.decode(payload), s)
        assert len(payload) <= codec.ideal_bits(s) / 8 * 1.01 + 4
        assert len(payload) <= codec.max_payload_bytes


def test_a_latent_whose_neighbours_are_alike_takes_fewer_bytes() -> None:
    shape = (12, 7, 7)
    rng = np.random.default_rng(3)
    train, held = smooth(rng, 300, shape, 2.0), smooth(rng, 50, shape, 2.0)
    tables = FactorizedModel.fit(train)
    codec = ContextCodec(tables, fit_contexts(tables, train), shape)
    held = np.clip(held, tables.lo[:, None, None], tables.hi[:, None, None])
    assert np.mean([codec.ideal_bits(s) for s in held]) < 0.9 * np.mean([tables.ideal_bits(s) for s in held])


def test_each_position_is_coded_once_and_looks_only_at_earlier_passes() -> None:
    for size in ((7, 7), (3, 3), (1, 4), (2, 5), (1, 1)):
        places = passes(size)
        assert sorted(np.concatenate(places).tolist()) == list(range(size[0] * size[1]))
        for number in (1, 2):
            earlier = {*np.concatenate(places[:number]).tolist(), size[0] * size[1]}
            assert set(neighbours(size, number, places[number]).ravel().tolist()) <= earlier


def test_the_class_is_the_rounded_prediction() -> None:
    size = (3, 3)
    places = passes(size)
    s = np.array([[*range(9), 0]], np.int32).T  # the middle is diagonal to 0, 2, 6 and 8
    weights = np.array([[256], [128], [-64], [32]], np.int32)
    rows = table_rows(s, neighbours(size, 1, places[1]), weights, 1, reach=4)
    assert rows.tolist() == [[1 + 4 + int(np.floor(0 + 1 - 1.5 + 1 + 0.5))]]
    weights[:] = 3000
    assert table_rows(s, neighbours(size, 1, places[1]), weights, 1, reach=4).tolist() == [[1 + 4 + 4]]  # clipped


def test_payloads_that_no_encoder_writes() -> None:
    tables, contexts, symbols = fitted(1, (5, 7, 7))
    codec = ContextCodec(tables, contexts, (5, 7, 7))
    payload = codec.encode(symbols[0])
    with pytest.raises(MalformedFrame, match="longer than its symbols need"):
        codec.decode(payload + b"\1")
    with pytest.raises(MalformedFrame, match="at most"):
        codec.decode(bytes(codec.max_payload_bytes + 1))
    rng = np.random.default_rng(0)
    decoded = 0
    for _ in range(300):
        try:
            s = codec.decode(rng.bytes(int(rng.integers(0, 2 * len(payload)))))
        except MalformedFrame:
            continue
        decoded += 1
        assert ((s >= tables.lo[:, None, None]) & (s <= tables.hi[:, None, None])).all()
    assert decoded  # a short payload of random bytes is some frame's


def test_codec_refuses_what_does_not_fit() -> None:
    tables, contexts, symbols = fitted(2, (5, 7, 7))
    codec = ContextCodec(tables, contexts, (5, 7, 7))
    with pytest.raises(InvalidConfig, match="outside its table"):
        codec.encode(symbols[0] + 1000)
    with pytest.raises(InvalidConfig, match="expected"):
        codec.encode(symbols[0].astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="does not match"):
        ContextCodec(tables, contexts, (4, 7, 7))
    wider = FactorizedModel(tables.lo - 50, tables.counts)
    with pytest.raises(InvalidConfig, match="outside of its context's table"):
        ContextCodec(wider, contexts, (5, 7, 7))
    other = FactorizedModel(tables.lo[:4], tables.counts[:4])
    with pytest.raises(InvalidConfig, match="of 5 channels, the tables have 4"):
        contexts.check_fits(other)


def test_contexts_as_a_file() -> None:
    _tables, contexts, _symbols = fitted(4, (5, 7, 7))
    read = ContextModel.from_npz(contexts.to_npz())
    assert read.digest == contexts.digest
    assert read.to_npz() == contexts.to_npz()
    changed = replace(contexts, weights=contexts.weights + np.int16(1))
    assert changed.digest != contexts.digest


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda a: a[:1], "different numbers"),
        ("weights", lambda a: a.astype(np.int32), "another type"),
        ("table", lambda a: a[:-1], "different numbers"),
        ("table", lambda a: a + np.uint16(60_000), "has a later one"),
        ("band", lambda a: a + np.uint8(200), "a band that is not there"),
        ("bands", lambda a: a * 2, "as many frequencies"),
        ("bands", lambda a: -a, "no shapes"),
        ("banks", lambda a: a[:-1], "as many frequencies"),
        ("banks", lambda a: a + 1, f"sum to {TOTAL}"),
        ("banks", lambda a: a * 0, f"sum to {TOTAL}"),
        (
            "banks",
            lambda a: a.astype(np.int64) + (np.arange(len(a)) < 4) * (1 << 62),
            f"sum to {TOTAL}",
        ),  # wraps around
    ],
)
def test_files_that_are_refused(name: str, change: object, message: str) -> None:
    _tables, contexts, _symbols = fitted(4, (5, 7, 7))
    arrays = {
        "weights": contexts.weights, "table": contexts.table, "middle": contexts.middle, "band": contexts.band,
        "bands": np.array([bank.shape for bank in contexts.banks], np.int32),
        "banks": np.concatenate([bank.ravel() for bank in contexts.banks]).astype(np.int32),
    }  # fmt: skip
    arrays[name] = change(arrays[name])  # type: ignore[operator]
    with pytest.raises(BundleCorrupt, match=message):
        ContextModel.from_npz(written_arrays(**arrays))


def test_tables_of_one_symbol_and_tables_that_are_too_wide_are_refused() -> None:
    tables, contexts, _symbols = fitted(4, (5, 7, 7))
    for width, message in ((1, "an odd width"), (60_001, "an odd width")):
        bank = np.ones((1, width), np.int64)
        bank[0, 0] += TOTAL - width
        with pytest.raises(InvalidConfig, match=message):
            replace(contexts, table=contexts.table * 0, band=contexts.band * 0, banks=(bank,))
    bank = np.ones((1, 30_001), np.int64)
    bank[0, 0] += TOTAL - 30_001
    wide = replace(contexts, table=contexts.table * 0, band=contexts.band * 0, banks=(bank,))
    ContextCodec(tables, wide, (5, 7, 7))
    with pytest.raises(InvalidConfig, match="use a larger step"):  # gigabytes for each frame
        ContextCodec(tables, wide, (5, 70, 70))


def test_a_file_that_is_cut_is_refused() -> None:
    _tables, contexts, _symbols = fitted(4, (5, 7, 7))
    for data in (b"", contexts.to_npz()[:200], b"PK" + bytes(100)):
        with pytest.raises(BundleCorrupt, match="contexts are unreadable"):
            ContextModel.from_npz(data)
