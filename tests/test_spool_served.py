"""The spool between real devices and real servers: outages, restarts of both, other bundles, thin rates."""

import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import Unavailable
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.devices.spooling import DeviceLog, captured_us, device_command
from bitneck_testing.devices.streaming import until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, edge, edge_run, free_port, running_server, start_server
from bitneck_testing.tiny_bundles import make_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent
HANG_S = 120.0
LOSS_S = 1.0
"""What is promised, from the moment in which a picture is encoded."""
LATE_S = 10.0
"""A busy machine may keep a device from running at all for so long."""
KILLS, ENCODED, ENCODERS = 3, 8, 2


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle, scene_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root, scene_bundle.root) as one:
        yield one


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    folder = {"cache_dir": tmp_path / "cache", "spool": tmp_path / "spool", "spool_age": 1e5}
    return folder | {"model": "tiny", "threads": 1, "connect_timeout_s": 1.0} | values


def capture(number: int) -> Capture:
    return Capture(photo(number % 4), f"camera#{number}", unix_us=captured_us(number))


async def captures(first: int, count: int, pause_s: float = 0.0) -> AsyncIterator[Capture]:
    for number in range(first, first + count):
        yield capture(number)
        await asyncio.sleep(pause_s)


def numbers(results: list[Answer | Failure]) -> list[int]:
    assert all(isinstance(each, Answer) for each in results), results
    return [int(each.file.partition("#")[2]) for each in results]


def check_spooled(results: list[Answer | Failure], spool_id: str) -> None:
    """The answers of spooled frames say which frames they are of."""
    for each in results:
        assert isinstance(each, Answer)
        assert each.captured_unix_us == captured_us(int(each.file.partition("#")[2]))
        assert each.spool == spool_id
    seqs = [each.seq for each in results if isinstance(each, Answer)]
    assert len(seqs) == len(set(seqs))


async def test_a_cut_link(server: Server, tmp_path: Path) -> None:
    """While it is cut, frames are kept. When it is back, each is answered once, and live frames come first."""
    spooled: list[Answer | Failure] = []
    live: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **settings(tmp_path), on_spooled=spooled.append) as client,
    ):
        live += [each async for each in client.stream(captures(0, 10))]
        assert numbers(live) == list(range(10))
        link.cut()
        gone = [each async for each in client.stream(captures(10, 400))]
        assert numbers(gone) == []
        assert client.spool is not None
        assert (client.spool.kept, client.spool.spooled, client.spool.dropped) == (400, 400, 0)
        with pytest.raises(Unavailable, match="in the spool"):
            await client.infer(capture(410))
        link.mend()
        await until(lambda: client._opened().link.up)
        done = len(spooled)
        back = [await client.infer(capture(411 + k)) for k in range(3)]
        assert all(not each.spool for each in back)
        assert len(spooled) - done < 300, "live frames do not wait for the spool"
        await client.drain(asyncio.Event())
        await client.drain(asyncio.Event())
        assert client.spool.sent == 401
        assert client.spool.kept == 0
        assert sorted(numbers(spooled)) == list(range(10, 411))
        check_spooled(spooled, client.spool_id)
        later = [each for each in numbers(spooled) if each > 30]
        assert later == sorted(later), "in order, but for those that were out when the link was cut"


async def test_a_silent_link(server: Server, tmp_path: Path) -> None:
    """Nothing says that the link is gone: frames that are out are on the disk within a second all the same."""
    spooled: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **settings(tmp_path, answer_timeout_s=3.0), on_spooled=spooled.append) as client,
    ):
        assert client.spool is not None
        await client.infer(capture(0))
        link.silence()
        stream = asyncio.create_task(_all(client, captures(1, 30, 0.05)))
        await until(lambda: client.spool is not None and client.spool.kept >= 5)
        live = await stream
        link.mend()
        await until(lambda: len(live) + len(spooled) == 30)
        assert sorted(numbers(live + spooled)) == list(range(1, 31))
        await client.drain(asyncio.Event())
        await until(lambda: client.spool is not None and not client.spool.kept)


async def _all(client: EdgeClient, source: AsyncIterator[Capture]) -> list[Answer | Failure]:
    return [each async for each in client.stream(source)]


