"""The cloud server in its own process: every call, every bad input, rates, sessions, the end."""

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from bitneck.bundle import Bundle
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import frame_crc32c
from bitneck_testing.processes import BIN, Server, running_server, start_server
from bitneck_testing.streams import Frames, Stream, open_stream, sealed, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

CODE = {status.name: status.value[0] for status in grpc.StatusCode}


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root, options=("--window", "4")) as running:
        yield running


@pytest.fixture
async def cloud(server: Server) -> AsyncIterator[Any]:
    async with stub(server.grpc) as it:
        yield it


@pytest.fixture
async def stream(cloud: Any, tiny_bundle: Bundle) -> Stream:
    return await open_stream(cloud, tiny_bundle.bundle_id)


def same_answer(result: pb.Result, logits: np.ndarray) -> None:
    labels = result.output.classification.labels
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
    assert [label.index for label in labels] == np.argsort(-scores, kind="stable")[:5].tolist()
    np.testing.assert_allclose([label.score for label in labels], np.sort(scores)[::-1][:5], atol=1e-5)
    assert labels[0].name == f"class {labels[0].index}"


async def test_manifest_and_files_are_handed_out(cloud: Any, tiny_bundle: Bundle) -> None:
    reply = await cloud.GetManifest(pb.GetManifestRequest())
    assert reply.manifest_json == tiny_bundle.manifest_json
    assert reply.bundle_id == tiny_bundle.bundle_id
    for path, entry in tiny_bundle.manifest.files.items():
        request = pb.FetchFileRequest(bundle_id=reply.bundle_id, path=path)
        if entry.role == "cloud":
            with pytest.raises(grpc.aio.AioRpcError, match="hands out no file"):
                await anext(aiter(cloud.FetchFile(request)))
        else:
            data = b"".join([chunk.data async for chunk in cloud.FetchFile(request)])
            assert data == (tiny_bundle.root / path).read_bytes()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (pb.FetchFileRequest(bundle_id="sha256:0", path="labels.json"), "FAILED_PRECONDITION"),
        (pb.FetchFileRequest(bundle_id="", path="../../etc/passwd"), "FAILED_PRECONDITION"),
        (pb.FetchFileRequest(model="nope", path="x"), "NOT_FOUND"),
    ],
)
async def test_files_that_are_refused(cloud: Any, request_: pb.FetchFileRequest, status: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(cloud.FetchFile(request_)))
    assert caught.value.code() is grpc.StatusCode[status]


async def test_paths_outside_the_bundle_are_refused(cloud: Any, tiny_bundle: Bundle) -> None:
    for path in ("../manifest.json", "/etc/passwd", "manifest.json", "points/../labels.json", ""):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(cloud.FetchFile(pb.FetchFileRequest(bundle_id=tiny_bundle.bundle_id, path=path))))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_infer_answers_one_frame(cloud: Any, frames: Frames, tiny_bundle: Bundle) -> None:
    for point in frames.encoders:
        frame = frames.frame(1, point, seed=3)
        reply = await cloud.Infer(pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frame))
        same_answer(reply.result, frames.logits(point, frame.payload))
        assert reply.result.timings.compute_us > 0
        assert reply.result.timings.received_unix_us > 0


async def test_a_stream_of_mixed_points_answers_each_frame(stream: Stream, frames: Frames) -> None:
    points = list(frames.encoders)
    sent = {}
    answered = {}
    for seq in range(1, 41):
        sent[seq] = frames.frame(seq, points[seq % 3], seed=seq)
        await stream.send(sent[seq])
        if seq % 4 == 0:
            for _ in range(4):
                message = await stream.read()
                answered[message.result.seq] = message.result
    assert sorted(answered) == sorted(sent)
    for seq, result in answered.items():
        same_answer(result, frames.logits(sent[seq].point, sent[seq].payload))


def bad_frames(frames: Frames) -> dict[str, tuple[pb.Frame, str, str]]:
    good = frames.frame(7)
    flipped = frames.frame(7)
    flipped.crc32c ^= 1
    moved = frames.frame(7)
    moved.point = "s1-r1"  # the CRC covers the point too
    junk = np.random.default_rng(0).bytes(1000)
    return {
        "wrong CRC": (flipped, "DATA_LOSS", "CRC-32C"),
        "point altered": (moved, "DATA_LOSS", "CRC-32C"),
        "no seq": (sealed(seq=0, point="s1-r2", payload=good.payload), "INVALID_ARGUMENT", "seq"),
        "unknown point": (sealed(seq=7, point="s9", payload=good.payload), "NOT_FOUND", "s1-r1, s2-r1, s1-r2"),
        "empty point": (sealed(seq=7, point="", payload=b""), "NOT_FOUND", "no operating point"),
        "too long": (sealed(seq=7, point="s1-r2", payload=junk), "INVALID_ARGUMENT", "at most"),
        "padded": (sealed(seq=7, point="s1-r2", payload=good.payload + b"\0"), "INVALID_ARGUMENT", "longer"),
        "random": (sealed(seq=7, point="s1-r2", payload=b"\xff" * 40), "INVALID_ARGUMENT", "payload"),
    }


