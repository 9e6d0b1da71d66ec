"""A disk that does not answer, as a network's disk that is gone, or a card that erases: live frames go on."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import Overloaded, Unavailable
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool import known, spooling, writer
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept
from bitneck_edge.spool.writer import Record, Writer
from bitneck_testing.devices.hanging import HANG_S, LIMITS, Disk, kept_frame, spooling_client
from bitneck_testing.devices.streaming import until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server


async def captures(first: int, count: int, pause_s: float = 0.0) -> AsyncIterator[Capture]:
    for number in range(first, first + count):
        yield Capture(photo(number % 4), f"camera#{number}")
        await asyncio.sleep(pause_s)


def names(results: list[Answer | Failure]) -> list[str]:
    assert all(isinstance(each, Answer) for each in results), results
    return [each.file for each in results]


@contextlib.asynccontextmanager
async def outage(
    server: Server, tmp_path: Path, disk: Disk
) -> AsyncIterator[tuple[EdgeClient, Proxy, list[Answer | Failure]]]:
    """A client with one answer, its cut link, and what comes from its spool, whose disk hangs."""
    spooled: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        spooling_client(link.address, tmp_path, spooled) as one,
    ):
        await one.infer(Capture(photo(0), "first"))
        disk.hang()
        link.cut()
        await until(lambda: not one._opened().link.up)
        yield one, link, spooled


async def test_live_frames_go_on_and_the_loop_never_waits(server: Server, tmp_path: Path, disk: Disk) -> None:
    """Over a slow link each frame is given to the disk before its answer comes."""
    spooled: list[Answer | Failure] = []
    late = 0.0

    async def watch_the_loop() -> None:
        nonlocal late
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late = max(late, time.monotonic() - before)

    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc, delay_s=0.4) as link,
        spooling_client(link.address, tmp_path, spooled, in_flight=4) as one,
    ):
        await one.infer(Capture(photo(0), "first"))
        disk.hang()
        watching = asyncio.create_task(watch_the_loop())
        found = [each async for each in one.stream(captures(0, 12))]
        assert disk.waiting, "a frame was given to it"
        assert names(found) == [f"camera#{k}" for k in range(12)]
        assert one.spool is not None  # counts do not wait either
        watching.cancel()
        assert late < HANG_S / 10  # it would have waited as long as the disk
        disk.go_on()
        await until(lambda: one.spool is not None and one.spool.kept == 0)
        assert spooled == []


async def test_frames_of_an_outage_wait_in_order_for_the_disk(server: Server, tmp_path: Path, disk: Disk) -> None:
    """They come to it when it answers again; live frames are answered meanwhile, and each frame once."""
    async with outage(server, tmp_path, disk) as (one, link, spooled):
        assert [each async for each in one.stream(captures(0, 8))] == []
        link.mend()
        await until(lambda: one._opened().link.up)
        assert names([each async for each in one.stream(captures(8, 4))]) == [f"camera#{k}" for k in range(8, 12)]
        assert spooled == []
        disk.go_on()
        await until(lambda: len(spooled) == 8)
        assert names(spooled) == [f"camera#{k}" for k in range(8)]
        assert [each.seq for each in spooled if isinstance(each, Answer)] == list(range(1, 9))
        await until(lambda: one.spool is not None and one.spool.kept == 0)
        assert one.spool is not None
        assert (one.spool.spooled, one.spool.dropped) == (8, 0)


async def test_a_frame_that_the_disk_refuses_at_last_is_told(server: Server, tmp_path: Path, disk: Disk) -> None:
    """The program was told that it is in the spool, so the failure comes where its answer would have come."""
    async with outage(server, tmp_path, disk) as (one, _, spooled):
        with pytest.raises(Unavailable, match="is in the spool"):
            await one.infer(Capture(photo(1), "lost"))
        disk.error = OSError(5, "Input/output error")
        disk.go_on()
        await until(lambda: spooled)
        (failure,) = spooled
        assert isinstance(failure, Failure)
        assert (failure.file, type(failure.error)) == ("lost", Overloaded)
        assert one.spool is not None
        assert (one.spool.dropped, one.spool.kept) == (1, 0)
        disk.error = None


async def test_a_client_opens_and_closes_while_the_disk_does_not_answer(
    server: Server, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the names of its classes cannot be written. What waits then is written if the disk answers in time."""
    monkeypatch.setattr(spooling, "_CLOSE_S", 0.2)
    write_new = known.write_new

    def hang(*arguments: Any) -> None:
        """From the moment on in which the spool is open, and the client's first session is not."""
        disk.hang()
        disk.wait()
        write_new(*arguments)

    monkeypatch.setattr(known, "write_new", hang)
    async with asyncio.timeout(HANG_S), Proxy(server.grpc) as link:
        async with spooling_client(link.address, tmp_path, []) as one:
            assert isinstance(await one.infer(Capture(photo(0), "first")), Answer)
            link.cut()
            await until(lambda: not one._opened().link.up)
            assert [each async for each in one.stream(captures(0, 3))] == []
        assert "the disk of the spool does not answer" in caplog.text
        monkeypatch.setattr(known, "write_new", write_new)
        disk.go_on()
        files = one._spooling._files if one._spooling is not None else None
        assert files is not None
        assert await files.close(HANG_S)
        assert one.spool is not None
        assert one.spool.kept == 3


