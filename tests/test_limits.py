"""What stops a server, and must not: silence, half requests, unread answers, abandoned calls, greed. Real sockets."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import h2.errors
import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.api.http_server import MOST_OF_ADDRESS, PATIENCE_S, listen
from bitneck_edge.client import EdgeClient
from bitneck_testing.authority import Authority
from bitneck_testing.http2 import BareClient
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import Frames, open_stream, stub

STALL_S = 2
CALLS = 40
"""That a connection may have open."""
HALF_A_REQUEST = (
    b"PUT /v1/rate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
)
WAIT_S = 30.0
"""Within this time, what must come true has come true on any machine."""


@pytest.fixture(scope="module")
def impatient(tiny_bundle: Bundle) -> Iterator[Server]:
    options = ("--stall-s", str(STALL_S), "--resume-s", "1", "--max-calls-per-connection", str(CALLS))
    with running_server(tiny_bundle.root, options=options) as server:
        yield server


def opening(bundle: Bundle) -> pb.ClientMessage:
    return pb.ClientMessage(open=pb.Open(bundle_id=bundle.bundle_id, client="attacker"))


async def answered(server: Server, bundle: Bundle, frames: Frames) -> bool:
    """A clean frame is answered."""
    async with stub(server.grpc) as cloud:
        stream = await open_stream(cloud, bundle.bundle_id)
        return bool((await stream.ask(frames.frame(1))).result.seq == 1)


def until(true: Any, seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def closed(connections: list[socket.socket]) -> int:
    """How many of them the other side has closed."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            while connection.recv(4096):
                pass
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


@contextlib.contextmanager
def many_connections(address: str, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port)), 10))
            with contextlib.suppress(OSError):
                connection.sendall(first)
            connections.append(connection)
        yield connections


# Connections


@pytest.mark.parametrize("first", [b"", b"GET /healthz HT", HALF_A_REQUEST])
async def test_silent_and_slow_http_connections_are_closed(
    impatient: Server, tiny_bundle: Bundle, frames: Frames, first: bytes
) -> None:
    with many_connections(impatient.http, 3 * MOST_OF_ADDRESS, first) as connections:
        until(lambda: closed(connections) >= 2 * MOST_OF_ADDRESS)
        elsewhere = httpx.AsyncHTTPTransport(local_address="127.0.0.9")
        async with httpx.AsyncClient(transport=elsewhere, timeout=WAIT_S) as http:  # another address is served
            assert (await http.get(impatient.http + "/v1/models")).status_code == 200
        assert await answered(impatient, tiny_bundle, frames)
        until(lambda: closed(connections) == len(connections), PATIENCE_S + WAIT_S)
    assert impatient.read_log().count("too many HTTP connections") <= 3  # summed, not one line each


def test_bytes_that_are_no_request_are_refused_and_summed(impatient: Server) -> None:
    before = len(impatient.read_log())
    for _ in range(50):
        with many_connections(impatient.http, 1, b"\x16\x03\x01 no request\r\n\r\n") as connections:
            until(lambda: closed(connections) == 1)
    log = impatient.read_log()[before:]
    assert log.count("no HTTP request") <= 2
    assert len(log.splitlines()) < 10


def test_a_silent_tls_handshake_ends(tiny_bundle: Bundle, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    with running_server(tiny_bundle.root, options=("--tls-cert", str(cert), "--tls-key", str(key))) as server:
        with many_connections(server.http, MOST_OF_ADDRESS + 5) as connections:
            until(lambda: closed(connections) >= 5)
            until(lambda: closed(connections) == len(connections), PATIENCE_S + WAIT_S)


def test_half_a_request_does_not_hold_up_the_end(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root) as server, many_connections(server.http, 8, HALF_A_REQUEST):
        time.sleep(0.5)
        assert server.stop() == 0  # within its 30 seconds


async def test_silent_grpc_connections_are_closed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=("--max-connections", "40")) as server:
        with many_connections(server.grpc, 60) as connections:
            until(lambda: closed(connections) >= 20)
            until(lambda: closed(connections) == len(connections))
            async with EdgeClient(server.grpc, cache_dir=tmp_path, connect_timeout_s=20.0) as client:
                assert (await client.infer(photo(1))).labels