async def test_each_bad_frame_gets_its_fault_and_the_next_good_one_succeeds(stream: Stream, frames: Frames) -> None:
    for seq, (name, (frame, status, text)) in enumerate(bad_frames(frames).items(), start=100):
        message = await stream.ask(frame)
        assert message.HasField("fault"), name
        assert (message.fault.seq, message.fault.code) == (frame.seq, CODE[status]), name
        assert text in message.fault.message, name
        assert (await stream.ask(frames.frame(seq))).result.seq == seq


async def test_bad_single_frames_get_a_status(cloud: Any, frames: Frames, tiny_bundle: Bundle) -> None:
    for name, (frame, status, text) in bad_frames(frames).items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cloud.Infer(pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frame))
        assert caught.value.code() is grpc.StatusCode[status], name
        assert text in (caught.value.details() or ""), name


async def test_messages_out_of_place(cloud: Any, stream: Stream, frames: Frames, tiny_bundle: Bundle) -> None:
    for first in (pb.ClientMessage(frame=frames.frame(1)), pb.ClientMessage()):
        call = cloud.Stream()
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError, match="send Open first"):
            await call.read()
    for message in (pb.ClientMessage(open=pb.Open(bundle_id=tiny_bundle.bundle_id)), pb.ClientMessage()):
        await stream.call.write(message)
        answer = await stream.read()
        assert (answer.fault.seq, answer.fault.code) == (0, CODE["FAILED_PRECONDITION"])
    assert (await stream.ask(frames.frame(1))).HasField("result")


async def test_another_bundle_and_another_model_are_refused(cloud: Any) -> None:
    for opening, status, text in (
        (pb.Open(bundle_id="sha256:other"), grpc.StatusCode.FAILED_PRECONDITION, "this server has sha256:"),
        (pb.Open(model="nope"), grpc.StatusCode.NOT_FOUND, "there are: tiny"),
    ):
        call = cloud.Stream()
        await call.write(pb.ClientMessage(open=opening))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is status
        assert text in (caught.value.details() or "")


async def test_an_oversized_message_ends_its_call_and_nothing_else(
    cloud: Any, frames: Frames, tiny_bundle: Bundle
) -> None:
    huge = sealed(seq=1, point="s1-r2", payload=bytes(1 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cloud.Infer(pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=huge))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    good = pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frames.frame(1))
    assert (await cloud.Infer(good)).result.seq == 1
    stream = await open_stream(cloud, tiny_bundle.bundle_id)
    await stream.ask(frames.frame(1))
    await stream.send(huge)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    resumed = await open_stream(cloud, tiny_bundle.bundle_id, token=stream.opened.resume_token)
    assert resumed.opened.session_id == stream.opened.session_id
    assert (await resumed.ask(frames.frame(2))).result.seq == 2


async def test_random_frames_never_break_a_stream(stream: Stream, frames: Frames) -> None:
    rng = np.random.default_rng(5)
    points = [*frames.encoders, "", "nope", "../x", "\u00e9"]
    for _ in range(300):
        point, payload = points[rng.integers(len(points))], rng.bytes(int(rng.integers(0, 50)))
        frame = pb.Frame(seq=int(rng.integers(0, 2**62)), point=point, payload=payload)
        frame.crc32c = frame_crc32c(point, payload) if rng.random() < 0.8 else int(rng.integers(0, 2**32))
        assert (await stream.ask(frame)).WhichOneof("message") in ("result", "fault")
    assert (await stream.ask(frames.frame(2**63))).HasField("result")


async def test_a_resent_frame_is_answered_from_memory(cloud: Any, frames: Frames, tiny_bundle: Bundle) -> None:
    first = await open_stream(cloud, tiny_bundle.bundle_id)
    answer = await first.ask(frames.frame(1, seed=1))
    first.call.cancel()
    again = await open_stream(cloud, tiny_bundle.bundle_id, token=first.opened.resume_token)
    assert again.opened.session_id == first.opened.session_id
    assert await again.ask(frames.frame(1, seed=1)) == answer  # timings included: it was not computed again
    assert (await again.ask(frames.frame(2))).result.seq == 2
    for seq in range(3, 20):
        await again.ask(frames.frame(seq))
    assert (await again.ask(frames.frame(1))).fault.code == CODE["INVALID_ARGUMENT"]
    stranger = await open_stream(cloud, tiny_bundle.bundle_id, token="made up")
    assert stranger.opened.session_id != first.opened.session_id


