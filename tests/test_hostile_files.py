"""Files that say one thing to a check and another to what runs them, and what a cut-off download leaves behind."""

import asyncio
import io
import json
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitneck import runtime
from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BitneckError, BundleCorrupt, BundleMismatch, InvalidConfig, ModelFailure, Unavailable
from bitneck.manifest import Manifest
from bitneck.onnx_file.cost import check_onnx
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.bundles.fetch import open_supply, take_bundle
from bitneck_edge.bundles.notes import noted_bundles, remember
from bitneck_edge.bundles.store import FileStore
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import Access
from bitneck_edge.link.wire import server_message
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.rogue_servers import opened, rogue_server

HANG_S = 60.0
X = (1, 3, 8, 8)
LARGE = 12_000


def part(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    length, head = len(content), bytes([number << 3 | 2])
    while length > 127:
        head, length = head + bytes([length & 127 | 128]), length >> 7
    return head + bytes([length]) + content


def constant(name: str, values: Any, kind: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def model(nodes: list[Any], weights: list[Any], x: Any = ("n", 3, 8, 8), said: list[Any] | None = None) -> Any:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights, value_info=said or [],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ambiguous_files() -> dict[str, bytes]:
    node, one = helper.make_node, constant("c", 1.0, np.float32)
    weights = constant("w", np.ones((1, 3, 1, 1)), np.float32)
    mean = [node("ReduceMean", ["e"], ["r"], keepdims=0), node("Add", ["x", "r"], ["y"])]
    hidden = model([node("ConstantOfShape", ["s"], ["e"]), mean[0]], [constant("s", [LARGE, LARGE])]).graph
    hidden.ClearField("input")
    hidden.ClearField("output")
    relu = model([node("Relu", ["x"], ["y"])], []).SerializeToString()
    twice = model([node("Conv", ["x", "w"], ["y"], pads=[LARGE] * 4)], [weights])
    twice.graph.node[0].attribute.append(helper.make_attribute("pads", [0] * 4))
    mixed = model([node("Conv", ["x", "w"], ["y"], pads=[LARGE] * 4)], [weights])
    pads = mixed.graph.node[0].attribute[0].SerializeToString()
    rest = mixed.graph.SerializeToString()
    mixed_node = mixed.graph.node[0].SerializeToString()
    mixed_pads = part(5, b"\x18\x00" * 4 + pads)
    mixed_graph = rest.replace(part(1, mixed_node), part(1, mixed_node.replace(part(5, pads), mixed_pads)))
    shape = [node("Shape", ["x"], ["s"]), node("Expand", ["c", "s"], ["e"]), *mean]
    middle = [node("Relu", ["x"], ["m"]), node("Shape", ["m"], ["s"]), *shape[1:]]
    expand = [node("Expand", ["c", "s"], ["e"]), *mean]
    small, large = constant("s", [1, 1]), constant("s", [LARGE, LARGE])
    said = [helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 3, LARGE, LARGE])]
    policy = node("Resize", ["x", "", "", "z"], ["y"], mode="nearest", keep_aspect_ratio_policy="not_smaller")
    scaled = [constant("s", [1, 1, 1e4, 1e4], np.float32), constant("", [1, 1, 1, 1])]
    again = [node("Relu", ["x"], ["c"]), *expand]
    return {
        "two graphs": part(7, hidden.SerializeToString()) + relu,
        "an attribute twice": twice.SerializeToString(),
        "a number before the list": part(7, mixed_graph),
        "a size that the policy makes": model([policy], [constant("z", [1, 1, LARGE, 1])]).SerializeToString(),
        "a constant without a name": model([node("Resize", ["x", "", "s", ""], ["y"])], scaled).SerializeToString(),
        "an input that says it is large": model(shape, [one], (1, 3, LARGE, LARGE)).SerializeToString(),
        "a feature that says it is large": model(middle, [one], "abcd", said).SerializeToString(),
        "a constant twice": model(expand, [one, large, small]).SerializeToString(),
        "a tensor twice": model(again, [one, small]).SerializeToString(),
        "an axis twice": model(
            [node("Unsqueeze", ["w", "a"], ["e"]), *mean], [constant("w", [1.0] * 3, np.float32), constant("a", [0, 0])]
        ).SerializeToString(),
        "ten million operators": part(7, b"\x0a\x00" * 10_000_000),
        "a million axes": part(7, part(5, (b"\x08" + b"\xff" * 8 + b"\x7f") * 1_000_000 + b"\x10\x01")),
        "a million inputs of one operator": part(7, part(1, b"\x0a\x00" * 1_000_000 + part(4, b"Relu"))),
    }