def test_the_limit_of_open_files_is_raised_and_kept(tiny_bundle: Bundle) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with running_server(tiny_bundle.root) as server:
            limits = Path(f"/proc/{server.process.pid}/limits").read_text()
            (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
            assert line.split()[3] == str(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["localhost", "[::]"])
def test_http_listens_on_all_that_a_name_means(host: str) -> None:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)}
    if host == "[::]":
        if not socket.has_dualstack_ipv6():
            pytest.skip("this machine has no IPv6")
        addresses = {"127.0.0.1", "::1"}
    sockets = listen(Address.parse(f"{host}:0"))
    try:
        port = sockets[0].getsockname()[1]
        for address in addresses:
            socket.create_connection((address, port), 5).close()
        with pytest.raises(InvalidConfig, match="another server"):
            listen(Address.parse(f"{host}:{port}"))
    finally:
        for listener in sockets:
            listener.close()
    with pytest.raises(InvalidConfig, match="a name of this machine"):
        listen(Address.parse("no-such-name.invalid:0"))


# Calls


def test_a_connection_has_few_calls_open_at_a_time(impatient: Server) -> None:
    with BareClient(impatient.grpc, heeds_limit=False) as client:
        assert client.most_calls == CALLS
        calls = [client.call("Stream") for _ in range(CALLS + 1)]
        client.flush()
        assert client.status(calls[-1]) == f"reset {int(h2.errors.ErrorCodes.REFUSED_STREAM)}"


async def test_more_clients_than_calls_of_a_connection_share_a_process(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=("--max-calls-per-connection", "2")) as server:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(EdgeClient(server.grpc, cache_dir=tmp_path)) for _ in range(6)]
            assert all([await client.infer(photo()) for client in clients])


