"""Files on the device: kept by digest, fetched in the order of their use, resumed, locked, and cleaned up."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import (
    BitneckError,
    BundleCorrupt,
    DeadlineExceeded,
    InvalidConfig,
    Overloaded,
    Unavailable,
    UnknownPoint,
)
from bitneck.ladder import Ladder
from bitneck_edge.answers.results import Answer
from bitneck_edge.bundles.fetch import fetch_bundle, open_supply, take_bundle
from bitneck_edge.bundles.notes import noted_bundles
from bitneck_edge.bundles.pace import Pacer
from bitneck_edge.bundles.store import FileStore
from bitneck_edge.bundles.supply import first_point
from bitneck_edge.cli.fetch_lines import FetchLines
from bitneck_edge.client import EdgeClient
from bitneck_edge.points import nearest_ready
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.devices.streaming import until
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN
from bitneck_testing.rogue_servers import answer_all, rogue_server
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0
DAY_S = 86_400.0


def values(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "retries": 1, "connect_timeout_s": 5.0, "threads": 1} | more


def settings(server: str, tmp_path: Path, **more: Any) -> EdgeSettings:
    return EdgeSettings.load({"server": server} | values(tmp_path, **more))


async def answered_at(client: EdgeClient, point: str) -> None:
    """Send photographs until one is answered at a point."""
    while (await client.infer(photo())).point != point:  # noqa: ASYNC110  likewise
        await asyncio.sleep(0.02)


# The order of fetching


async def test_a_new_device_begins_with_the_earliest_head_and_goes_on_to_the_best_point(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    manifest = tiny_bundle.manifest
    assert first_point(manifest) == "s2-r1"
    async with rogue_server(tiny_bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):
        held = asyncio.Event()

        async def hold(path: str) -> None:
            if path not in manifest.files_of("s2-r1", "float32"):
                await held.wait()

        rogue.before_fetch = hold
        async with EdgeClient(address, **values(tmp_path)) as client:
            answer = await client.infer(photo())
            assert (answer.point, client.point) == ("s2-r1", "s2-r1")
            first = manifest.files_of("s2-r1", "float32")
            assert rogue.fetched[: len(first)] == list(first)
            held.set()
            await answered_at(client, "s1-r2")
            assert [(s.old, s.new) for s in client.switches] == [("s2-r1", "s1-r2")]
            await until(lambda: set(rogue.fetched) == set(manifest.files_for("edge")))
        assert len(rogue.fetched) == len(set(rogue.fetched))  # nothing twice


async def test_a_point_that_is_named_is_all_that_is_fetched_and_never_another(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    async with rogue_server(tiny_bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **values(tmp_path, point="s1-r2")) as client:
            answers = [a async for a in client.stream([photo(k) for k in range(5)])]
            assert {a.point for a in answers if isinstance(a, Answer)} == {"s1-r2"}
            assert set(rogue.fetched) == set(tiny_bundle.manifest.files_of("s1-r2", "float32"))
            client.point = "s2-r1"  # frames wait for its files
            answers = [a async for a in client.stream([photo(k) for k in range(5)])]
            assert {a.point for a in answers if isinstance(a, Answer)} == {"s2-r1"}


async def test_frames_are_answered_while_the_rest_comes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """With 1 kbit/s the rest takes minutes, and no frame waits for it; closing does not wait either."""
    async with rogue_server(tiny_bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **values(tmp_path, fetch_kbps=1.0)) as client:
            answers = [a async for a in client.stream([photo(k) for k in range(30)])]
            assert {a.point for a in answers if isinstance(a, Answer)} == {"s2-r1"}
            assert len(answers) == 30
        assert set(rogue.fetched) < set(tiny_bundle.manifest.files_for("edge"))


async def test_a_point_that_the_cloud_asks_for_follows_when_its_files_are_here(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    async with rogue_server(tiny_bundle, answer_all) as (address, _), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **values(tmp_path, point="s2-r1")) as client:
            await client.infer(photo())
            assert client._session is not None
            client._session.points.ask("s1-r1", "a test")
            assert client.point == "s2-r1"
            await answered_at(client, "s1-r1")


def test_what_stands_in_for_a_point(tiny_bundle: Bundle) -> None:
    ladder: Ladder = tiny_bundle.manifest.ladder  # s1-r1 4 bytes, s2-r1 12, s1-r2 16
    assert nearest_ready(ladder, "s1-r2", {"s1-r1", "s2-r1"}.__contains__) == "s2-r1"
    assert nearest_ready(ladder, "s1-r1", {"s1-r2", "s2-r1"}.__contains__) == "s2-r1"
    assert nearest_ready(ladder, "s1-r1", {"s1-r2"}.__contains__) == "s1-r2"
    assert nearest_ready(ladder, "s1-r1", lambda _point: False) is None


# Downloads that are cut off


async def test_a_download_goes_on_where_it_was_cut(tiny_bundle: Bundle, tmp_path: Path) -> None:
    entry = tiny_bundle.manifest.files["segments/01-seg1.onnx"]
    data = tiny_bundle.path("segments/01-seg1.onnx").read_bytes()
    store, asked, counted = FileStore(tmp_path), list[int](), list[int]()

    async def cut(_path: str, offset: int) -> AsyncGenerator[bytes]:
        asked.append(offset)
        yield data[offset : offset + 1000]
        raise Unavailable("the link is gone")

    async def whole(_path: str, offset: int) -> AsyncGenerator[bytes]:
        asked.append(offset)
        yield data[offset:]

    for _ in range(2):
        with pytest.raises(Unavailable):
            await store.receive("x", entry, cut, counted.append)
    assert not store.has(entry)
    assert store.received(entry) == 2000
    await FileStore(tmp_path).receive("x", entry, whole, counted.append)  # another process
    assert asked == [0, 1000, 2000]
    assert sum(counted) == entry.size
    assert store.has(entry)
    assert store.path(entry).read_bytes() == data
    assert list((tmp_path / "parts").iterdir()) == []


async def test_what_a_cut_download_left_may_be_damaged(tiny_bundle: Bundle, tmp_path: Path) -> None:
    entry = tiny_bundle.manifest.files["segments/01-seg1.onnx"]
    data = tiny_bundle.path("segments/01-seg1.onnx").read_bytes()
    store, asked = FileStore(tmp_path), list[int]()

    async def whole(_path: str, offset: int) -> AsyncGenerator[bytes]:
        asked.append(offset)
        yield data[offset:]

    (tmp_path / "parts").mkdir()
    for left in (b"wrong" * 10, b"x" * entry.size, b"x" * (entry.size + 9)):
        (tmp_path / "parts" / entry.sha256).write_bytes(left)
        await store.receive("x", entry, whole, lambda _size: None)
        assert asked[-1] == 0
        assert store.path(entry).read_bytes() == data
        store.remove(entry)


async def test_a_link_that_breaks_in_every_file_costs_no_byte_twice(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The server ends each call with an error after so many bytes."""
    sent = 0

    async with rogue_server(tiny_bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):

        def cut(data: bytes) -> Any:
            nonlocal sent
            part = data[:1000]
            sent += len(part)
            yield part
            if len(part) < len(data):
                raise ConnectionResetError

        rogue.chunks = cut
        await fetch_bundle(settings(address, tmp_path, retries=-1), points=["s2-r1"])
    manifest = tiny_bundle.manifest
    assert sent == sum(manifest.files[path].size for path in manifest.files_of("s2-r1", "float32"))


