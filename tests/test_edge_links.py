"""The edge client on links that are slow, silent, cut, or gone; real servers, real sockets."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import ImageError, Unavailable
from bitneck_edge.answers.results import Answer, Failure, Switch
from bitneck_edge.client import EdgeClient
from bitneck_edge.sync import SyncEdgeClient
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server, start_server
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0
PHOTO = photo(3)


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root) as one:
        yield one


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "threads": 1, "connect_timeout_s": 1.0, "retries": -1} | values


def once(results: list[Answer | Failure], count: int) -> None:
    """Every frame was answered, and none twice."""
    answers = [r for r in results if isinstance(r, Answer)]
    assert len(answers) == len(results) == count
    assert sorted(a.seq for a in answers) == list(range(1, count + 1))


async def test_a_link_that_is_cut_again_and_again(server: Server, tmp_path: Path) -> None:
    results = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **settings(tmp_path)) as client,
    ):
        async for result in client.stream([PHOTO] * 120):
            results.append(result)
            if len(results) % 30 == 0:
                link.cut()
                asyncio.get_running_loop().call_later(0.3, link.mend)
        assert client.reconnects >= 3
    once(results, 120)


async def test_a_half_open_connection(server: Server, tmp_path: Path) -> None:
    """Nothing comes, and nothing says why: an overdue answer ends the connection, and the session goes on."""
    results = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **settings(tmp_path, answer_timeout_s=0.5)) as client,
    ):
        async for result in client.stream([PHOTO] * 40):
            results.append(result)
            if len(results) == 10:
                link.silence()
                asyncio.get_running_loop().call_later(1.5, link.mend)
        assert client.reconnects >= 1
    once(results, 40)


async def test_the_clock_jumps(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the picture's date is the wall clock's; nothing else may believe it."""
    real, results = time.time, []
    async with asyncio.timeout(HANG_S), EdgeClient(server.grpc, **settings(tmp_path, point="auto")) as client:
        async for result in client.stream([PHOTO] * 30):
            results.append(result)
            jump = (-86_400, 86_400)[len(results) % 2]
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
    once(results, 30)
    for answer in results:
        assert isinstance(answer, Answer)
        assert all(0 <= ms < HANG_S * 1e3 for ms in asdict(answer.ms).values())


async def test_a_rate_asked_of_new_sessions_ends_automatic_rate_and_says_so(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(tiny_bundle.root) as server:
        async with httpx.AsyncClient(base_url=server.http) as http:
            (await http.put("/v1/rate", json={"point": "s1-r1"})).raise_for_status()
            async with EdgeClient(server.grpc, **settings(tmp_path, point="auto")) as client:
                answer = await client.infer(PHOTO)
                assert (answer.point, client.auto) == ("s1-r1", False)
            assert "the cloud asks new sessions for s1-r1" in caplog.text
            (await http.put("/v1/rate", json={"auto": True})).raise_for_status()
        async with EdgeClient(server.grpc, **settings(tmp_path, point="auto")) as client:
            await client.infer(PHOTO)
            assert client.auto


async def test_automatic_rate_steps_down_and_up(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    switches: list[Switch] = []
    used: list[str] = []

    async def camera() -> AsyncIterator[Any]:
        for _ in range(45):
            yield PHOTO
            await asyncio.sleep(0.1)

    caplog.set_level(logging.INFO, logger="bitneck_edge")
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(
            link.address, on_switch=switches.append, **settings(tmp_path, point="auto", latency_ms=400)
        ) as client,
    ):
        assert client.auto
        async for result in client.stream(camera(), newest_first=True):
            assert isinstance(result, Answer)
            used.append(result.point)
            if len(used) == 15:
                link.bits_per_s = 4000.0
    best = client.encoder.ladder.best.id
    assert best in used[:15]  # climbed
    assert used[-1] == "s1-r1"  # 4 kbit/s carry nothing more within 400 ms
    assert switches
    assert all(s.reason for s in switches)
    assert any("->" in record.getMessage() for record in caplog.records)


async def test_the_newest_picture_goes_first(server: Server, tmp_path: Path) -> None:
    async def camera() -> AsyncIterator[Any]:
        for _ in range(100):
            yield PHOTO
            await asyncio.sleep(0.005)

    results = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **settings(tmp_path)) as client,
    ):
        link.bits_per_s = 20_000
        async for result in client.stream(camera(), newest_first=True):
            results.append(result)
        assert client.dropped + len(results) == 100
        assert client.dropped > 20
    once(results, len(results))
    waits = sorted(r.ms.wait for r in results if isinstance(r, Answer))
    assert waits[len(waits) // 2] < 1000  # what is sent is fresh


async def test_a_bundle_over_a_thin_link(server: Server, tmp_path: Path) -> None:
    """Manifest and files take far longer than a connection may."""
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc, bits_per_s=40_000) as link,
        EdgeClient(link.address, **settings(tmp_path, connect_timeout_s=0.3, retries=0)) as client,
    ):
        assert (await client.infer(PHOTO)).labels


