"""What a hostile or broken server can do to a device: nothing. Real servers, files and processes."""

import asyncio
import contextlib
import functools
import io
import itertools
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.arrays import MAX_ARRAY_BYTES
from bitneck.coding.class_map import MAX_MAP_BYTES
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BitneckError, BundleCorrupt, DeadlineExceeded, InvalidConfig, Unavailable
from bitneck.manifest import Manifest, Precision, bundle_id_of
from bitneck.onnx_file.cost import check_onnx
from bitneck.text import clean_text
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.bundles.cost import CostCheck
from bitneck_edge.bundles.fetch import MAX_BUNDLE_BYTES
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import MAX_ANSWER_BYTES, Access, _Pace
from bitneck_edge.link.wire import MAX_LABELS, server_message
from bitneck_edge.opening import most_answer_bytes
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN, heeding_interrupts
from bitneck_testing.rogue_servers import opened, result, rogue_server

ROOT = Path(__file__).parents[1]
HANG_S = 60.0
EVIL = "\x1b[2J\x1b]0;owned\x07\r\nERROR forged\u202e\u2028\x9b31m\x00"


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "retries": 0, "connect_timeout_s": 5.0, "threads": 1} | values


def link_to(address: str, retries: int) -> Link:
    return Link(
        LinkSettings(
            access=Access(address=address), model="tiny", bundle_id="", client="test", connect_timeout_s=5.0,
            answer_timeout_s=10.0, retries=retries,
        ),
        lambda _point, _reason: None,
    )  # fmt: skip


# Text


@pytest.mark.parametrize("text", [EVIL, "a" * 10_000, "ünïcödé 道路 ok"])
def test_text_of_a_peer_is_clean_and_short(text: str) -> None:
    cleaned = clean_text(text)
    assert len(cleaned) <= 501
    assert cleaned.isprintable()
    assert clean_text("ünïcödé 道路 ok") == "ünïcödé 道路 ok"


def unsafe(text: str) -> list[str]:
    return [c for c in text if c != "\n" and not c.isprintable()]