async def test_the_newest_stream_of_a_session_wins(cloud: Any, frames: Frames, tiny_bundle: Bundle) -> None:
    first = await open_stream(cloud, tiny_bundle.bundle_id)
    second = await open_stream(cloud, tiny_bundle.bundle_id, token=first.opened.resume_token)
    assert (await first.read()).HasField("go_away")
    assert await first.call.read() is grpc.aio.EOF
    assert (await second.ask(frames.frame(1))).result.seq == 1


async def test_a_frame_with_time_to_spare_is_answered(stream: Stream, frames: Frames) -> None:
    assert (await stream.ask(frames.frame(1, deadline_ms=60_000))).HasField("result")


async def test_health_and_reflection(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "bitneck.v2.SplitInference"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(server.grpc) as sync_channel:
        services = ProtoReflectionDescriptorDatabase(sync_channel).get_services()
    assert "bitneck.v2.SplitInference" in services


async def test_rates_reach_a_running_client(server: Server, stream: Stream, frames: Frames) -> None:
    session = stream.opened.session_id
    async with httpx.AsyncClient(base_url=server.http) as http:
        for body, point in (
            ({"point": "s1-r2"}, "s1-r2"),
            ({"max_bytes_per_frame": 13}, "s2-r1"),
            ({"min_accuracy": 0.5}, "s1-r1"),
            ({"max_kbps": 16.0}, "s2-r1"),  # 200 bytes of the link a frame at the assumed 10 frames a second
        ):
            reply = await http.put(f"/v1/sessions/{session}/rate", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.json()["point"] == point
            assert reply.json()["pushed"]
            assert (await stream.read()).set_point.point == point
        shown = (await http.get(f"/v1/sessions/{session}")).json()
        assert (shown["point_asked"], shown["policy"]) == ("s2-r1", {"max_kbps": 16.0})
        assert (await stream.ask(frames.frame(1, "s2-r1"))).HasField("result")


async def test_max_kbps_follows_the_frame_rate(server: Server, stream: Stream, frames: Frames) -> None:
    async with httpx.AsyncClient(base_url=server.http) as http:
        url = f"/v1/sessions/{stream.opened.session_id}/rate"
        assert (await http.put(url, json={"max_kbps": 16.0})).json()["point"] == "s2-r1"
    assert (await stream.read()).set_point.point == "s2-r1"
    asked = []
    for seq in range(1, 20):  # hundreds of frames a second: only the lowest point is left
        answer = await stream.ask(frames.frame(seq, "s1-r1"))
        if answer.HasField("set_point"):
            asked.append(answer.set_point.point)
            answer = await stream.read()
        assert answer.HasField("result")
    assert asked[0] == "s1-r1"


async def test_the_rate_of_new_sessions(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root) as own:
        async with httpx.AsyncClient(base_url=own.http) as http, stub(own.grpc) as cloud:
            before = await open_stream(cloud, tiny_bundle.bundle_id)
            assert before.opened.point == ""
            reply = await http.put("/v1/rate", json={"max_bytes_per_frame": 5})
            assert reply.json()["points"] == {"tiny": "s1-r1"}
            after = await open_stream(cloud, tiny_bundle.bundle_id)
            assert after.opened.point == "s1-r1"
            assert (await before.ask(frames.frame(1))).HasField("result")  # open sessions keep theirs
            assert (await http.put("/v1/rate", json={"auto": True})).status_code == 200
            assert (await open_stream(cloud, tiny_bundle.bundle_id)).opened.point == ""
            untyped = await http.put("/v1/rate", content=b'{"point": "s1-r1"}')
            assert (untyped.status_code, "Content-Type: application/json" in untyped.json()["detail"]) == (403, True)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("PUT", "/v1/rate", {"auto": False}, 422, "auto"),
        ("POST", "/v1/models/nope/reload", None, 404, "there are: tiny"),
        ("GET", "/v2/models/tiny/versions/sha256:0", None, 409, "this server has"),
        ("PUT", "/v1/rate", {}, 400, "exactly one"),
        ("PUT", "/v1/rate", {"point": "s1-r1", "max_kbps": 3}, 400, "exactly one"),
        ("PUT", "/v1/rate", {"point": "nope"}, 404, "s1-r1, s2-r1, s1-r2"),
        ("PUT", "/v1/rate", {"max_bytes_per_frame": 1}, 409, "the lowest, s1-r1"),
        ("PUT", "/v1/rate", {"min_accuracy": 2}, 422, "min_accuracy"),
        ("PUT", "/v1/rate", {"max_kbps": "fast"}, 422, "max_kbps"),
        ("PUT", "/v1/sessions/s-0/rate", {"point": "s1-r1"}, 404, "no session"),
        ("GET", "/v1/sessions/s-0", None, 404, "no session"),
        ("GET", "/v1/models/nope", None, 404, "there are: tiny"),
        ("GET", "/nowhere", None, 404, "Not Found"),
        ("DELETE", "/v1/models", None, 405, "Method Not Allowed"),
        ("DELETE", "/v1/rate", None, 404, "GET /v1/rate lists them"),
    ],
)
def test_refused_requests_are_problem_details(
    server: Server, method: str, path: str, body: Any, status: int, text: str
) -> None:
    reply = httpx.request(method, server.http + path, json=body, headers={"X-Bitneck-Request": "1"})
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert set(problem) == {"type", "title", "status", "detail", "instance"}
    assert problem["status"] == status
    assert text in problem["detail"]