async def test_the_server_is_killed_while_the_spool_is_sent(tiny_bundle: Bundle, tmp_path: Path) -> None:
    spooled: list[Answer | Failure] = []
    address = f"127.0.0.1:{free_port()}"
    first = start_server(tiny_bundle.root, grpc=address)
    second: Server | None = None
    try:
        async with (
            asyncio.timeout(HANG_S),
            EdgeClient(address, **settings(tmp_path, spool_kbps=200.0), on_spooled=spooled.append) as client,
        ):
            await client.infer(capture(0))
            first.kill()
            assert [each async for each in client.stream(captures(1, 300))] == []
            second = await asyncio.to_thread(start_server, tiny_bundle.root, grpc=address)
            await until(lambda: len(spooled) > 20)
            second.kill()
            second.close()
            assert len(spooled) < 300
            second = await asyncio.to_thread(start_server, tiny_bundle.root, grpc=address)
            await until(lambda: len(spooled) >= 300)
            assert sorted(numbers(spooled)) == list(range(1, 301))
            check_spooled(spooled, client.spool_id)
            sessions = (await asyncio.to_thread(httpx.get, f"{second.http}/v1/sessions")).json()
            assert {each["spool"] for each in sessions} <= {client.spool_id, None}
            session = next(each for each in sessions if each["spool"])
            url = f"{second.http}/v1/sessions/{session['id']}/rate"
            refused = await asyncio.to_thread(httpx.put, url, json={"point": "s1-r1"})
            assert refused.status_code == 400
            assert "spool" in refused.json()["detail"]
    finally:
        for each in (first, second):
            if each is not None:
                each.close()


