"""What an operator relies on: TLS and tokens, reload, metrics, logs, draining, replicas. Real servers, real sockets."""

import asyncio
import contextlib
import json
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, Unauthenticated, Unavailable
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.client import EdgeClient
from bitneck_testing.authority import Authority
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN, Server, running_server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "good")


def edge(server: Server, cache: Path, **values: Any) -> EdgeClient:
    return EdgeClient(server.grpc, cache_dir=cache, retries=0, connect_timeout_s=3.0, **values)


async def test_mutual_tls_lets_in_whom_it_should(authority: Authority, tiny_bundle: Bundle, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    device, device_key = authority.issue("device")
    expired, expired_key = authority.issue("expired", days=-1.0)
    stranger, stranger_key = Authority(tmp_path / "other").issue("device")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca))
    with running_server(tiny_bundle.root, options=options) as server:
        async with edge(server, tmp_path / "cache", tls_ca=authority.ca, tls_cert=device, tls_key=device_key) as client:
            assert (await client.infer(photo(1))).labels
        refused: list[dict[str, Any]] = [
            {},  # no TLS at all
            {"tls_ca": authority.ca},  # no certificate
            {"tls_ca": authority.ca, "tls_cert": expired, "tls_key": expired_key},
            {"tls_ca": authority.ca, "tls_cert": stranger, "tls_key": stranger_key},
            {"tls_ca": tmp_path / "other" / "ca.pem", "tls_cert": device, "tls_key": device_key},  # not its server
        ]
        for values in refused:
            with pytest.raises(Unavailable):
                async with edge(server, tmp_path / "cache", **values):
                    pass
        with pytest.raises(InvalidConfig, match="tls_key"):  # a key of another certificate
            async with edge(server, tmp_path / "c", tls_ca=authority.ca, tls_cert=device, tls_key=expired_key):
                pass
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=authority.ca)) as http:
            assert (await http.get(server.http.replace("http:", "https:") + "/readyz")).status_code == 200
        async with edge(server, tmp_path / "cache", tls_ca=authority.ca, tls_cert=device, tls_key=device_key) as client:
            assert (await client.infer(photo(1))).labels  # the others harmed nothing