def test_models_sessions_health_and_docs(server: Server) -> None:
    (model,) = httpx.get(f"{server.http}/v1/models").json()
    assert model == httpx.get(f"{server.http}/v1/models/tiny").json()
    assert [p["id"] for p in model["points"]] == ["s1-r1", "s2-r1", "s1-r2"]
    assert httpx.get(f"{server.http}/healthz").status_code == 200
    assert httpx.get(f"{server.http}/readyz").status_code == 200
    assert httpx.get(f"{server.http}/docs", follow_redirects=True).status_code == 200
    paths = httpx.get(f"{server.http}/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/sessions", "/v1/rate", "/v1/sessions/{session_id}/rate"} <= set(paths)


def test_a_token_guards_the_control_api(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root, options=("--http-token", "a-secret-of-sixteen")) as own:
        assert httpx.get(f"{own.http}/v1/models").status_code == 401
        wrong = httpx.get(f"{own.http}/v1/models", headers={"Authorization": "Bearer no"})
        assert (wrong.status_code, wrong.json()["status"]) == (401, 401)
        right = httpx.get(f"{own.http}/v1/models", headers={"Authorization": "Bearer a-secret-of-sixteen"})
        assert right.status_code == 200
        assert httpx.get(f"{own.http}/readyz").status_code == 200


async def test_a_full_window_is_refused_frame_by_frame(frames: Frames, tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root, options=("--window", "1", "--max-queue", "1")) as own:
        async with stub(own.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            assert stream.opened.window == 1
            burst = [frames.frame(seq, seed=seq) for seq in range(1, 65)]

            async def send_all() -> None:
                for frame in burst:
                    await stream.send(frame)

            writing = asyncio.create_task(send_all())
            kinds = [(await stream.read()) for _ in burst]
            await writing
            faults = [m.fault for m in kinds if m.HasField("fault")]
            assert all(fault.code == CODE["RESOURCE_EXHAUSTED"] for fault in faults)
            assert len(faults) < len(burst)
            assert (await stream.ask(frames.frame(1000))).HasField("result")


async def test_a_vanished_client_leaves_a_session_to_resume(
    server: Server, frames: Frames, tiny_bundle: Bundle
) -> None:
    async with stub(server.grpc) as cloud:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, client="vanishing")
        for seq in range(1, 4):
            await stream.send(frames.frame(seq))
        session = stream.opened.session_id
    async with httpx.AsyncClient(base_url=server.http) as http, asyncio.timeout(10):
        while (await http.get(f"/v1/sessions/{session}")).json()["connected"]:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.02)
        assert (await http.get(f"/v1/sessions/{session}")).json()["frames_in_flight"] == 0
    async with stub(server.grpc) as cloud:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, token=stream.opened.resume_token)
        assert stream.opened.session_id == session
        for seq in range(1, 4):
            await stream.send(frames.frame(seq))
        assert sorted([(await stream.read()).result.seq for _ in range(3)]) == [1, 2, 3]


async def test_sigterm_answers_what_is_in_flight(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root) as own:
        async with stub(own.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            for seq in range(1, 9):
                await stream.send(frames.frame(seq))
            await stream.read()
            own.process.send_signal(signal.SIGTERM)
            answered, went = 1, False
            while answered < 8 or not went:
                message = await stream.read()
                went |= message.HasField("go_away")
                answered += message.HasField("result")
            await stream.call.done_writing()
            assert await stream.call.read() is grpc.aio.EOF
        assert await asyncio.to_thread(own.process.wait, 20) == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "bitneck-cloud"), *arguments], capture_output=True, text=True, timeout=60)


