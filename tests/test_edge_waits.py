"""What a device says and does while no server answers: causes, pauses, the log, bundles of other addresses."""

import asyncio
import io
import json
import logging
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import Unavailable
from bitneck_edge.bundles.fetch import open_supply, take_bundle
from bitneck_edge.cli.log import SparseLog
from bitneck_edge.client import EdgeClient
from bitneck_edge.doctor.spool import check_spool
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.sender import Sender
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import child_process, edge_run, free_port, heeding_interrupts, running_server

HANG_S = 60.0
PATIENT_S = 500.0
"""For connecting: a test that waited for it would hang."""


# A port that refuses


async def test_with_a_spool_a_port_that_refuses_is_not_waited_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    values: dict[str, Any] = {"cache_dir": tmp_path / "cache", "model": "tiny", "connect_timeout_s": PATIENT_S}
    address = f"127.0.0.1:{free_port()}"
    settings = EdgeSettings.load({"server": address, "spool": tmp_path / "spool", **values})
    async with asyncio.timeout(HANG_S):
        with pytest.raises(Unavailable, match="connection refused") as refused:
            await open_supply(settings, offline=True, retries=0)
        assert "waited" not in str(refused.value)
        take_bundle(tiny_bundle.root, settings)
        async with EdgeClient(settings=settings) as client:  # its link is refused too, and tries again and again
            with pytest.raises(Unavailable, match="in the spool"):
                await client.infer(photo(1))
            while client.reconnects < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_without_a_spool_a_server_that_starts_is_waited_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The port refuses at first; there are no retries."""
    address = f"127.0.0.1:{free_port()}"
    client = EdgeClient(address, cache_dir=tmp_path, model="tiny", retries=0, connect_timeout_s=HANG_S)
    opening = asyncio.create_task(client.__aenter__())
    await asyncio.sleep(1.0)
    assert not opening.done()
    with running_server(tiny_bundle.root, grpc=address):
        async with asyncio.timeout(HANG_S):
            await opening
            assert (await client.infer(photo(1))).labels
        await client.close()


async def test_a_sender_ends_although_a_frame_comes_at_that_moment(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "spool", Limits(most_bytes=1_000_000, most_age_s=1e6))
    settings = EdgeSettings.load({"server": "127.0.0.1:1", "spool": tmp_path / "spool"})
    files, house = DiskThread("files"), DiskThread("house")
    sender = Sender(spool, files, house, settings, lambda: None, lambda _result: None)
    running = asyncio.create_task(sender.run())
    await asyncio.sleep(0.05)
    sender.look()
    running.cancel()
    await asyncio.wait({running}, timeout=5)
    assert running.cancelled()
    assert await files.close(10)
    spool.close()


# Bundles of other addresses


async def test_bundles_of_other_addresses_are_named_and_can_be_asked_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    values: dict[str, Any] = {"cache_dir": tmp_path / "cache", "model": "tiny", "retries": 0, "connect_timeout_s": 0.2}
    before, after = (f"127.0.0.1:{free_port()}" for _ in range(2))

    def settings(**more: Any) -> EdgeSettings:
        return EdgeSettings.load({"server": after, **values, **more})

    with pytest.raises(Unavailable) as nothing:
        await open_supply(settings(), offline=True)
    assert "--bundle-id" not in str(nothing.value)
    take_bundle(tiny_bundle.root, EdgeSettings.load({"server": before, **values}))
    with pytest.raises(Unavailable) as told:
        await open_supply(settings(), offline=True)
    assert f"bundles of others: tiny {tiny_bundle.bundle_id}. If" in str(told.value)
    assert "--bundle-id sha256:..." in str(told.value)
    with pytest.raises(Unavailable) as strange:
        await open_supply(settings(bundle_id="sha256:" + "0" * 64), offline=True)
    assert "bundles of others" not in str(strange.value)
    spool = tmp_path / "spool"
    async with asyncio.timeout(HANG_S):
        async with EdgeClient(settings=settings(bundle_id=tiny_bundle.bundle_id, spool=spool)) as client:
            with pytest.raises(Unavailable, match="in the spool"):
                await client.infer(photo(1))
            assert client.bundle.bundle_id == tiny_bundle.bundle_id


# The log


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def logged() -> tuple[logging.Logger, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    log = logging.Logger("test")
    log.addHandler(SparseLog(stream, clock))
    return log, stream, clock


def test_a_warning_that_comes_again_is_written_once_a_minute(
    logged: tuple[logging.Logger, io.StringIO, Clock],
) -> None:
    log, stream, clock = logged

    def lines() -> list[str]:
        found = stream.getvalue().splitlines()
        stream.truncate(stream.seek(0))
        return found

    for number in range(120):  # ten minutes
        clock.now_s = 5.0 * number
        log.warning("%s; trying again in %.1f s", Unavailable("no server"), number / 10)
    found = lines()
    assert found[:3] == [f"no server; trying again in 0.{number} s" for number in range(3)]
    assert "once a minute" in found[3]
    assert found[4] == "no server; trying again in 1.4 s [the same 11 times before]"
    assert len(found) == 13
    log.warning("%s; trying again in %.1f s", Unavailable("another cause"), 1.0)
    assert len(lines()) == 1, "another cause is told at once"
    clock.now_s += 3600.0
    log.warning("%s; trying again in %.1f s", Unavailable("no server"), 1.0)
    assert lines() == ["no server; trying again in 1.0 s"], "the next outage is told at once"
    for _ in range(20):
        log.info("a picture")
    assert len(lines()) == 20, "only warnings come too often"


def test_the_log_keeps_no_more_than_it_must(logged: tuple[logging.Logger, io.StringIO, Clock]) -> None:
    log, stream, _ = logged
    for number in range(1000):
        log.warning("%s cannot be read", f"{number}.jpg")
    assert stream.getvalue().count("\n") == 1000
    handler = log.handlers[0]
    assert isinstance(handler, SparseLog)
    assert len(handler._seen) == 200


# The summary


def test_the_summary_counts_what_went_to_the_spool(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Also where a program reads the answers."""
    address, photos = f"127.0.0.1:{free_port()}", tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        (photos / f"{number}.png").write_bytes(photo_bytes(number))
    values = {"model": "tiny", "cache_dir": tmp_path / "cache", "spool": tmp_path / "spool"}
    settings = EdgeSettings.load({"server": address, **values})
    take_bundle(tiny_bundle.root, settings)
    options = ("--model", "tiny", "--spool", tmp_path / "spool", "--json-lines", photos)
    command = heeding_interrupts(edge_run(address, tmp_path / "cache", *options))
    limit = time.monotonic() + HANG_S
    with child_process(command, stderr=subprocess.PIPE) as child:
        while "has 5 frames in" not in str(check_spool(settings)):
            assert time.monotonic() < limit
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=HANG_S)
    assert json.loads(out.splitlines()[-1])["summary"]["spool"]["kept"] == 5
    assert "spool: 5 frames in, 0 answered, 5 kept, 0 fell out" in err
    assert "5 frames: 0 answered at once, 5 left to the spool, 0 failed, 0 dropped" in err
