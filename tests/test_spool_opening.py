"""A spool whose disk does not answer when a device starts: live frames go on, and the spool is opened later."""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, Unavailable
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.cli.report import spool_line
from bitneck_edge.client import EdgeClient
from bitneck_edge.observe.metrics import Exposition
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool import files, spooling
from bitneck_edge.spool.bounds import SpoolCounts
from bitneck_edge.spool.files import Spool
from bitneck_testing.devices.hanging import HANG_S, LIMITS, Disk, kept_frame, spooling_client
from bitneck_testing.devices.streaming import until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, free_port


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """It hangs already, from the first look at the spool's folder on."""
    monkeypatch.setattr(spooling, "_OPEN_S", 0.2)
    monkeypatch.setattr(spooling, "_FIRST_PAUSE_S", 0.1)
    one = Disk(monkeypatch)
    one.slows(files, "locked")
    one.hang()
    yield one
    one.go_on()


def metrics(one: EdgeClient) -> str:
    return Exposition(one.state).render().decode()


def counts(one: EdgeClient) -> SpoolCounts:
    assert one.spool is not None
    return one.spool


@contextlib.asynccontextmanager
async def cut_off(one: EdgeClient, link: Proxy) -> AsyncIterator[None]:
    link.cut()
    await until(lambda: not one._opened().link.up)
    yield
    link.mend()
    await until(lambda: one._opened().link.up)


async def test_a_device_starts_and_its_spool_is_opened_when_the_disk_answers(
    server: Server, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """Live frames are answered; those of an outage wait in memory; what an earlier run has left is sent at last."""
    disk.go_on()
    link = Proxy(server.grpc)
    async with asyncio.timeout(HANG_S), link, spooling_client(link.address, tmp_path, []) as before:
        await before.infer(Capture(photo(0), "first"))
        link.cut()
        await until(lambda: not before._opened().link.up)
        with pytest.raises(Unavailable, match="the photograph is in the spool"):
            await before.infer(Capture(photo(1), "of an earlier run"))
        spool_id = before.spool_id
    disk.hang()
    spooled: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        spooling_client(link.address, tmp_path, spooled) as one,
    ):
        assert isinstance(await one.infer(Capture(photo(0), "live")), Answer)
        assert (one.spool, one.spool_id) == (SpoolCounts(opened=False), "")
        assert "bitneck_edge_spool_opened 0.0" in metrics(one)
        assert f"the disk of the spool {tmp_path / 'spool'} has not answered" in caplog.text
        async with cut_off(one, link):
            with pytest.raises(Unavailable, match="waits in memory for the disk of the spool"):
                await one.infer(Capture(photo(2), "of an outage"))
            assert (counts(one).waiting, counts(one).kept) == (1, 0)
            assert "bitneck_edge_spool_waiting_frames 1.0" in metrics(one)
        assert isinstance(await one.infer(Capture(photo(0), "live again")), Answer)
        assert spooled == []
        disk.go_on()
        await until(lambda: len(spooled) == 2)
        assert [each.file for each in spooled] == ["of an earlier run", "of an outage"]
        assert all(isinstance(each, Answer) and each.spool == spool_id for each in spooled)
        await until(lambda: counts(one).kept == 0)
        assert (counts(one).opened, counts(one).waiting, one.spool_id) == (True, 0, spool_id)
        assert "bitneck_edge_spool_opened 1.0" in metrics(one)


async def test_a_spool_that_is_refused_at_last_is_tried_again(
    server: Server, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """What it is to keep waits meanwhile: another process may end, and a disk may come back."""
    folder, spooled = tmp_path / "spool", list[Answer | Failure]()
    folder.mkdir()
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        spooling_client(link.address, tmp_path, spooled) as one,
    ):
        await one.infer(Capture(photo(0), "live"))
        async with cut_off(one, link):
            with pytest.raises(Unavailable, match="waits in memory"):
                await one.infer(Capture(photo(2), "of an outage"))
        disk.go_on()
        await until(lambda: "is used by another process" in caplog.text)
        assert not list(folder.glob("bundles"))
        assert counts(one).waiting == 1
        os.close(lock)
        await until(lambda: spooled)
        assert [each.file for each in spooled] == ["of an outage"]
        assert isinstance(spooled[0], Answer)