async def test_an_expired_server_is_refused_by_the_edge(
    authority: Authority, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cert, key = authority.issue("old-server", days=-1.0)
    with running_server(tiny_bundle.root, options=("--tls-cert", str(cert), "--tls-key", str(key))) as server:
        with pytest.raises(Unavailable):
            async with edge(server, tmp_path / "cache", tls_ca=authority.ca):
                pass


async def test_devices_and_control_have_tokens_of_their_own(tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = ("--device-token", "for-devices-only", "--http-token", "for-control-only")
    with running_server(tiny_bundle.root, options=options) as server:
        for token in (None, "for-control-only", "for-device"):
            with pytest.raises(Unauthenticated, match="bearer token"):
                async with edge(server, tmp_path / "cache", token=token):
                    pass
        async with stub(server.grpc) as cloud:
            for call in (
                cloud.GetManifest(pb.GetManifestRequest()),
                cloud.Infer(pb.InferRequest()),
                cloud.FetchFile(pb.FetchFileRequest()).read(),
                cloud.Stream().read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with grpc.aio.insecure_channel(server.grpc) as channel:  # nothing is parsed for a stranger
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/bitneck.v2.SplitInference/Infer")(b"\xff\xff")
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with edge(server, tmp_path / "cache", token="for-devices-only") as client:
            assert (await client.infer(photo(1))).labels
        async with httpx.AsyncClient(base_url=server.http) as http:
            for path in ("/v1/sessions", "/metrics", "/v2", "/v2/models/tiny"):
                assert (await http.get(path)).status_code == 401
                wrong = await http.get(path, headers={"Authorization": "Bearer for-devices-only"})
                assert wrong.status_code == 401
                right = await http.get(path, headers={"Authorization": "Bearer for-control-only"})
                assert right.status_code == 200
            for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
                assert (await http.get(path)).status_code == 200
        assert "for-devices-only" not in server.read_log()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tls-cert", "server.pem"), "tls_cert and tls_key go together"),
        (("--tls-client-ca", "ca.pem"), "need TLS"),
        (("--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"), "tls_cert"),
        (("--provider", "NoSuchExecutionProvider"), "CPUExecutionProvider"),
        (("--log-format", "xml"), "'xml' is not one of 'text'"),
    ],
)
def test_settings_that_are_refused(tiny_bundle: Bundle, options: tuple[str, ...], text: str) -> None:
    command = [BIN / "bitneck-cloud", "serve", "--bundle", tiny_bundle.root, "--grpc", "127.0.0.1:0"]
    done = subprocess.run([*command, "--http", "127.0.0.1:0", *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def samples(text: str) -> dict[str, float]:
    """Sample values by name and labels; reading them also proves that the text is well-formed."""
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def test_metrics_and_request_ids(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--log-format", "json")) as server:
        async with httpx.AsyncClient(base_url=server.http) as http, stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id, client="a secret camera")
            for seq in range(1, 9):
                point = "s1-r1" if seq > 4 else "s1-r2"
                answer = await stream.ask(frames.frame(seq, point))
                assert answer.result.timings.batch == 1
            bad = frames.frame(9)
            bad.crc32c ^= 1
            assert (await stream.ask(bad)).HasField("fault")
            reply = await http.get("/metrics", headers={"x-request-id": "mine.1"})
            assert reply.headers["x-request-id"] == "mine.1"
            odd = await http.get("/metrics", headers={"x-request-id": "not well-formed"})
            assert len(odd.headers["x-request-id"]) == 16
            found = samples(reply.text)
            openmetrics = await http.get("/metrics", headers={"Accept": "application/openmetrics-text"})
            assert openmetrics.text.endswith("# EOF\n")
            call = cloud.GetManifest(pb.GetManifestRequest(), metadata=(("x-request-id", "mine-2"),))
            await call
            assert ("x-request-id", "mine-2") in [(k, v) for k, v in await call.initial_metadata()]
        model = ("model", "tiny")
        assert found[f"bitneck_frames_total{[model, ('outcome', 'OK')]}"] == 8
        assert found[f"bitneck_frames_total{[model, ('outcome', 'DATA_LOSS')]}"] == 1
        assert found[f"bitneck_point_frames_total{[model, ('point', 's1-r1')]}"] == 4
        assert found[f"bitneck_point_switches_total{[model]}"] == 1
        assert found[f"bitneck_queue_wait_seconds_count{[model]}"] == 8
        assert found[f"bitneck_batch_frames_sum{[model]}"] == 8
        assert found[f"bitneck_sessions_total{[('how', 'new'), model]}"] == 1
        assert found["bitneck_streams[]"] == found["bitneck_open_sessions[]"] == found["bitneck_ready[]"] == 1
        assert "camera" not in reply.text
        assert stream.opened.session_id not in reply.text
        lines = [json.loads(line) for line in server.read_log().splitlines()]
        opened = next(line for line in lines if stream.opened.session_id in line["message"])
        assert opened["level"] == "INFO"
        assert len(opened["request_id"]) == 16


async def test_reload_swaps_while_frames_flow(own_tiny_bundle: Bundle, tmp_path: Path) -> None:
    old, frames = own_tiny_bundle, Frames(own_tiny_bundle)
    payload = frames.frame(1).payload
    with running_server(old.root) as server:
        async with httpx.AsyncClient(base_url=server.http) as http, stub(server.grpc) as cloud:
            unchanged = (await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})).json()
            assert (unchanged["changed"], unchanged["bundle_id"]) == (False, old.bundle_id)
            stream = await open_stream(cloud, old.bundle_id)
            stop, outcomes = asyncio.Event(), []

            async def flow() -> None:
                seq = 0
                while not stop.is_set():
                    seq += 1
                    answer = await stream.ask(frames.frame(seq, ("s1-r1", "s1-r2", "s2-r1")[seq % 3]))
                    outcomes.append(answer.WhichOneof("message"))

            flowing = asyncio.create_task(flow())
            new = make_tiny_bundle(old.root, drop_points=("s2-r1",))
            reply = await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})
            assert reply.status_code == 200, reply.text
            changed = reply.json()
            assert (changed["changed"], changed["bundle_id"]) == (True, new.bundle_id)
            assert (changed["removed"], changed["added"], changed["files_loaded"]) == (["s2-r1"], [], 0)
            await asyncio.sleep(0.2)
            stop.set()
            await flowing
            assert set(outcomes) == {"result"}  # the point that is gone still serves the stream that began with it
            assert (await cloud.GetManifest(pb.GetManifestRequest())).bundle_id == new.bundle_id
            fresh = await open_stream(cloud, new.bundle_id)
            assert (await fresh.ask(Frames(new).frame(1, "s1-r2"))).HasField("result")
            gone = await fresh.ask(frames.frame(2, "s1-r2", seed=3))
            assert gone.HasField("result")
            missing = frames.frame(3, "s1-r2")
            missing.point = "s2-r1"
            assert (await fresh.ask(missing)).HasField("fault")
            # a manifest from just before the swap is still welcome, its files are not there any more
            assert (await open_stream(cloud, old.bundle_id)).opened.window > 0
            with pytest.raises(grpc.aio.AioRpcError):
                await cloud.FetchFile(pb.FetchFileRequest(bundle_id=old.bundle_id, path="labels.json")).read()

            # a bundle that breaks: the running one goes on
            victim = new.root / "units" / "s1-r1" / "decoder.onnx"
            good = victim.read_bytes()
            victim.write_bytes(good[:-1])
            broken = await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})
            assert (broken.status_code, broken.json()["title"]) == (500, "BundleCorrupt")
            shutil.rmtree(new.root / "points")
            assert (await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})).status_code == 500
            make_tiny_bundle(new.root, name="other")
            assert (await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})).status_code == 400
            assert (await fresh.ask(frames.frame(4, "s1-r1"))).HasField("result")
            found = samples((await http.get("/metrics")).text)
        assert found[f"bitneck_reloads_total{[('model', 'tiny'), ('outcome', 'ok')]}"] == 1
        assert found[f"bitneck_reloads_total{[('model', 'tiny'), ('outcome', 'failed')]}"] == 3
    assert payload