async def test_what_waits_is_bounded_and_what_is_done_meanwhile_is_never_written(
    tmp_path: Path, tiny_bundle: Bundle, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_MOST_FRAMES", 10)
    spool, thread, settled = Spool.open(tmp_path / "spool", LIMITS), DiskThread("test"), list[Record]()
    one = Writer(spool, thread)

    def put(number: int, *, held: bool = False) -> Record:
        return one.put(kept_frame(number), tiny_bundle, held=held, on_settled=settled.append)

    disk.hang()
    records = [put(number) for number in range(12)]
    await until(lambda: len(settled) == 2)
    assert settled == records[10:]
    assert all(isinstance(each.error, Overloaded) for each in settled)
    assert one.dropped == 2
    held = put(12, held=True)
    await until(lambda: held in settled)
    assert (held.error, one.dropped) == (None, 2), "it is tried again, and may still be answered"
    await asyncio.sleep(1.1)
    before = time.monotonic()
    await one.settled(records[5])
    assert time.monotonic() - before < HANG_S / 10
    assert records[5].waits
    for number in (0, 3, 4):  # the first one is being written
        one.done(records[number])
    again = [put(number) for number in (13, 14)]  # there is room for as many as are not written any more
    disk.go_on()
    await asyncio.gather(*[each.settled for each in (*records, *again)])
    assert await thread.close(10)
    kept = [each.name for each in spool.take(99, 1 << 20)]
    assert kept == [f"c#{number}" for number in (1, 2, 5, 6, 7, 8, 9, 13, 14)]
    assert spool.counts().spooled == 10
    spool.close()
    late = put(15)
    await until(lambda: late in settled)
    assert isinstance(late.error, Unavailable)


async def test_a_frame_that_is_left_to_the_spool_while_the_disk_has_it(
    tmp_path: Path, tiny_bundle: Bundle, disk: Disk
) -> None:
    """It was held when it was given to the disk."""
    spool, thread, settled = Spool.open(tmp_path, LIMITS), DiskThread("test"), list[Record]()
    one = Writer(spool, thread)
    disk.hang()
    first, second = (
        one.put(kept_frame(number), tiny_bundle, held=True, on_settled=settled.append) for number in range(2)
    )
    one.release(first)
    one.release(second)
    disk.go_on()
    await until(lambda: len(settled) == 2)
    assert await thread.close(10)
    assert [each.name for each in spool.take(99, 1 << 20)] == ["c#0", "c#1"]
    spool.close()


async def test_what_is_asked_behind_a_write_is_done_behind_it(tmp_path: Path, tiny_bundle: Bundle, disk: Disk) -> None:
    """Also if the thread ends then, and whoever looks behind it sees it: a drain would end too early."""
    spool, thread = Spool.open(tmp_path, LIMITS), DiskThread("test")
    one = Writer(spool, thread)
    disk.hang()
    left, unwanted = (
        one.put(kept_frame(number), tiny_bundle, held=True, on_settled=lambda _: None) for number in range(2)
    )
    await until(lambda: disk.waiting)
    one.release(left)
    waiting = asyncio.create_task(thread.run(spool.has_waiting))
    await asyncio.sleep(0)
    disk.go_on()
    assert await waiting
    disk.hang()
    unwanted = one.put(kept_frame(2), tiny_bundle, held=False, on_settled=lambda _: None)
    await until(lambda: disk.waiting)
    one.done(unwanted)
    thread.end()
    disk.go_on()
    assert await thread.close(10)
    assert [each.name for each in spool.take(99, 1 << 20)] == ["c#0"]
    with pytest.raises(Unavailable, match="test is closed"):
        await thread.run(lambda: None)
    spool.close()


async def test_a_bug_in_the_thread_fails_its_frame_and_no_other(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool, thread, settled = Spool.open(tmp_path, LIMITS), DiskThread("test"), list[Record]()
    one, right = Writer(spool, thread), spool.put

    def put(kept: Kept, *, held: bool) -> int | None:
        if kept.name == "c#0":
            raise TypeError("a bug")
        return right(kept, held=held)

    monkeypatch.setattr(spool, "put", put)
    monkeypatch.setattr(spool.known, "keep", lambda _bundle: tiny_bundle.path("no such file"))
    for number in range(2):
        one.put(kept_frame(number), tiny_bundle, held=False, on_settled=settled.append)
    await until(lambda: len(settled) == 2)
    assert isinstance(settled[0].error, Unavailable)
    assert (settled[1].error, settled[1].seq) == (None, 1)
    assert "TypeError" in caplog.text
    assert "manifest of the bundle cannot be kept" in caplog.text
    assert await thread.close(10)
    spool.close()


async def test_frames_that_wait_for_the_disk_keep_no_pictures(server: Server, tmp_path: Path, disk: Disk) -> None:
    """2,048 of a camera's would be gigabytes."""
    pictures: list[weakref.ref[Any]] = []

    async def source() -> AsyncIterator[Capture]:
        for number in range(6):
            picture = photo(number)
            pictures.append(weakref.ref(picture))
            yield Capture(picture, f"camera#{number}")

    async with asyncio.timeout(HANG_S), Proxy(server.grpc) as link, spooling_client(link.address, tmp_path, []) as one:
        await one.infer(Capture(photo(0), "first"))
        disk.hang()
        link.cut()
        await until(lambda: not one._opened().link.up)
        assert [each async for each in one.stream(source())] == []
        assert disk.waiting
        await until(lambda: gc.collect() >= 0 and not [each for each in pictures if each() is not None])
        disk.go_on()


@pytest.mark.parametrize("when", ["closing", "opening"])
async def test_a_client_that_is_cancelled_while_the_disk_does_not_answer_leaves_nothing_open(
    when: str, server: Server, tmp_path: Path, disk: Disk
) -> None:
    """When the disk answers, what waits is written, the spool is closed, and its threads end."""
    before = set(threading.enumerate())
    one = spooling_client(server.grpc, tmp_path, [])
    async with asyncio.timeout(HANG_S):
        if when == "opening":
            disk.hang()
            task = asyncio.create_task(one.__aenter__())
        else:
            await one.__aenter__()
            await one.infer(Capture(photo(0), "first"))
            disk.hang()
            assert one._spooling is not None
            one._spooling._writer.put(kept_frame(1), one.bundle, held=False, on_settled=lambda _: None)
            task = asyncio.create_task(one.close())
        await until(lambda: disk.waiting)
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        disk.go_on()
        await until(lambda: not [each for each in set(threading.enumerate()) - before if "spool" in each.name])
        async with spooling_client(server.grpc, tmp_path, []) as again:
            assert again.spool is not None
            assert again.spool.kept == (when == "closing")