def test_a_stream_without_open_ends(impatient: Server) -> None:
    with BareClient(impatient.grpc) as client:
        stream = client.call("Stream")
        client.flush()
        assert client.status(stream) == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def test_an_opened_that_is_not_read_frees_its_session(impatient: Server, tiny_bundle: Bundle) -> None:
    with BareClient(impatient.grpc, window=0) as client:
        stream = client.call("Stream", opening(tiny_bundle))
        client.flush()
        until(lambda: len(sessions(impatient, "attacker")) == 1)
        until(lambda: not sessions(impatient, "attacker"))
        client.read_more(stream)
        client.flush()
        assert client.status(stream) == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def test_answers_that_are_not_read_end_the_stream(impatient: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    with BareClient(impatient.grpc, window=200) as client:  # enough for `Opened`
        stream = client.call("Stream", opening(tiny_bundle))
        for seq in range(1, 8):
            client.send(stream, pb.ClientMessage(frame=frames.frame(seq)))
        client.flush()
        until(lambda: any(s["frames_answered"] == 7 for s in sessions(impatient, "attacker")))
        until(lambda: not any(s["connected"] for s in sessions(impatient, "attacker")))


def sessions(server: Server, client: str) -> list[dict[str, Any]]:
    return [s for s in httpx.get(server.http + "/v1/sessions").json() if s["client"] == client]


def edge_file(bundle: Bundle) -> str:
    return next(path for path, entry in bundle.manifest.files.items() if entry.role != "cloud" and entry.size > 100)


def test_a_download_that_is_not_read_holds_nothing_open(impatient: Server, tiny_bundle: Bundle) -> None:
    request = pb.FetchFileRequest(bundle_id=tiny_bundle.bundle_id, path=edge_file(tiny_bundle))
    before = descriptors(impatient)
    with BareClient(impatient.grpc, window=0) as client:
        calls = [client.call("FetchFile", request, end=True) for _ in range(30)]
        client.flush()
        refused = str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert client.status(calls[-1]) == refused  # a caller has a bounded number of downloads
        assert descriptors(impatient) <= before + 3  # the connection, and what an event loop may open
        time.sleep(STALL_S + 0.5)
        client.read_more(calls[0])
        client.flush()
        assert client.status(calls[0]) == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


async def test_a_file_is_handed_out_in_parts(impatient: Server, tiny_bundle: Bundle) -> None:
    path = edge_file(tiny_bundle)
    whole = tiny_bundle.path(path).read_bytes()
    async with stub(impatient.grpc) as cloud:

        async def part(offset: int, length: int) -> bytes:
            request = pb.FetchFileRequest(bundle_id=tiny_bundle.bundle_id, path=path, offset=offset, length=length)
            return b"".join([chunk.data async for chunk in cloud.FetchFile(request)])

        assert await part(0, 0) == whole
        assert await part(10, 0) == whole[10:]
        assert await part(10, 50) == whole[10:60]
        assert await part(len(whole) - 5, 50) == whole[-5:]
        assert await part(len(whole), 0) == await part(2**63 + 5, 9) == await part(2**64 - 1, 2**64 - 1) == b""


def test_health_watches_are_bounded(impatient: Server) -> None:
    from grpc_health.v1 import health_pb2

    with BareClient(impatient.grpc) as client:
        calls = [
            client.call("Watch", health_pb2.HealthCheckRequest(), end=True, service="/grpc.health.v1.Health/")
            for _ in range(17)
        ]
        client.flush()
        assert client.status(calls[-1]) == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    until(lambda: httpx.get(impatient.http + "/readyz").status_code == 200)


async def test_calls_of_one_caller_are_bounded_and_another_gets_in(
    tiny_bundle: Bundle, tmp_path: Path, frames: Frames
) -> None:
    file = tmp_path / "devices.txt"
    file.write_text("greedy a-token-of-the-greedy\nmodest a-token-of-the-modest\n")
    options = ("--device-tokens", str(file), "--max-calls-per-caller", "10", "--max-sessions-per-caller", "6")
    greedy, modest = ((("authorization", f"Bearer a-token-of-the-{name}"),) for name in ("greedy", "modest"))
    with running_server(tiny_bundle.root, options=options) as server:
        async with stub(server.grpc) as cloud:
            statuses = []
            calls = []
            for _ in range(12):
                call = cloud.Stream(metadata=greedy)
                calls.append(call)
                await call.write(opening(tiny_bundle))
                try:
                    statuses.append((await call.read()).WhichOneof("message"))
                except grpc.aio.AioRpcError as exc:
                    statuses.append(exc.code().name)
            assert statuses == ["opened"] * 6 + ["RESOURCE_EXHAUSTED"] * 6
            idle = [cloud.Stream(metadata=greedy) for _ in range(6)]  # 12 calls, all without Open
            with pytest.raises(grpc.aio.AioRpcError, match="calls of this caller"):
                await asyncio.wait_for(idle[-1].read(), WAIT_S)
            call = cloud.Stream(metadata=modest)
            await call.write(opening(tiny_bundle))
            assert (await call.read()).HasField("opened")
            await call.write(pb.ClientMessage(frame=frames.frame(1)))
            assert (await call.read()).result.seq == 1


async def test_sessions_without_a_frame_give_way(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--max-sessions", "12")) as server:
        async with stub(server.grpc) as cloud:
            kept = await open_stream(cloud, tiny_bundle.bundle_id)
            answer = await kept.ask(frames.frame(1))
            kept.call.cancel()
            for _ in range(30):  # opened and abandoned
                stream = await open_stream(cloud, tiny_bundle.bundle_id)
                stream.call.cancel()
                until(lambda: not any(s["connected"] for s in httpx.get(server.http + "/v1/sessions").json()))
            again = await open_stream(cloud, tiny_bundle.bundle_id, token=kept.opened.resume_token)
            assert again.opened.session_id == kept.opened.session_id
            assert await again.ask(frames.frame(1)) == answer
            connected = [again] + [await open_stream(cloud, tiny_bundle.bundle_id) for _ in range(11)]
            with pytest.raises(grpc.aio.AioRpcError, match="12 sessions are open"):  # connected ones never give way
                await (await refused_stream(cloud, tiny_bundle)).read()
            assert len(connected) == 12


async def refused_stream(cloud: Any, bundle: Bundle) -> Any:
    call = cloud.Stream()
    await call.write(opening(bundle))
    return call


@pytest.mark.parametrize("single", [True, False])
async def test_frames_a_second_are_bounded_whatever_they_hold(
    tiny_bundle: Bundle, frames: Frames, single: bool
) -> None:
    with running_server(tiny_bundle.root, options=("--max-frames-per-s", "20")) as server:
        async with stub(server.grpc) as cloud:
            refused = 0
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            for seq in range(1, 61):
                frame = frames.frame(seq)
                if not single:
                    frame = pb.Frame(seq=seq, point=frame.point)  # empty, and its CRC is wrong
                    fault = (await stream.ask(frame)).fault
                    refused += fault.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                    continue
                call = cloud.Infer(pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frame))
                refused += (await call.code()) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 0 < refused < 45  # a burst of 20 passed, and those that the time allowed
            await asyncio.sleep(1.0)
            assert (await stream.ask(frames.frame(100))).result.seq == 100