async def test_a_silent_stream_ends_and_its_session_can_be_resumed(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--idle-s", "1.5")) as server:
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            assert (await stream.ask(frames.frame(1))).HasField("result")
            assert "no message" in (await stream.read()).go_away.reason
            assert await stream.call.read() is grpc.aio.EOF
            again = await open_stream(cloud, tiny_bundle.bundle_id, token=stream.opened.resume_token)
            assert again.opened.session_id == stream.opened.session_id
            assert (await again.ask(frames.frame(2))).HasField("result")


async def test_an_idle_edge_stays_of_use(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=("--idle-s", "1.1")) as server:
        async with EdgeClient(server.grpc, cache_dir=tmp_path, retries=1, point="s1-r2") as client:
            first = await client.infer(photo(1))
            await asyncio.sleep(5)  # sent away three times or more, one retry allowed
            assert client.reconnects >= 2
            assert (await client.infer(photo(1))).labels == first.labels


async def test_a_session_that_sends_too_much_is_refused_frame_by_frame(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--max-bytes-per-s", "1")) as server:
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            frame = frames.frame(1)
            answer = await stream.ask(frame)
            assert answer.HasField("result")  # within the burst of 64 KiB


async def test_draining_is_announced_before_it_begins(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--drain-delay-s", "4.0")) as server:
        async with httpx.AsyncClient(base_url=server.http) as http, stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.get("/healthz")).status_code == 200
            late = await open_stream(cloud, tiny_bundle.bundle_id)  # the balancer has not noticed yet
            assert (await late.ask(frames.frame(1))).HasField("result")
            assert (await stream.ask(frames.frame(1))).HasField("result")
            assert (await stream.read()).HasField("go_away")
            assert (await late.read()).HasField("go_away")
            assert (await late.ask(frames.frame(2))).HasField("result")  # until the drain is over
            await stream.call.done_writing()
            await late.call.done_writing()
        assert server.process.wait(20) == 0


def test_bodies_of_the_control_api_are_bounded(tiny_bundle: Bundle) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    bearer = {"Authorization": "Bearer a-secret-of-sixteen"}
    with running_server(tiny_bundle.root, options=("--http-token", "a-secret-of-sixteen")) as server:
        large = httpx.put(f"{server.http}/v1/rate", content=b" " * 1_000_000)
        assert (large.status_code, large.headers["content-type"]) == (413, "application/problem+json")
        with contextlib.suppress(httpx.HTTPError):  # the answer may come before the body is sent
            assert httpx.put(f"{server.http}/v1/rate", content=pieces()).status_code == 411
        right = httpx.put(f"{server.http}/v1/rate", json={"auto": True}, headers=bearer)
        assert right.status_code == 200


def test_an_encrypted_key_is_refused_and_not_asked_about(
    authority: Authority, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cert, key = authority.issue("encrypted")
    locked = tmp_path / "locked.key"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a passphrase"),
        )
    )
    command = [BIN / "bitneck-cloud", "serve", "--bundle", tiny_bundle.root, "--tls-cert", cert, "--tls-key", locked]
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    done = subprocess.run([*command, *addresses], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "passphrase" in done.stderr


def test_open_inference_paths(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root) as server:
        assert httpx.get(f"{server.http}/v2").json()["name"] == "bitneck"
        model = httpx.get(f"{server.http}/v2/models/tiny").json()
        assert model["versions"] == [tiny_bundle.bundle_id]
        assert model["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1, 10]}]
        assert httpx.get(f"{server.http}/v2/models/tiny/ready").json() == {"ready": True}
        version = httpx.get(f"{server.http}/v2/models/tiny/versions/{tiny_bundle.bundle_id}")
        assert version.json() == model
        assert httpx.get(f"{server.http}/v2/models/nope").status_code == 404


async def test_a_replica_takes_over_from_one_that_is_killed(tiny_bundle: Bundle, frames: Frames) -> None:
    """Without a balancer; the client's address changes instead."""
    config = tiny_bundle.root.parent / "replica.toml"
    config.write_text('token_key = "a shared key of some length"\n')
    key = ("--config", str(config))
    with running_server(tiny_bundle.root, options=key) as one, running_server(tiny_bundle.root, options=key) as two:
        async with stub(one.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            first = await stream.ask(frames.frame(1))
            one.kill()
        async with stub(two.grpc) as cloud:
            moved = await open_stream(cloud, tiny_bundle.bundle_id, token=stream.opened.resume_token)
            assert moved.opened.session_id == stream.opened.session_id
            again = await moved.ask(frames.frame(1))
            assert again.result.output == first.result.output
        async with httpx.AsyncClient(base_url=two.http) as http:
            found = samples((await http.get("/metrics")).text)
        assert found[f"bitneck_sessions_total{[('how', 'adopted'), ('model', 'tiny')]}"] == 1


def test_a_key_that_is_too_short_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "cloud.toml"
    config.write_text('token_key = "short"\n')
    command = [BIN / "bitneck-cloud", "serve", "--bundle", tiny_bundle.root, "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "token_key" in done.stderr
    assert "short'" not in done.stderr


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """An OpenTelemetry collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_frames_are_traced(tiny_bundle: Bundle, frames: Frames) -> None:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = ("--traces", f"http://127.0.0.1:{port}", "--trace-ratio", "0")
    with running_server(tiny_bundle.root, options=options) as own:
        async with stub(own.grpc) as cloud:
            request = pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frames.frame(7))
            await cloud.Infer(request)  # nobody traces it
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            await cloud.Infer(request, metadata=(("traceparent", parent),))
        await asyncio.to_thread(own.stop)  # what waits is sent
    await server.stop(None)
    assert sorted(span.name for span in collector.spans) == ["compute", "decode", "frame", "wait"]
    (frame,) = [span for span in collector.spans if span.name == "frame"]
    assert frame.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert frame.parent_span_id.hex() == "b7ad6b7169203331"
    assert {a.key: a.value.string_value for a in frame.attributes}["bitneck.point"] == "s1-r2"
    assert all(span.parent_span_id == frame.span_id for span in collector.spans if span is not frame)