async def test_results_as_they_come(server: Server, tmp_path: Path) -> None:
    async with asyncio.timeout(HANG_S), EdgeClient(server.grpc, **settings(tmp_path)) as client:
        results = [r async for r in client.stream([PHOTO] * 50, ordered=False)]
    once(results, 50)


async def test_a_start_without_the_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The bundle is in the cache from last time: the head is loaded, and the frames go out when the server is there."""
    first = start_server(tiny_bundle.root)
    async with EdgeClient(first.grpc, **settings(tmp_path)) as client:
        await client.infer(PHOTO)
    first.kill()

    again: list[Server] = []

    def restart() -> None:
        time.sleep(1.0)
        again.append(start_server(tiny_bundle.root, grpc=first.grpc))

    starting = threading.Thread(target=restart)
    starting.start()
    try:
        async with asyncio.timeout(HANG_S), EdgeClient(first.grpc, **settings(tmp_path)) as client:
            once([r async for r in client.stream([PHOTO] * 5)], 5)
    finally:
        await asyncio.to_thread(starting.join)
        assert again[0].stop() == 0
        for one in (first, again[0]):
            assert one.process.stdout is not None
            one.process.stdout.close()
            one.log.close()


async def test_a_server_that_comes_back_with_another_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The client fetches that one and goes on; the frames of before are encoded again."""
    other = make_tiny_bundle(tmp_path / "other", seed=7)
    assert other.bundle_id != tiny_bundle.bundle_id
    servers = [start_server(tiny_bundle.root)]
    results = []
    try:
        async with asyncio.timeout(HANG_S), EdgeClient(servers[0].grpc, **settings(tmp_path)) as client:
            async for result in client.stream([PHOTO] * 30):
                results.append(result)
                if len(results) == 10:
                    await asyncio.to_thread(servers[0].kill)
                    servers.append(await asyncio.to_thread(start_server, other.root, grpc=servers[0].grpc))
            assert client.bundle.bundle_id == other.bundle_id
        assert all(isinstance(r, Answer) for r in results)
        assert len(results) == 30
    finally:
        servers[-1].stop()
        for one in servers:
            assert one.process.stdout is not None
            one.process.stdout.close()
            one.log.close()


def test_the_client_without_async(server: Server, tmp_path: Path) -> None:
    with SyncEdgeClient(server.grpc, **settings(tmp_path, point="s1-r1")) as client:
        assert client.infer(PHOTO).point == "s1-r1"
        client.point = "s1-r2"
        results = list(client.stream([PHOTO, tmp_path / "missing.jpg", PHOTO]))
        assert [type(r) for r in results] == [Answer, Failure, Answer]
        assert client.session_id
        early = client.stream([PHOTO] * 20)
        assert isinstance(next(early), Answer)
        early.close()  # type: ignore[attr-defined]
        with pytest.raises(ImageError):
            client.infer(tmp_path / "missing.jpg")
    with pytest.raises(Unavailable, match="not open"):
        client.infer(PHOTO)


def test_calls_of_other_threads_end_when_the_client_is_closed(server: Server, tmp_path: Path) -> None:
    ended: list[BaseException] = []

    def ask(client: SyncEdgeClient) -> None:
        try:
            while True:
                client.infer(PHOTO)
        except BaseException as exc:  # noqa: BLE001  a cancelled call would be one too
            ended.append(exc)

    for _ in range(5):
        with SyncEdgeClient(server.grpc, **settings(tmp_path, point="s1-r1")) as client:
            threads = [threading.Thread(target=ask, args=(client,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.1)
            closer = threading.Thread(target=client.close)
            closer.start()
        for thread in (*threads, closer):
            thread.join(20)
            assert not thread.is_alive()
    assert [type(exc) for exc in ended] == [Unavailable] * 20


def test_the_client_without_async_and_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(Unavailable), SyncEdgeClient("127.0.0.1:9", **settings(tmp_path, retries=0)):
        pass


def test_a_real_shaped_link(tiny_bundle: Bundle) -> None:
    """Two network namespaces with a token bucket between them, where the machine allows."""
    script = Path(__file__).parent.parent / "benchmarks" / "shaped.py"
    command = [sys.executable, script, "--bundle", tiny_bundle.root, "--json", "--seconds", "6", "--policy", "auto"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=HANG_S, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["auto"]
    assert result["failed"] == 0
    assert result["answered"] + result["dropped"] == 30
    assert 100 < result["overhead_bytes"] < 400
