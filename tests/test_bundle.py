"""Bundles: verified when opened, written all or nothing; ids, paths and manifests that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitneck.bundle import MANIFEST_NAME, Bundle, BundleWriter
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain, segments_of
from bitneck.errors import BundleCorrupt, InvalidConfig, ModelFailure, UnknownPoint
from bitneck.ids import check_id, check_relative_path
from bitneck.image import preprocess
from bitneck.manifest import Manifest, bundle_id_of, sha256_hex
from bitneck_testing.photographs import photo
from bitneck_testing.tiny_bundles import CLASSES, INPUT, make_tiny_bundle


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
        (lambda m: m["units"][0].__setitem__("split", "s9"), "not listed"),
        (lambda m: m["points"][0].__setitem__("unit", "s9"), "not listed"),
        (lambda m: m["units"].append(m["units"][0] | {"id": "idle"}), "no operating point uses"),
        (lambda m: m["units"].append(m["units"][0]), "two units"),
        (lambda m: m["units"][0].__setitem__("channels", 99), "channels"),
        (lambda m: m["units"][0]["latent_shape"].__setitem__(1, 65536), "too large for a feature"),
        (lambda m: m["units"][0]["latent_shape"].__setitem__(2, 5), "too large for a feature"),
        (lambda m: m["units"][0]["latent_shape"].__setitem__(0, 99), "channels differ"),
        (lambda m: m["units"][0].__setitem__("layer", "s1-0"), "missing .*layers/s1-0.onnx"),
        (_set("retired", {"s1-r1": "s1-r2"}), "must not be an operating point"),
        (_set("retired", {"old": "older"}), "its successor older must be one"),
        (lambda m: m["split_points"].reverse(), "order"),
        (lambda m: m["files"].pop("labels.json"), "missing"),
        (lambda m: m["input"].__setitem__("std", [0, 1, 1]), "std"),
        (lambda m: m["points"][0].__setitem__("step", -1), "step"),
        (_set("format_version", "4"), "format_version"),
        (_set("format_version", 3), "export the bundle again"),
        (_set("name", "tiny\n"), "name"),
        (_set("points", []), "points"),
        (_set("uncompressed_accuracy", float("nan")), "uncompressed_accuracy"),
        (lambda m: m.pop("format_version") and m.pop("task"), "task"),
        (lambda m: m["points"][0].__setitem__("id", "../s1"), "id"),
        (lambda m: m["points"][0].__setitem__("surprise", 1), "surprise"),
        (lambda m: m["segments"][0].__setitem__("file", "segments/99-other.onnx"), "missing"),
        (lambda m: m["split_points"][1].__setitem__("name", m["split_points"][0]["name"]), "same name"),
        (lambda m: m["split_points"][1].__setitem__("after_segment", 2), "before the last segment"),
        (lambda m: m["files"]["labels.json"].__setitem__("sha256", "0" * 63), "sha256"),
        (lambda m: m["files"]["labels.json"].__setitem__("size", -1), "size"),
        (lambda m: m["files"]["labels.json"].__setitem__("role", "edge"), "the cloud needs it"),
        (lambda m: m["files"]["units/s1-r1/encoder.onnx"].__setitem__("role", "cloud"), "the edge needs it"),
        (lambda m: m["files"]["segments/01-seg1.onnx"].__setitem__("role", "edge"), "the cloud needs it"),
        (lambda m: m["input"].__setitem__("resize", 16), "smaller than the crop"),
        (lambda m: m["input"].__setitem__("resize", None), "`crop` needs resize"),
        (lambda m: m["input"].__setitem__("fit", "stretch"), "leave it out"),
        (lambda m: m["input"].__setitem__("fit", "squeeze"), "fit"),
        (lambda m: m["input"].update(height=5000, width=5000, resize=5000), "limit"),
        (_set("task", "detection"), "task"),
        (_set("task", "segmentation"), "needs an input with fit `stretch`"),
        (lambda m: m["files"]["labels.json"].__setitem__("role", "cloud"), "the edge needs it"),
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


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_change_of_a_manifest_is_refused_or_another_bundle(tiny_bundle: Bundle, data: st.DataObject) -> None:
    """Never another exception, and never the same id."""
    good = tiny_bundle.manifest_json
    k = data.draw(st.integers(0, len(good) - 1))
    bad = good[:k] + data.draw(st.binary(max_size=4)) + good[k + data.draw(st.integers(0, 3)) :]
    try:
        Manifest.from_json(bad, "changed.json")
    except BundleCorrupt:
        return
    assert bad == good or bundle_id_of(bad) != tiny_bundle.bundle_id


def test_a_manifest_reads_back_as_it_was_written(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.manifest.to_json() == tiny_bundle.manifest_json
    assert Manifest.from_json(tiny_bundle.manifest_json, "x") == tiny_bundle.manifest


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / ("long" * 100)):
        with pytest.raises(InvalidConfig, match="not a bundle"):
            Bundle.open(root)


def test_what_a_bundle_does_not_have(tiny_bundle: Bundle) -> None:
    for name in ("nope", "../manifest.json", "manifest.json", "points/s9/tables.npz"):
        with pytest.raises(InvalidConfig, match="has no file"):
            tiny_bundle.path(name)
    with pytest.raises(UnknownPoint, match="has no operating point"):
        tiny_bundle.tables("../../etc")


def _rewritten(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """The bundle with one file replaced, its size and digest made right."""
    manifest = json.loads((bundle.root / MANIFEST_NAME).read_bytes())
    manifest["files"][name] |= {"size": len(data), "sha256": sha256_hex(data)}
    (bundle.root / name).write_bytes(data)
    (bundle.root / MANIFEST_NAME).write_text(json.dumps(manifest))
    return Bundle.open(bundle.root)


def test_files_that_verify_and_are_wrong_inside(own_tiny_bundle: Bundle) -> None:
    for name, data in (("two", (own_tiny_bundle.root / "points/s1-r2/tables.npz").read_bytes()), ("junk", b"junk")):
        bundle = _rewritten(own_tiny_bundle, "points/s1-r1/tables.npz", data)
        text = "tables of 8 channels, the manifest says 4" if name == "two" else "unreadable"
        with pytest.raises(BundleCorrupt, match=text) as caught:
            bundle.tables("s1-r1")
        assert "points/s1-r1/tables.npz" in str(caught.value)
    for data in (b"{}", b"[1]", b"\xff", b"["):
        bundle = _rewritten(own_tiny_bundle, "labels.json", data)
        with pytest.raises(BundleCorrupt, match=r"labels\.json"):
            bundle.labels()
    bundle = _rewritten(own_tiny_bundle, "units/s1-r2/encoder.onnx", b"no network")
    with pytest.raises(ModelFailure, match=r"encoder\.onnx: ONNX Runtime cannot load it"):
        PointEncoder(bundle, bundle.manifest.ladder["s1-r2"])
    # The encoder of another point loads, and is found out by its latent's shape.
    other = (bundle.root / "units/s1-r1/encoder.onnx").read_bytes()
    bundle = _rewritten(own_tiny_bundle, "units/s1-r2/encoder.onnx", other)
    chain = SegmentChain(bundle, threads=1)
    f = chain.run(preprocess(photo(0), INPUT), 0, chain.head_length("s1"))
    with pytest.raises(ModelFailure, match=r"encoder of s1-r2 gave \(1, 4, 1, 1\), expected \(1, 8, 2, 2\)"):
        PointEncoder(bundle, bundle.manifest.ladder["s1-r2"]).encode(f)


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), BundleWriter(tmp_path / "b") as writer:
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
    with pytest.raises(InvalidConfig, match="no bundle"), BundleWriter(tmp_path / "mine" / "letter.txt"):
        pass


def test_a_bundle_that_fails_its_check_leaves_the_old_one(tiny_bundle: Bundle, tmp_path: Path) -> None:
    old = make_tiny_bundle(tmp_path / "b", seed=1)

    def refuse(staged: Bundle) -> None:
        assert staged.root != tmp_path / "b"
        raise RuntimeError("the proof fails")

    with pytest.raises(RuntimeError, match="proof"), BundleWriter(tmp_path / "b") as writer:
        for name, entry in tiny_bundle.manifest.files.items():
            writer.add(name, tiny_bundle.path(name).read_bytes(), entry.role)
        writer.finish(tiny_bundle.manifest, refuse)
    assert Bundle.open(tmp_path / "b").bundle_id == old.bundle_id
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_manifest_of_other_files_is_not_finished(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleCorrupt, match="the manifest says"), BundleWriter(tmp_path / "b") as writer:
        writer.add("labels.json", b"[]", "cloud")
        writer.finish(tiny_bundle.manifest)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_refuses_bad_names_and_use_outside_its_block(tiny_bundle: Bundle, tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "b")
    with pytest.raises(InvalidConfig, match="inside its `with` block"):
        writer.add("labels.json", b"", "cloud")
    with pytest.raises(InvalidConfig, match="inside its `with` block"):
        writer.finish(tiny_bundle.manifest)
    with writer:
        for name in ("../evil", "/etc/evil", "a/../../evil"):
            with pytest.raises(InvalidConfig, match="malformed"):
                writer.add(name, b"", "cloud")
        writer.add("labels.json", b"", "cloud")
        with pytest.raises(InvalidConfig, match="added twice"):
            writer.add("labels.json", b"", "cloud")
        with pytest.raises(InvalidConfig, match="cannot be written"):  # a file stands where a folder is needed
            writer.add("labels.json/x", b"", "cloud")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "b", tmp_path / ("long" * 100)):
        with pytest.raises(InvalidConfig, match="cannot be written"), BundleWriter(place):
            pass


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


def test_a_segment_is_loaded_once_and_only_when_needed(own_tiny_bundle: Bundle) -> None:
    chain = SegmentChain(own_tiny_bundle, threads=1)
    assert len(chain) == 3
    assert chain.loaded == ()
    x = preprocess(photo(0), INPUT)
    f = chain.run(x, 0, chain.head_length("s2"))
    assert chain.loaded == (0,)
    chain.load(*(segments_of(own_tiny_bundle, "edge").start, segments_of(own_tiny_bundle, "edge").stop))
    assert chain.loaded == (0, 1)
    assert list(segments_of(own_tiny_bundle, "cloud")) == [1, 2]
    for index in range(2):  # nothing is read again, at whatever point
        own_tiny_bundle.path(own_tiny_bundle.manifest.segments[index].file).unlink()
    for point in own_tiny_bundle.manifest.ladder:
        chain.run(x, 0, chain.head_length(point.split))
    np.testing.assert_array_equal(chain.run(x, 0, chain.head_length("s2")), f)
    with pytest.raises(ModelFailure, match="failed on an input of shape"):
        chain.run(x[:, :2], 0, 1)


def test_symbols_survive_the_payload_at_every_point(tiny_bundle: Bundle) -> None:
    chain = SegmentChain(tiny_bundle, threads=1)
    for point in tiny_bundle.manifest.ladder:
        encoder, decoder = PointEncoder(tiny_bundle, point), PointDecoder(tiny_bundle, point)
        for seed in range(5):
            f = chain.run(preprocess(photo(seed), INPUT), 0, chain.head_length(point.split))
            encoded = encoder.encode(f)
            np.testing.assert_array_equal(encoded.symbols, encoder.symbols(f))
            assert encoded.symbols.shape == encoder.latent(f).shape[1:] == point.latent_shape
            np.testing.assert_array_equal(decoder.codec.decode(encoded.payload), encoded.symbols)
            f_hat = decoder.decode(decoder.dequantize(encoded.payload)[None])
            assert f_hat.shape == f.shape