def test_a_device_that_is_killed_again_and_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """No server is there, also when the device starts. What it encoded a second before a kill is answered once."""
    dice = random.Random(3)
    log = DeviceLog()
    with running_server(tiny_bundle.root) as server:
        first = subprocess.run(
            device_command(server.grpc, tmp_path, "--count", 4), stdout=subprocess.PIPE, text=True, check=True
        )
        address = server.grpc
    log.read(first.stdout.splitlines())
    safe, killed_early = set(log.captured), set[int]()
    for turn in range(KILLS):
        began = 1000 * (turn + 1)
        with subprocess.Popen(
            device_command(address, tmp_path, "--first", began, "--count", 900, "--connect-timeout", 0.3),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            while len(log.encoded) < len(safe | killed_early) + ENCODED:
                line = child.stdout.readline()
                assert line, "the device ended"
                log.read([line])
            time.sleep(dice.uniform(LOSS_S, LOSS_S + 0.5))
            killed = time.time()
            child.kill()
            log.read(child.stdout.read().splitlines())
        assert log.alive > killed - LATE_S
        safe |= {number for number in log.encoded_before(LOSS_S) if number >= began}  # kills before may have lost some
        killed_early = set(log.encoded) - safe
        waiting = {number for number in log.captured if number >= began} - set(log.encoded)
        assert len(waiting) <= ENCODERS, "no picture waits for more than its encoding"
    with running_server(tiny_bundle.root, grpc=address):
        last = subprocess.run(
            device_command(address, tmp_path, "--wait"), stdout=subprocess.PIPE, text=True, check=True, timeout=HANG_S
        )
    log.read(last.stdout.splitlines())
    assert len(safe) >= KILLS * ENCODED
    assert not log.failures
    assert safe <= set(log.answers)
    assert set(log.answers) <= set(log.captured)
    assert max(log.answers.values()) == 1
    assert log.wrong_times == 0
    assert log.counts["kept"] == log.counts["dropped"] == 0


def test_the_command(server: Server, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Frames of photographs that no server was there for are answered by a later run, marked, with their time."""
    paths = [tmp_path / f"{k}.jpg" for k in range(3)]
    for k, path in enumerate(paths):
        photo(k).save(path)
    cache, options = tmp_path / "cache", ("--model", "tiny", "--spool", tmp_path / "spool", "--connect-timeout-s", 1)
    address = f"127.0.0.1:{free_port()}"
    with running_server(tiny_bundle.root, grpc=address):
        assert edge(*edge_run(address, cache, *options, "--json", paths[0])[1:]).returncode == 0
    before = time.time()
    away = edge(*edge_run(address, cache, *options, "--json", *paths)[1:])
    assert away.returncode == 0, away.stderr
    document = json.loads(away.stdout)
    assert document["frames"] == []
    counts = document["summary"]["spool"]
    assert (counts["spooled"], counts["kept"], counts["sent"]) == (3, 3, 0)
    with running_server(tiny_bundle.root, grpc=address):
        back = edge(*edge_run(address, cache, *options, "--json-lines", paths[0])[1:])
    assert back.returncode == 0, back.stderr
    *answers, summary = [json.loads(line) for line in back.stdout.splitlines()]
    spooled = [each for each in answers if each.get("spooled")]
    assert [each["file"] for each in spooled] == [str(path) for path in paths]
    assert [each["seq"] for each in spooled] == [1, 2, 3]
    assert all(each["labels"] and each["spool"] == counts["id"] for each in spooled)
    for each in spooled:
        assert each["captured"].endswith("Z")
        assert before - 1 < _seconds(each["captured"]) < before + 60
    assert summary["summary"]["spool"]["sent"] == 3
    assert summary["summary"]["spool"]["kept"] == 0
    assert summary["summary"]["frames"] == 1


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_the_python_of_the_page_runs(server: Server, tmp_path: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "spool.md").read_text(), re.DOTALL)[0]
    photo(0).save(tmp_path / "photo.jpg")
    text = block.replace('"127.0.0.1:50051"', f'"{server.grpc}", model="tiny", cache_dir="cache"')
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SpoolCounts(spooled=0" in done.stdout


async def test_frames_of_a_bundle_that_the_server_had(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A server that keeps no earlier bundles does not lose the frames: they stay, are counted, and asked for seldom."""
    folder, earlier, address = tmp_path / "served", tmp_path / "earlier", f"127.0.0.1:{free_port()}"
    shutil.copytree(tiny_bundle.root, folder)
    other = make_tiny_bundle(tmp_path / "other", seed=1).root
    spooled: list[Answer | Failure] = []
    async with asyncio.timeout(HANG_S):
        with running_server(folder, grpc=address, options=("--earlier", str(earlier))):
            async with EdgeClient(address, **settings(tmp_path)) as client:
                await client.infer(capture(0))
        async with EdgeClient(address, **settings(tmp_path), on_spooled=spooled.append) as client:
            assert [each async for each in client.stream(captures(1, 30))] == []
            before = client.bundle.bundle_id
            with running_server(other, grpc=address) as strange:
                await until(lambda: client.spool is not None and client.spool.unknown == 30)
                await until(lambda: client.bundle.bundle_id != before and client._opened().link.up)
                live = await client.infer(capture(99))
                assert not live.spool
                await asyncio.sleep(1.0)
                assert client.spool is not None
                assert (client.spool.kept, client.spool.sent, client.spool.dropped) == (30, 0, 0)
                assert strange.read_log().count("session begin") <= 2
        with running_server(other, grpc=address, options=("--earlier", str(earlier))) as knowing:
            async with EdgeClient(address, **settings(tmp_path), on_spooled=spooled.append) as client:
                await until(lambda: len(spooled) == 30)
                assert numbers(spooled) == list(range(1, 31))
                check_spooled(spooled, client.spool_id)
                url, headers = f"{knowing.http}/v1/models/tiny/reload", {"X-Bitneck-Request": "1"}
                reloaded = await asyncio.to_thread(httpx.post, url, headers=headers)
                assert reloaded.json()["changed"] is False
        assert len(list((earlier / "tiny").iterdir())) == 2


async def test_the_rate_that_is_asked_reaches_the_spool(server: Server, tmp_path: Path) -> None:
    async with asyncio.timeout(HANG_S), EdgeClient(server.grpc, **settings(tmp_path)) as client:
        await client.infer(capture(0))
        link = client._opened().link
        assert link.max_kbps == 0
        url = f"{server.http}/v1/sessions/{client.session_id}/rate"
        (await asyncio.to_thread(httpx.put, url, json={"max_kbps": 500})).raise_for_status()
        await until(lambda: link.max_kbps == 500)
        (await asyncio.to_thread(httpx.put, url, json={"auto": True})).raise_for_status()
        await until(lambda: link.max_kbps == 0)


@pytest.mark.parametrize(("model", "answers"), [("scene", "all"), ("tiny", "none")])
async def test_other_answers(server: Server, tmp_path: Path, model: str, answers: str) -> None:
    spooled: list[Answer | Failure] = []
    # A point of one's own: on a busy machine the automatic rate may choose another one for the second frame.
    values = settings(tmp_path, model=model, answers=answers, point="s1-r2")
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(link.address, **values, on_spooled=spooled.append) as client,
    ):
        expected = await client.infer(capture(1))
        link.cut()
        assert [each async for each in client.stream(captures(1, 1))] == []
        link.mend()
        await until(lambda: spooled)
        (answer,) = spooled
        assert isinstance(answer, Answer)
        assert answer.segmentation == expected.segmentation
        assert answer.labels == expected.labels
        assert (answer.segmentation is not None) == (model == "scene")
        check_spooled(spooled, client.spool_id)