async def test_no_text_of_a_server_reaches_the_terminal_raw(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))

    async def converse(context: Any) -> None:
        await context.read()
        await context.write(pb.ServerMessage(opened=pb.Opened(session_id=EVIL, window=4, point=EVIL)))
        await context.write(pb.ServerMessage(set_point=pb.SetPoint(point=EVIL, reason=EVIL)))
        for k in range(3):
            message = await context.read()
            seq = message.frame.seq
            if k == 0:
                await context.write(pb.ServerMessage(fault=pb.Fault(seq=seq, code=3, message=EVIL * 5000)))
            else:
                labels = [pb.Label(index=1, name=EVIL, score=0.5)]
                output = pb.Output(classification=pb.Classification(labels=labels))
                await context.write(pb.ServerMessage(result=pb.Result(seq=seq, output=output)))
        await context.write(pb.ServerMessage(go_away=pb.GoAway(reason=EVIL)))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        process = await asyncio.create_subprocess_exec(
            str(BIN / "bitneck-edge"), "run", "--server", address, "--cache-dir", str(tmp_path / "c"), "--verbose",
            "--retries", "0", "--repeat", "3", str(tmp_path / "a.png"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert unsafe(out.decode()) == unsafe(err.decode()) == []
    assert not any(line.startswith("ERROR forged") for line in (out + err).decode().splitlines())
    assert len(err) < 20_000


# Floods


async def test_a_flood_of_control_messages_ends_the_link(tiny_bundle: Bundle) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        while True:
            await context.write(pb.ServerMessage(set_point=pb.SetPoint(point="x" * 100_000, reason="y" * 100_000)))

    async with rogue_server(tiny_bundle, converse) as (address, rogue), asyncio.timeout(HANG_S):
        link = link_to(address, retries=1)
        await link.open()
        with pytest.raises(Unavailable, match="messages without an answer"):
            await (await link.send("s1-r1", b"x")).answer
        assert rogue.streams == 2
        await link.close()


async def test_a_gigantic_answer_ends_its_call(tiny_bundle: Bundle) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        await context.read()
        labels = [pb.Label(index=k) for k in range(1_000_000)]
        output = pb.Output(classification=pb.Classification(labels=labels))
        await context.write(pb.ServerMessage(result=pb.Result(seq=1, output=output)))
        await context.read()

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(address, retries=0)
        await link.open()
        with pytest.raises(BitneckError):
            await (await link.send("s1-r1", b"x")).answer
        await link.close()


def test_a_long_list_of_labels_is_cut() -> None:
    labels = [pb.Label(index=k, name="n" * 1000) for k in range(5000)]
    output = pb.Output(classification=pb.Classification(labels=labels))
    message: Any = server_message(pb.ServerMessage(result=pb.Result(seq=1, output=output)))
    assert len(message.output.labels) == MAX_LABELS
    assert max(len(label.name) for label in message.output.labels) <= 201


async def test_a_server_that_sends_away_for_ever_is_given_up(tiny_bundle: Bundle) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        await asyncio.sleep(1.2)
        await context.write(pb.ServerMessage(go_away=pb.GoAway(reason="go on")))

    async with rogue_server(tiny_bundle, converse) as (address, rogue), asyncio.timeout(HANG_S):
        link = link_to(address, retries=2)
        await link.open()
        with pytest.raises(Unavailable, match="gave up"):
            await (await link.send("s1-r1", b"x")).answer
        assert rogue.streams == 3
        await link.close()


async def test_an_idle_client_that_is_sent_away_comes_back_less_and_less_often(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once if there is a frame to send."""
    monkeypatch.setattr("bitneck_edge.link.link._FAIR_S", 0.02)
    answering = False

    async def converse(context: Any) -> None:
        await opened(context)
        if answering:
            message = await context.read()
            await context.write(result(message.frame.seq))
        await asyncio.sleep(0.1)
        await context.write(pb.ServerMessage(go_away=pb.GoAway(reason="nothing came")))

    async with rogue_server(tiny_bundle, converse) as (address, rogue), asyncio.timeout(HANG_S):
        link = link_to(address, retries=0)
        await link.open()
        await asyncio.sleep(5)
        assert 3 <= rogue.streams <= 8  # pauses of about 0.2, 0.4, 0.8, 1.6 and 3.2 s; equal ones would be twenty
        answering = True
        await (await link.send("s1-r1", b"x")).answer
        await link.close()


async def test_a_servers_own_times_cannot_lead_the_rate_astray(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A frame that was away for milliseconds did not spend a century in the cloud."""

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            answer = result(message.frame.seq)
            answer.result.timings.compute_us = (1 << 63) - 1
            await context.write(answer)

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **settings(tmp_path, point="auto")) as client:
            for _ in range(5):
                await client.infer(photo())
            assert client._session is not None
            assert 0 <= client._session._rate._server < 60


def test_the_largest_class_map_of_a_bundle_may_come(tiny_bundle: Bundle, scene_bundle: Bundle) -> None:
    assert most_answer_bytes(tiny_bundle.manifest) == MAX_ANSWER_BYTES
    assert most_answer_bytes(scene_bundle.manifest) == MAX_ANSWER_BYTES
    wide = scene_bundle.manifest.input.model_copy(update={"height": 1500, "width": 1500})
    large = scene_bundle.manifest.model_copy(update={"input": wide})
    assert 2 * 1500 * 1500 < most_answer_bytes(large) <= MAX_MAP_BYTES + (1 << 16)
    huge = large.model_copy(update={"input": wide.model_copy(update={"height": 4000, "width": 4000})})
    assert most_answer_bytes(huge) == MAX_MAP_BYTES + (1 << 16)


# Downloads


def test_a_download_has_a_least_rate() -> None:
    pace = _Pace(15.0)
    assert all(pace.enough(1, float(second)) for second in range(60))
    assert not pace.enough(1, 61.0)
    steady = _Pace(15.0)
    assert all(steady.enough(64, float(second)) for second in range(600))
    empty = _Pace(15.0)
    assert [empty.enough(0, 0.0) for _ in range(16)] == [True] * 15 + [False]


async def test_chunks_of_nothing_end_a_download(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle, chunks=lambda _data: itertools.repeat(b"")) as (address, _):
        async with asyncio.timeout(HANG_S):
            with pytest.raises(DeadlineExceeded, match="too slowly"):
                async with EdgeClient(address, **settings(tmp_path)):
                    pass


def replaced(bundle: Bundle, out: Path, files: dict[str, bytes]) -> Bundle:
    """A copy of a bundle with other contents of some files: a server can offer any."""
    with BundleWriter(out) as writer:
        for name, entry in bundle.manifest.files.items():
            writer.add(name, files.get(name, bundle.path(name).read_bytes()), entry.role)
        fields = bundle.manifest.model_dump() | {"files": writer.files}
        return writer.finish(Manifest.model_validate(fields))


async def refused_bundle(bundle: Bundle, tmp_path: Path) -> str:
    async with rogue_server(bundle) as (address, _), asyncio.timeout(HANG_S):
        with pytest.raises(BitneckError) as refused:
            async with EdgeClient(address, **settings(tmp_path)):
                pass
    return str(refused.value)


async def test_a_gigantic_bundle_is_not_begun(tiny_bundle: Bundle, tmp_path: Path) -> None:
    fields = tiny_bundle.manifest.model_dump()
    name = next(name for name, entry in tiny_bundle.manifest.files.items() if entry.role == "edge")
    fields["files"][name]["size"] = 2 << 30
    gigantic = Manifest.model_validate(fields).to_json()
    bundle = tiny_bundle
    async with rogue_server(bundle, spoil=lambda p, d: gigantic if p == "manifest.json" else d) as (address, rogue):
        rogue.bundle = _Renamed(bundle, gigantic)  # type: ignore[assignment]  # its id is that of the manifest
        with pytest.raises(BundleCorrupt, match=str(MAX_BUNDLE_BYTES)):
            async with EdgeClient(address, **settings(tmp_path)):
                pass
        assert rogue.fetched == []


class _Renamed:
    """What a rogue server needs of a bundle, with another manifest."""

    def __init__(self, bundle: Bundle, manifest: bytes) -> None:
        self.root, self.manifest_json, self.bundle_id = bundle.root, manifest, bundle_id_of(manifest)


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff" * 1000, b"{}", b"null"])
def test_manifests_that_are_none(data: bytes) -> None:
    with pytest.raises(BundleCorrupt):
        Manifest.from_json(data, "here")


async def test_labels_that_nest_are_no_crash(tiny_bundle: Bundle, tmp_path: Path) -> None:
    labels = tiny_bundle.manifest.labels
    for k, data in enumerate((b"[" * 100_000 + b"]" * 100_000, b'"x"', b"[1]")):
        with pytest.raises(BundleCorrupt):
            replaced(tiny_bundle, tmp_path / f"evil{k}", {labels: data}).labels()


# Tables


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(shape: str, content: bytes, dtype: str = "<i4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "counts",
    [
        npy(f"({200 << 20},)", bytes(MAX_ARRAY_BYTES + 1)),  # unpacks to more than may be taken
        npy("(1500000000,)", bytes(64)),  # says that it has 6 GB
        npy("(-5,)", bytes(64)),
        npy("(16,)", bytes(64), dtype="|O"),
        npy("(16,)", bytes(64), dtype="<f4"),
        npy("(" + "1," * 2000 + ")", bytes(4)),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"",
    ],
)
def test_tables_that_would_take_memory(counts: bytes) -> None:
    data = npz(lo=npy("(1,)", bytes(4)), size=npy("(1,)", (16).to_bytes(4, "little")), counts=counts)
    assert len(data) < 1_000_000
    with pytest.raises(BundleCorrupt):
        FactorizedModel.from_npz(data)
    same = npz(**dict.fromkeys(("kernels", "near", "like", "keep"), counts))
    with pytest.raises(BundleCorrupt):
        ConditionalModel.from_npz(same)


# ONNX


def model(nodes: list[Any], constants: list[Any], x: tuple[int | str, ...] = (1, 3, 8, 8)) -> bytes:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def constant(name: str, values: Any, kind: Any = np.int64) -> Any:
    return numpy_helper.from_array(np.asarray(values, kind), name)


def scalar(name: str, kind: int) -> Any:
    return helper.make_tensor_value_info(name, kind, [])


def hostile_files() -> dict[str, bytes]:
    node, one = helper.make_node, constant("one", [[1.0]], np.float32)
    body = helper.make_graph(
        [node("Identity", ["c"], ["d"])], "b",
        [scalar("i", TensorProto.INT64), scalar("c", TensorProto.BOOL)],
        [scalar("d", TensorProto.BOOL)],
    )  # fmt: skip
    fill = numpy_helper.from_array(np.ones(1, np.float32))
    column, row = constant("a", np.ones((60_000, 1)), np.float32), constant("b", np.ones((1, 60_000)), np.float32)
    nine = constant("c0", np.ones((9, 9)), np.float32)
    small = constant("w", np.ones((1, 3, 3, 3)), np.float32)
    wide = constant("w", np.ones((64, 3, 1, 1)), np.float32)
    outside = constant("w", np.ones((1, 3, 1, 1)), np.float32)
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    lying = constant("w", np.ones((1, 3, 1, 1)), np.float32)
    lying.dims[0] = 1 << 40
    return {
        "constant": model([node("ConstantOfShape", ["s"], ["y"], value=fill)], [constant("s", [30_000, 30_000])]),
        "loop": model([node("Loop", ["", "t"], ["y"], body=body)], [constant("t", True, np.bool_)]),
        "expand": model([node("Expand", ["one", "s"], ["y"])], [one, constant("s", [60_000, 60_000])]),
        "broadcast": model([node("Add", ["a", "b"], ["y"])], [column, row]),
        "padding": model([node("Conv", ["x", "w"], ["y"], pads=[1 << 20] * 4)], [small]),
        "work": model([node("Conv", ["x", "w"], ["y"])], [wide], (1, 3, 40_000, 40_000)),
        "computed shape": model([node("Reshape", ["x", "x"], ["y"])], []),
        "resize": model([node("Resize", ["x", "", "", "s"], ["y"])], [constant("s", [1, 3, 40_000, 40_000])]),
        "scale": model([node("Resize", ["x", "", "f"], ["y"])], [constant("f", [1, 1, 9e4, 9e4], np.float32)]),
        "outside": model([node("Conv", ["x", "w"], ["y"])], [outside]),
        "lying": model([node("Conv", ["x", "w"], ["y"])], [lying]),
        "own operators": model([node("Gelu", ["x"], ["y"], domain="com.microsoft")], []),
        "squares": model([node("MatMul", ["a", "b"], ["y"])], [column, row]),
        "powers": model([node("Concat", [f"c{k}"] * 4, [f"c{k + 1}"], axis=0) for k in range(40)], [nine]),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_files())
def test_onnx_files_that_would_take_too_much_are_not_run(name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(BundleCorrupt, match="--bundle-id"):
        check_onnx(hostile_files()[name], (1, 3, 40_000, 40_000) if name == "work" else (1, 3, 8, 8))
    assert time.monotonic() - begin < 30


def test_damaged_onnx_files_are_refused_or_bounded(tiny_bundle: Bundle) -> None:
    rng = np.random.default_rng(7)
    files = [tiny_bundle.path(p).read_bytes() for p in tiny_bundle.manifest.files if p.endswith(".onnx")]
    for _ in range(2000):
        data = bytearray(files[rng.integers(len(files))])
        for _ in range(int(rng.integers(1, 6))):
            data[rng.integers(len(data))] = rng.integers(256)
        with contextlib.suppress(BundleCorrupt):
            check_onnx(bytes(data[: int(rng.integers(1, len(data) + 1))]), (1, 3, 32, 32))


def outputs_by_onnx(data: bytes, x: tuple[int, ...]) -> list[int]:
    """Elements of every operator's output, as ONNX's own shape inference says."""
    loaded = onnx.load_from_string(data)
    for dimension, length in zip(loaded.graph.input[0].type.tensor_type.shape.dim, x, strict=True):
        dimension.dim_value = length
    inferred = onnx.shape_inference.infer_shapes(loaded, strict_mode=True, data_prop=True).graph
    named = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.output)}
    outputs = [named[name] for node in inferred.node for name in node.output[:1]]
    return [int(np.prod([length.dim_value for length in dims])) for dims in outputs]


def read_all(bundle: Bundle, name: str) -> bytes:
    return bundle.path(name).read_bytes()


def test_the_cost_of_files_is_as_onnx_says(tiny_bundle: Bundle, scene_bundle: Bundle) -> None:
    exported = [Bundle.open(path.parent) for path in sorted((ROOT / "build").glob("*/manifest.json"))]
    precisions: tuple[Precision, ...] = ("float32", "int8")
    for bundle in (tiny_bundle, scene_bundle, *exported):
        manifest = bundle.manifest
        for precision in precisions:
            check = CostCheck(manifest, precision, functools.partial(read_all, bundle))
            for point in manifest.points:
                check.check(point.id)
            for unit in manifest.units:
                x: tuple[int, ...] = (1, *manifest.split(unit.split).feature_shape)
                for path in unit.encoder_files:
                    data = bundle.path(manifest.runs(path, precision)).read_bytes()
                    cost = check_onnx(data, x)
                    constants = sum(int(np.prod(t.dims)) for t in onnx.load_from_string(data).graph.initializer)
                    outputs = outputs_by_onnx(data, x)
                    if 0 not in outputs:  # else ONNX's inference gave a length up
                        assert cost.tensor_bytes == 4 * (constants + int(np.prod(x)) + sum(outputs)), unit.id
                    x = cost.y
                    assert cost.multiply_adds > 0
                assert x == (1, *unit.latent_shape)


async def test_a_fetched_file_that_would_take_too_much_is_not_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = "units/s2-r1/encoder.onnx"  # of the point that a new device begins with
    evil = replaced(tiny_bundle, tmp_path / "evil", {path: hostile_files()["constant"]})
    text = await refused_bundle(evil, tmp_path)
    assert "encoder.onnx" in text
    assert "it is not run" in text


# The cache


async def test_cached_files_have_the_mode_of_the_umask(tiny_bundle: Bundle, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        async with rogue_server(tiny_bundle) as (address, _):
            async with EdgeClient(address, **settings(tmp_path)):
                pass
    finally:
        os.umask(before)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "parts"]
    modes = {oct(path.stat().st_mode & 0o777) for path in kept}
    assert modes == {"0o640"}


async def test_links_in_a_shared_cache_are_not_followed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    digest = tiny_bundle.manifest.files["segments/00-seg0.onnx"].sha256
    for k, link in enumerate(("files", "parts", "manifests", f"files/{digest}", f"parts/{digest}")):
        path = tmp_path / f"cache{k}" / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(elsewhere)
        async with rogue_server(tiny_bundle) as (address, _):
            with pytest.raises(InvalidConfig, match="is a link"):
                async with EdgeClient(address, **settings(tmp_path) | {"cache_dir": tmp_path / f"cache{k}"}):
                    pass
        assert list(elsewhere.iterdir()) == []


# Signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run", "bench"])
async def test_a_signal_ends_a_file_that_never_ends(
    tiny_bundle: Bundle, tmp_path: Path, signum: signal.Signals, command: str
) -> None:
    """A pinned bundle is run unchecked: even then a signal ends the process."""
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    heads = {s.file for s in tiny_bundle.manifest.segments}
    spec = tiny_bundle.manifest.input
    endless = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])], "b",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
        ],
    )  # fmt: skip
    node = helper.make_node("Loop", ["", "t", "x"], ["y"], body=endless)
    data = model([node], [constant("t", True, np.bool_)], ("n", 3, spec.height, spec.width))
    evil = replaced(tiny_bundle, tmp_path / "evil", dict.fromkeys(heads, data))
    async with rogue_server(evil) as (address, _), asyncio.timeout(HANG_S):
        where: tuple[object, ...] = ("--bundle", evil.root)
        if command == "run":
            where = ("--server", address, "--bundle-id", evil.bundle_id, "--cache-dir", tmp_path / "c")
        parts = heeding_interrupts((BIN / "bitneck-edge", command, *where, tmp_path / "a.png"))
        process = await asyncio.create_subprocess_exec(*parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            await asyncio.sleep(4.0)
            assert process.returncode is None, await process.communicate()
            begin = time.monotonic()
            process.send_signal(signum)
            await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert time.monotonic() - begin < 10  # three seconds, on a machine with time
    assert process.returncode in (128 + signum, -signum)