def test_servers_that_do_not_start(server: Server, own_tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = str(own_tiny_bundle.root)
    free = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
    (tmp_path / "bad.toml").write_text("windo = 3\n")
    for arguments, code, text in (
        (("--bundle", bundle, "--grpc", server.grpc, "--http", "127.0.0.1:0"), 2, "is another server running there"),
        (("--bundle", str(tmp_path), *free), 2, "is not a bundle"),
        (("--bundle", bundle, "--bundle", bundle, *free), 2, "loaded already"),
        (("--bundle", bundle, "--grpc", "here"), 2, "not HOST:PORT"),
        (("--bundle", bundle, "--grpc", "127.0.0.1:0", "--http", "0.0.0.0:0"), 2, "http_token"),
        (("--bundle", bundle, *free, "--window", "0"), 2, "window"),
        (("--bundle", bundle, *free, "--config", str(tmp_path / "bad.toml")), 2, "windo"),
        (("--bundle", bundle, *free, "--config", str(tmp_path / "no.toml")), 2, r"no.toml"),
    ):
        result = run("serve", *arguments)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    path = own_tiny_bundle.root / "labels.json"
    path.write_bytes(path.read_bytes()[:-2])
    result = run("serve", "--bundle", bundle, *free)
    assert result.returncode == 1
    assert "labels.json has" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_models_in_one_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=9, name="other")
    with running_server(tiny_bundle.root, other.root) as own:
        assert {m["name"] for m in own.ready["models"]} == {"tiny", "other"}
        names = [m["name"] for m in httpx.get(f"{own.http}/v1/models").json()]
        assert names == ["tiny", "other"]


def test_decode_reads_a_frame_from_a_file(tiny_bundle: Bundle, frames: Frames, tmp_path: Path) -> None:
    frame = frames.frame(1, "s2-r1", seed=2)
    path = tmp_path / "frame.bin"
    path.write_bytes(frame.SerializeToString())
    result = run("decode", str(path), "--bundle", str(tiny_bundle.root), "--symbols", str(tmp_path / "s.npy"), "--json")
    document = json.loads(result.stdout)
    assert document["payload_bytes"] == len(frame.payload)
    assert document["labels"][0]["index"] == frames.logits("s2-r1", frame.payload).argmax()
    symbols = np.load(tmp_path / "s.npy")
    np.testing.assert_array_equal(symbols, frames.decoders["s2-r1"].codec.decode(frame.payload))
    for data, code, text in (
        (b"\xff\xff", 1, "not a frame"),
        (path.read_bytes()[:-6], 1, ""),
        (b"", 1, "seq"),
    ):
        path.write_bytes(data)
        result = run("decode", str(path), "--bundle", str(tiny_bundle.root))
        assert result.returncode == code
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    assert run("decode", str(tmp_path / "none"), "--bundle", str(tiny_bundle.root)).returncode == 2


def test_a_killed_server_gives_its_port_back(tiny_bundle: Bundle) -> None:
    first = start_server(tiny_bundle.root)
    try:
        first.kill()
        second = start_server(tiny_bundle.root, grpc=first.grpc)
        assert second.grpc == first.grpc
        assert second.stop() == 0
    finally:
        for it in (first, second):
            assert it.process.stdout is not None
            it.process.stdout.close()
            it.log.close()


async def test_the_choice_that_is_handed_back_while_the_link_is_down_arrives(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with httpx.AsyncClient(base_url=server.http) as http, stub(server.grpc) as cloud:
        first = await open_stream(cloud, tiny_bundle.bundle_id)
        url = f"/v1/sessions/{first.opened.session_id}/rate"
        assert (await http.put(url, json={"point": "s2-r1"})).json()["pushed"]
        assert (await first.read()).set_point.point == "s2-r1"
        first.call.cancel()
        for _ in range(200):
            if not (await http.get(url.removesuffix("/rate"))).json()["connected"]:
                break
            await asyncio.sleep(0.02)
        assert not (await http.put(url, json={"auto": True})).json()["pushed"]
        second = await open_stream(cloud, tiny_bundle.bundle_id, token=first.opened.resume_token)
        told = (await second.read()).set_point
        assert (second.opened.point, told.point, "link was down" in told.reason) == ("", "", True)
        third = await open_stream(cloud, tiny_bundle.bundle_id, token=second.opened.resume_token)
        assert (await third.ask(frames.frame(1))).HasField("result")  # told once