async def test_a_changed_bundle_costs_the_changed_files(tiny_bundle: Bundle, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=0, similar=("s1-r1",))
    assert other.bundle_id != tiny_bundle.bundle_id
    for bundle, expected in ((tiny_bundle, None), (other, {"points/s1-r1/conditional.npz"})):
        async with rogue_server(bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):
            await fetch_bundle(settings(address, tmp_path))
        assert set(rogue.fetched) == (expected or set(bundle.manifest.files_for("edge")))


async def test_the_background_goes_on_after_something_urgent(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A point is needed while a piece of another one comes; the other one follows."""
    async with rogue_server(tiny_bundle, answer_all) as (address, rogue), asyncio.timeout(HANG_S):
        begun, held = asyncio.Event(), asyncio.Event()

        async def hold(_path: str) -> None:
            begun.set()
            await held.wait()

        rogue.before_fetch = hold
        supply = await open_supply(settings(address, tmp_path))
        supply.start(["s1-r2", "s1-r1"], Pacer())
        await begun.wait()
        needed = asyncio.create_task(supply.need(["s2-r1"]))
        await asyncio.sleep(0)  # it has said that it is urgent, and waits for the piece
        held.set()
        await needed
        await until(lambda: supply.ready("s1-r2") and supply.ready("s1-r1"))
        await supply.close()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [DeadlineExceeded, Overloaded, Unavailable])
async def test_downloads_outlive_what_passes(
    tiny_bundle: Bundle, tmp_path: Path, error: type[BitneckError], background: bool
) -> None:
    """The server ends the first call with an error."""
    asked = 0

    async def refuse_once(_path: str) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise error("later")

    async with (
        rogue_server(tiny_bundle, answer_all, before_fetch=refuse_once) as (address, _),
        asyncio.timeout(HANG_S),
    ):
        supply = await open_supply(settings(address, tmp_path))
        if background:
            supply.start(["s1-r2"], Pacer())
            await until(lambda: supply.ready("s1-r2"))
        else:
            await supply.need(["s1-r2"])
        await supply.close()
    assert asked > 1


# Ahead of time


def edge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "bitneck-edge"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)


async def test_from_a_disk_and_without_a_link(tiny_bundle: Bundle, tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    done = edge("fetch", "--from", tiny_bundle.root, "--server", "127.0.0.1:9", *cache, "--point", "s1-r1", "--json")
    document = json.loads(done.stdout)
    files = tiny_bundle.manifest.files_of("s1-r1", "float32")
    assert (document["points"], document["files"], document["precision"]) == (["s1-r1"], len(files), "float32")
    supply = await open_supply(settings("127.0.0.1:9", tmp_path, retries=0), offline=True)
    await supply.look(["s1-r1", "s1-r2"])
    assert (supply.ready("s1-r1"), supply.ready("s1-r2")) == (True, False)
    with pytest.raises(Unavailable):
        await supply.need(["s1-r2"])
    await supply.close()
    refused = edge("fetch", "--from", tmp_path, *cache)
    assert (refused.returncode, "is not a bundle" in refused.stderr) == (2, True)
    refused = edge("fetch", "--from", tiny_bundle.root, *cache, "--point", "auto")
    assert (refused.returncode, "leave it out for all" in refused.stderr) == (2, True)
    with pytest.raises(UnknownPoint):
        take_bundle(tiny_bundle.root, settings("127.0.0.1:9", tmp_path), ["s9"])


async def test_fetch_from_a_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle, answer_all) as (address, rogue):
        done = await asyncio.to_thread(edge, "fetch", "--server", address, "--cache-dir", tmp_path / "cache")
        assert (done.returncode, "are on this device" in done.stdout) == (0, True)
        assert set(rogue.fetched) == set(tiny_bundle.manifest.files_for("edge"))
        rogue.fetched.clear()
        done = await asyncio.to_thread(edge, "points", "--server", address, "--cache-dir", tmp_path / "new", "--json")
        assert [p["id"] for p in json.loads(done.stdout)["points"]] == [p.id for p in tiny_bundle.manifest.ladder]
        assert rogue.fetched == []  # the manifest tells


@pytest.mark.parametrize("command", ["fetch", "run"])
async def test_without_a_terminal_lines_say_how_long_fetching_takes(
    command: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    photo().save(tmp_path / "a.png")
    pictures = [tmp_path / "a.png", "--point", "s1-r1"] if command == "run" else []

    async def slowly(_path: str) -> None:
        await asyncio.sleep(1.2 if len(rogue.fetched) == 2 else 0)

    async with rogue_server(tiny_bundle, answer_all, before_fetch=slowly) as (address, rogue):
        cache = ("--cache-dir", tmp_path / "cache")
        done = await asyncio.to_thread(edge, command, *pictures, "--server", address, *cache)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "fetching" in line]
        assert re.fullmatch(r"fetching the bundle: 0\.\d\d of 0\.\d\d MB(, \d+ s left)?", line)
        again = await asyncio.to_thread(edge, command, *pictures, "--server", address, *cache)
        assert "fetching" not in again.stderr


def test_lines_of_a_download() -> None:
    lines: list[str] = []
    times = iter([0, 0.9, 2, 11.9, 12, 30, 40, 41, 52])
    tell = FetchLines(lines.append, lambda: next(times))
    for done in (100_000, 200_000, 300_000, 310_000, 1_300_000, 2_100_000):
        tell(done, 2_100_000)
    assert lines == [
        "fetching the bundle: 0.30 of 2.10 MB, 18 s left",  # what a cut download left is not counted as fast
        "fetching the bundle: 1.30 of 2.10 MB, 8 s left",
    ]
    for done in (0, 0, 500_000):  # another download
        tell(done, 1_000_000)
    assert lines[2:] == ["fetching the bundle: 0.00 of 1.00 MB", "fetching the bundle: 0.50 of 1.00 MB, 12 s left"]


def test_a_stick_with_a_damaged_file(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "stick", seed=3)
    path = bundle.path("segments/00-seg0.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        take_bundle(bundle.root, settings("127.0.0.1:9", tmp_path))


# Cleaning up


def aged(root: Path) -> None:
    """Make everything in the cache two days old."""
    then = time.time() - 2 * DAY_S
    for path in root.rglob("*"):
        os.utime(path, (then, then))


async def test_only_what_nobody_needs_is_removed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Of three bundles, one is noted, one is locked by a client, and one is neither; they share most files."""
    cache = tmp_path / "cache"
    store = FileStore(cache)
    noted, locked, idle = (make_tiny_bundle(tmp_path / f"b{seed}", seed=seed) for seed in (1, 2, 3))
    take_bundle(noted.root, settings("127.0.0.1:9", tmp_path))
    held: Bundle | None = take_bundle(locked.root, settings("127.0.0.1:8", tmp_path))
    take_bundle(idle.root, settings("127.0.0.1:8", tmp_path))
    take_bundle(tiny_bundle.root, settings("127.0.0.1:8", tmp_path))  # the note of the second server
    (cache / "parts" / ("ab" * 32)).write_bytes(b"half of something")
    (cache / "parts" / ".part-abc").write_bytes(b"half of something")
    (cache / "bundles" / ("cd" * 32)).mkdir(parents=True)
    digests = {b: {e.sha256 for e in b.manifest.files_for("edge").values()} for b in (noted, locked, idle, tiny_bundle)}

    def left() -> set[str]:
        return {path.name for path in (cache / "files").iterdir()}

    store.forget_old(noted_bundles(cache), time.time())
    assert left() == set().union(*digests.values())  # all of it is younger than a day
    aged(cache)
    store.forget_old(noted_bundles(cache), time.time())
    assert left() == digests[noted] | digests[locked] | digests[tiny_bundle]
    assert [list((cache / name).iterdir()) for name in ("parts", "bundles")] == [[], []]
    assert held is not None
    held = None  # the client ends
    store.forget_old(noted_bundles(cache), time.time())
    assert left() == digests[noted] | digests[tiny_bundle]


async def test_a_running_clients_bundle_is_locked_against_another_process(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle, answer_all) as (address, _), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **values(tmp_path)) as client:
            await client.infer(photo())
            (tmp_path / "cache" / "servers").rename(tmp_path / "notes")
            aged(tmp_path / "cache")
            code = (
                "import sys, time; from pathlib import Path; from bitneck_edge.bundles.store import FileStore; "
                "FileStore(Path(sys.argv[1])).forget_old([], time.time())"
            )
            clean = [str(BIN / "python"), "-c", code, str(tmp_path / "cache")]
            await asyncio.to_thread(subprocess.run, clean, check=True, timeout=HANG_S)
            assert list((tmp_path / "cache" / "files").iterdir())
            client.point = "s1-r1"
            assert (await client.infer(photo())).point == "s1-r1"
        del client
        await asyncio.to_thread(subprocess.run, clean, check=True, timeout=HANG_S)
    with contextlib.suppress(FileNotFoundError):
        assert len(list((tmp_path / "cache" / "manifests").iterdir())) <= 1


# Pace


async def test_the_pace_keeps_its_rate_and_its_pieces_small() -> None:
    pacer = Pacer(kbps=80)  # 10 kB/s
    begun, pieces = time.perf_counter(), []
    for _ in range(4):
        pieces.append(await pacer.next_piece(1 << 20))
        pacer.took(pieces[-1], 0.001)
    assert set(pieces) == {2048}
    assert time.perf_counter() - begun >= 3 * 2048 / 10_000 - 0.01
    assert await Pacer().next_piece(100) == 100


async def test_a_piece_waits_for_frames_but_not_for_ever() -> None:
    pacer = Pacer(busy=lambda: True)
    begun = time.perf_counter()
    await pacer.next_piece(10)
    assert 0.2 < time.perf_counter() - begun < 5


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="fetch_kbps"):
        EdgeSettings.load({"server": "127.0.0.1:1", "fetch_kbps": -1})