@pytest.mark.parametrize("name", ambiguous_files())
def test_files_that_can_be_read_in_two_ways_are_not_run(name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(BundleCorrupt, match="--bundle-id"):
        check_onnx(ambiguous_files()[name], X)
    assert time.monotonic() - begin < 20


def test_true_declarations_are_taken() -> None:
    said = [helper.make_tensor_value_info("m", TensorProto.FLOAT, ["n", 3, 8, "w"])]
    nodes = [helper.make_node("Relu", ["x"], ["m"]), helper.make_node("Abs", ["m"], ["y"])]
    assert check_onnx(model(nodes, [], said=said).SerializeToString(), X).y == X


def with_file(bundle: Bundle, root: Path, path: str, data: bytes) -> Bundle:
    """The bundle with other content of one file, as a server could offer it."""
    with BundleWriter(root) as writer:
        for name, entry in bundle.manifest.files.items():
            writer.add(name, data if name == path else bundle.path(name).read_bytes(), entry.role)
        return writer.finish(bundle.manifest.model_copy(update={"files": writer.files}))


async def fetched(address: str, tmp_path: Path, **values: Any) -> None:
    async with asyncio.timeout(HANG_S):
        async with EdgeClient(address, cache_dir=tmp_path / "cache", retries=0, threads=1, **values):
            pass


async def test_a_download_that_was_cut_off_does_not_skip_the_check(tiny_bundle: Bundle, tmp_path: Path) -> None:
    graph, last = "units/s1-r1/encoder.onnx", "points/s1-r1/tables.npz"
    evil = with_file(tiny_bundle, tmp_path / "evil", graph, ambiguous_files()["two graphs"])
    bad = [b"not this time"]

    def spoil(path: str, data: bytes) -> bytes:
        return bad.pop() if path == last and bad else data

    async with rogue_server(evil, spoil=spoil) as (address, _):
        with pytest.raises(BundleCorrupt, match=r"tables\.npz"):
            await fetched(address, tmp_path, point="s1-r1")
        for _ in range(2):
            with pytest.raises(BundleCorrupt, match="it is not run"):
                await fetched(address, tmp_path, point="s1-r1")


async def test_a_start_without_the_server_checks_the_cost_too(tiny_bundle: Bundle, tmp_path: Path) -> None:
    evil = with_file(tiny_bundle, tmp_path / "evil", "units/s1-r1/encoder.onnx", ambiguous_files()["two graphs"])
    nobody = EdgeSettings.load({"server": "127.0.0.1:1", "cache_dir": tmp_path / "cache", "retries": 0})
    take_bundle(evil.root, nobody)
    for pinned in ("", evil.bundle_id):
        supply = await open_supply(nobody.model_copy(update={"bundle_id": pinned}), offline=True)
        await supply.look(["s1-r1", "s2-r1"])
        assert (supply.ready("s1-r1"), supply.ready("s2-r1")) == (bool(pinned), True)
        await supply.close()


@pytest.mark.parametrize("kind", ["pipe", "huge"])
def test_notes_of_a_shared_cache_may_be_anything(tmp_path: Path, kind: str) -> None:
    remember(tmp_path, "here:1", "", "sha256:" + "0" * 64)
    (tmp_path / "manifests").mkdir()
    for name in ("servers/by-another-user", "manifests/" + "ab" * 32):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            with (tmp_path / name).open("wb") as file:
                file.truncate(8 << 30)
    store = FileStore(tmp_path)
    assert store.known("sha256:" + "ab" * 32) is None
    store.forget_old(noted_bundles(tmp_path), time.time() + 1e6)
    assert list((tmp_path / "manifests").iterdir()) == []


def test_only_files_of_the_store_are_forgotten(tmp_path: Path) -> None:
    folders = ("files", "parts", "manifests", "bundles")
    for folder in folders:
        for name in ("documents", "ab" * 32):
            (tmp_path / folder / name).mkdir(parents=True) if folder == "bundles" else write(tmp_path / folder / name)
    store = FileStore(tmp_path)
    store.forget_old([], time.time() + 1e6)
    assert [[path.name for path in (tmp_path / folder).iterdir()] for folder in folders] == [["documents"]] * 4
    (tmp_path / "files").rename(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / ("cd" * 32))
    (tmp_path / "files").symlink_to(tmp_path / "elsewhere")
    store.forget_old([], time.time() + 1e6)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    (tmp_path / "servers").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidConfig, match="link"):
        remember(tmp_path, "here:1", "", "sha256:" + "0" * 64)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize("where", ["a file's name", "a key", "thousands of files"])