async def test_what_waits_when_the_client_is_closed_is_told_as_lost(server: Server, tmp_path: Path, disk: Disk) -> None:
    """A disk that refuses then is not tried again."""
    spooled: list[Answer | Failure] = []
    async with asyncio.timeout(HANG_S), Proxy(server.grpc) as link:
        async with spooling_client(link.address, tmp_path, spooled) as one:
            await one.infer(Capture(photo(0), "live"))
            link.cut()
            await until(lambda: not one._opened().link.up)
            with pytest.raises(Unavailable, match="waits in memory"):
                await one.infer(Capture(photo(2), "of an outage"))
            disk.error = OSError(5, "Input/output error")
            disk.go_on()
        (failure,) = spooled
        assert isinstance(failure, Failure)
        assert "the frame is lost: the spool" in str(failure.error)
        assert "Input/output error" in str(failure.error)
        assert (counts(one).dropped, counts(one).waiting) == (1, 0)
        assert spool_line(counts(one)) == "spool: not opened, because its disk did not answer; 1 frame lost"


async def test_a_client_without_frames_for_the_spool_is_closed_at_once(
    server: Server, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be lost, so nothing is waited for. Another client has the spool when the disk answers."""
    monkeypatch.setattr(spooling, "_CLOSE_S", HANG_S)
    async with asyncio.timeout(HANG_S / 2):
        async with spooling_client(server.grpc, tmp_path, []) as one:
            assert isinstance(await one.infer(Capture(photo(0), "live")), Answer)
    disk.go_on()
    assert one._spooling is not None
    assert await one._spooling._files.close(HANG_S)
    async with spooling_client(server.grpc, tmp_path, []) as again:
        assert counts(again).opened


async def test_a_spool_that_cannot_be_used_is_refused_at_once(tmp_path: Path, disk: Disk) -> None:
    disk.go_on()
    (tmp_path / "spool").touch()
    with pytest.raises(InvalidConfig, match="cannot be written"):
        async with spooling_client(f"127.0.0.1:{free_port()}", tmp_path, []):
            pass


async def test_a_device_starts_without_a_server_while_the_disk_hangs(
    server: Server, tiny_bundle: Bundle, tmp_path: Path, disk: Disk
) -> None:
    """With the bundle in its cache."""
    async with spooling_client(server.grpc, tmp_path, [], point="s1-r2") as one:
        await one.infer(Capture(photo(0), "live"))
    spooled: list[Answer | Failure] = []
    address = f"127.0.0.1:{free_port()}"
    async with (
        asyncio.timeout(HANG_S),
        spooling_client(address, tmp_path, spooled, bundle_id=tiny_bundle.bundle_id) as one,
    ):
        with pytest.raises(Unavailable, match="waits in memory"):
            await one.infer(Capture(photo(1), "of an outage"))
        disk.go_on()
        await until(lambda: counts(one).kept == 1)


def test_counts_are_those_before_a_call_that_hangs(tmp_path: Path, disk: Disk) -> None:
    """Nobody need have asked for them before, and whoever asks does not wait."""
    disk.go_on()
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(3):
        spool.put(kept_frame(number))
    spool.done([1])
    with spool._mutex:  # as a thread that writes
        before = time.monotonic()
        asked = asyncio.run(_asked(spool))
        assert time.monotonic() - before < HANG_S / 10
    assert asked == [(3, 1, 2)] * 1000
    spool.close()
    assert spool.counts().opened


async def _asked(spool: Spool) -> list[tuple[int, int, int]]:
    """Counts, as another thread gets them."""

    def ask() -> list[tuple[int, int, int]]:
        each = [spool.counts(["sha256:" + "00" * 32]) for _ in range(1000)]
        return [(one.spooled, one.sent, one.kept) for one in each]

    return await asyncio.to_thread(ask)
