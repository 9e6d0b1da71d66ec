"""Bundles: verified when opened, written all or nothing; ids, paths and manifests that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitneck.bundle import MANIFEST_NAME, Bundle, BundleWriter
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.ids import check_id, check_relative_path
from bitneck.image import preprocess
from tiny import CLASSES, INPUT, make_tiny_bundle, photo


def test_open_reads_what_was_written(tiny_bundle: Bundle) -> None:
    again = Bundle.open(tiny_bundle.root)
    assert again.bundle_id == tiny_bundle.bundle_id
    assert again.labels() == CLASSES
    assert [p.id for p in again.manifest.ladder] == ["s1-r1", "s2-r1", "s1-r2"]


def test_the_edge_needs_its_half_only(own_tiny_bundle: Bundle) -> None:
    for name, entry in own_tiny_bundle.manifest.files.items():
        if entry.role == "cloud":
            (own_tiny_bundle.root / name).unlink()
    Bundle.open(own_tiny_bundle.root, side="edge")
    with pytest.raises(BundleCorrupt, match="missing"):
        Bundle.open(own_tiny_bundle.root, side="cloud")


def test_every_damaged_file_is_named(own_tiny_bundle: Bundle) -> None:
    for name in own_tiny_bundle.manifest.files:
        path = own_tiny_bundle.root / name
        data = path.read_bytes()
        for damaged, text in ((data[:-1], "bytes"), (bytes([data[0] ^ 1]) + data[1:], "SHA-256")):
            path.write_bytes(damaged)
            with pytest.raises(BundleCorrupt, match=text) as caught:
                Bundle.open(own_tiny_bundle.root)
            assert path.name in str(caught.value)
        path.write_bytes(data)
    Bundle.open(own_tiny_bundle.root)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("surprise", 1), "surprise"),
        (_set("format_version", 2), "format_version"),
        (_set("name", "../x"), "name"),
        (lambda m: m["files"].__setitem__("../evil", m["files"]["labels.json"]), "malformed"),
        (lambda m: m["files"].__setitem__("/etc/passwd", m["files"]["labels.json"]), "malformed"),
        (lambda m: m["points"].append(m["points"][0]), "same id"),
        (lambda m: m["points"][0].__setitem__("split", "s9"), "not listed"),
        (lambda m: m["points"][0].__setitem__("channels", 99), "channels"),
        (lambda m: m["split_points"].reverse(), "order"),
        (lambda m: m["files"].pop("labels.json"), "missing"),
        (lambda m: m["input"].__setitem__("std", [0, 1, 1]), "std"),
        (lambda m: m["points"][0].__setitem__("step", -1), "step"),
    ],
)
def test_manifests_that_are_refused(
    own_tiny_bundle: Bundle, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    path = own_tiny_bundle.root / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleCorrupt, match=text):
        Bundle.open(own_tiny_bundle.root)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none(own_tiny_bundle: Bundle, data: bytes) -> None:
    (own_tiny_bundle.root / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(BundleCorrupt, match="not a valid manifest"):
        Bundle.open(own_tiny_bundle.root)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="not a bundle"):
        Bundle.open(tmp_path)


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), BundleWriter(tmp_path / "b") as writer:  # noqa: PT012
        writer.add("labels.json", b"[]", "cloud")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    first = make_tiny_bundle(tmp_path / "b", seed=1)
    second = make_tiny_bundle(tmp_path / "b", seed=2)
    assert first.bundle_id != second.bundle_id
    assert Bundle.open(tmp_path / "b").bundle_id == second.bundle_id
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidConfig, match="no bundle"), BundleWriter(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_ids_and_paths() -> None:
    for good in ("s1-r3", "a", "0", "a" * 64, "v1.2_x"):
        assert check_id(good, "operating point") == good
    for bad in ("", "-a", ".a", "A", "a/b", "a" * 65, "a\n", "ä", "a b"):
        with pytest.raises(InvalidConfig, match="malformed"):
            check_id(bad, "operating point")
    assert check_relative_path("points/s1-r3/tables.npz")
    for bad in ("", "/a", "a/../b", "a//b", "a/", "./a", "a\\b", "a/b/c/d/e", "a\n"):
        with pytest.raises(InvalidConfig, match="malformed"):
            check_relative_path(bad)


def test_the_chain_is_the_sum_of_its_segments(tiny_bundle: Bundle) -> None:
    chain = SegmentChain(tiny_bundle, threads=1)
    x = np.concatenate([preprocess(photo(i), INPUT) for i in range(3)])
    whole = chain.run(x, 0, 3)
    assert whole.shape == (3, 10)
    for split in ("s1", "s2"):
        head = chain.head_length(split)
        np.testing.assert_allclose(chain.run(chain.run(x, 0, head), head, 3), whole, rtol=1e-5, atol=1e-5)
    assert chain.loaded == (0, 1, 2)


def test_symbols_survive_the_payload_at_every_point(tiny_bundle: Bundle) -> None:
    chain = SegmentChain(tiny_bundle, threads=1)
    for point in tiny_bundle.manifest.ladder:
        encoder, decoder = PointEncoder(tiny_bundle, point), PointDecoder(tiny_bundle, point)
        for seed in range(5):
            f = chain.run(preprocess(photo(seed), INPUT), 0, chain.head_length(point.split))
            encoded = encoder.encode(f)
            np.testing.assert_array_equal(decoder.codec.decode(encoded.payload), encoded.symbols)
            f_hat = decoder.decode(decoder.dequantize(encoded.payload)[None])
            assert f_hat.shape == f.shape