def test_what_a_manifest_says_is_clean_and_short_in_messages(tiny_bundle: Bundle, where: str) -> None:
    evil = "\x1b]0;owned\x07\nERROR: forged"
    document = json.loads(tiny_bundle.manifest_json)
    entry = {"role": "edge", "size": 1, "sha256": "0" * 64}
    if where == "a file's name":
        document["files"][evil] = {"role": "nobody"}
    elif where == "a key":
        document[evil] = 1
    else:
        document["files"] |= {f"f{k}": entry for k in range(30_000)}
    with pytest.raises(BundleCorrupt) as caught:
        Manifest.from_json(json.dumps(document).encode(), "here")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


async def test_what_a_server_calls_its_bundle_is_clean_and_short(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle) as (address, rogue):
        rogue.bundle.bundle_id, before = "\x1b[2J\nERROR: forged " * 5000, rogue.bundle.bundle_id
        try:
            for pin in ("", "sha256:" + "0" * 64):
                with pytest.raises(BundleMismatch) as caught:
                    await fetched(address, tmp_path, bundle_id=pin)
                assert str(caught.value).isprintable()
                assert len(str(caught.value)) < 500
        finally:
            rogue.bundle.bundle_id = before


def tables(size: list[int], counts: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, lo=np.zeros(len(size), np.int32), size=np.array(size, np.int32), counts=counts)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["many wide channels", "one wide channel among many"])
def test_tables_are_refused_before_they_take_memory(kind: str) -> None:
    if kind == "many wide channels":
        data = tables([4096] * 4096, np.full(1 << 24, 16, np.uint8))
    else:
        data = tables([16384, *[2] * 4095], np.array([*[4] * 16384, *[32768] * 8190], np.int32))
    with pytest.raises(BundleCorrupt, match="more than"):
        FactorizedModel.from_npz(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_arrays_are_not_unpacked_by_methods_without_a_bound(method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in ("lo", "size", "counts"):
            content = io.BytesIO()
            np.save(content, np.zeros(3, np.int32))
            archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(BundleCorrupt, match="another method than deflate"):
        FactorizedModel.from_npz(buffer.getvalue())


def test_a_file_of_tables_or_names_is_not_read_if_it_is_huge(scene_bundle: Bundle, tmp_path: Path) -> None:
    for name in ("points/s1-r1/tables.npz", scene_bundle.manifest.labels):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 33)
    bundle = Bundle(tmp_path, scene_bundle.manifest, scene_bundle.manifest_json)
    for read in (bundle.labels, lambda: bundle.tables("s1-r1")):
        with pytest.raises(BundleCorrupt, match="at most"):
            read()


async def test_a_flood_of_faults_about_nothing_ends_the_link(
    tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        while True:
            await context.write(pb.ServerMessage(fault=pb.Fault(seq=0, code=13, message="no")))

    caplog.set_level(logging.WARNING)
    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        access = Access(address=address)
        link = Link(
            LinkSettings(access=access, model="tiny", bundle_id="", client="test", connect_timeout_s=5.0,
                         answer_timeout_s=10.0, retries=1),
            lambda _point, _reason: None,
        )  # fmt: skip
        await link.open()
        with pytest.raises(BitneckError) as caught:
            await (await link.send("s1-r1", b"x")).answer
        assert isinstance(caught.value, Unavailable)
        assert len(caplog.records) < 1000
        await link.close()


def test_a_resume_token_that_could_not_be_sent_is_not_kept() -> None:
    for length, kept in ((300, 300), (1 << 20, 0)):
        message = server_message(pb.ServerMessage(opened=pb.Opened(session_id="s", resume_token="t" * length)))
        assert len(message.resume_token) == kept  # type: ignore[union-attr]


def test_a_file_in_onnx_runtimes_own_format_is_not_loaded(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "own.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tiny_bundle.path("units/s1-r1/encoder.onnx"), options)
    assert onnxruntime.InferenceSession(tmp_path / "own.ort") is not None
    with pytest.raises(ModelFailure):
        runtime.OnnxModule(tmp_path / "own.ort", threads=1)


def test_the_first_run_of_a_file_is_ended_when_it_takes_too_long(tmp_path: Path) -> None:
    steps = [helper.make_node("MatMul", [f"m{k}" if k else "x", "w"], [f"m{k + 1}"]) for k in range(1000)]
    steps.append(helper.make_node("Identity", ["m1000"], ["y"]))
    file = tmp_path / "slow.onnx"
    weights = [constant("w", np.full((128, 128), 1 / 128), np.float32)]
    file.write_bytes(model(steps, weights, (128, 128)).SerializeToString())
    x = np.ones((128, 128), np.float32)
    slow = runtime.OnnxModule(file, threads=1, first_run_s=0.001)
    with pytest.raises(ModelFailure, match=r"first run took longer than 0\.001 s"):
        slow.run(x)
    fast = runtime.ModulePool(first_run_s=60.0).load(file, "digest", threads=1)
    assert np.allclose(fast.run(x), 1.0)
    assert np.allclose(fast.run(x), 1.0)
