"""Steps of a start and a stop that wait for a disk: they can be stopped, end in the end, and say what they wait for."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud import starting
from bitneck_cloud.starting import StoppedBefore, last_step, step
from bitneck_testing.streams import Frames, stub

HANG_S = 30.0
HANGING = """
import sys, threading
import bitneck_cloud.answers.publishing as publishing
import bitneck_cloud.engine.engine as engine
import bitneck_cloud.server as server
import bitneck_cloud.starting as starting
from bitneck.commands import cloud
from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.fleet.state_file import StateFile

def hang(*arguments):
    print("hangs", flush=True)
    threading.Event().wait()

engine._STOP_S = publishing._CLOSE_S = starting._LAST_S = 0.2
{patch} = hang
sys.argv = ["bitneck-cloud", "serve", *sys.argv[1:]]
cloud()
"""


@pytest.fixture
def disk() -> Iterator[threading.Event]:
    """Answers when it is set."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_step_gives_what_the_work_gives() -> None:
    stopping = asyncio.Event()
    assert await step(stopping, "counting", sum, (1, 2)) == 3
    with pytest.raises(ZeroDivisionError):
        await step(stopping, "dividing", lambda: 1 // 0)
    await last_step("closing", lambda: None)


async def test_a_step_that_takes_long_is_told_and_can_be_stopped(
    disk: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(starting, "_TOLD_EVERY_S", 0.05)
    stopping = asyncio.Event()
    waiting = asyncio.create_task(step(stopping, "reading the bundles", disk.wait, HANG_S))
    async with asyncio.timeout(HANG_S):
        while "reading the bundles: not done after 0 s; does the disk answer?" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stopping.set()
        with pytest.raises(StoppedBefore):
            await waiting


async def test_the_last_step_has_a_bound(
    disk: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(starting, "_LAST_S", 0.05)
    async with asyncio.timeout(HANG_S):
        await last_step("closing sinks_queue", lambda: disk.wait(HANG_S))
    assert "closing sinks_queue: not done after 0 s; the server ends without it" in caplog.text


@pytest.mark.parametrize(
    "patch",
    [
        "server.load_models",
        "server.Outgoing.start",
        "StateFile.open",
        "server.BearerTokens",
        "server._http_tls",
        "server._grpc_tls",
    ],
)
def test_a_server_whose_disk_hangs_at_the_start_can_be_stopped(tiny_bundle: Bundle, tmp_path: Path, patch: str) -> None:
    command = [sys.executable, "-c", HANGING.format(patch=patch), "--bundle", str(tiny_bundle.root)]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--state-db", str(tmp_path / "state.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hangs\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG_S) == 0
        finally:
            process.kill()


async def test_a_server_ends_while_the_disk_of_its_queue_hangs(
    tiny_bundle: Bundle, frames: Frames, tmp_path: Path
) -> None:
    """In the engine's own thread, which nothing waits for at the end."""
    config = tmp_path / "cloud.toml"
    config.write_text(
        f'sinks_queue = "{tmp_path / "queue.db"}"\n'
        f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{tmp_path / "answers.jsonl"}"\n'
    )
    command = [sys.executable, "-c", HANGING.format(patch="QueueFile.add"), "--bundle", str(tiny_bundle.root)]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--config", str(config), "--json", "--drain-s", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            async with stub(ready["grpc"]) as cloud:
                request = pb.InferRequest(bundle_id=tiny_bundle.bundle_id, frame=frames.frame(1))
                call = cloud.Infer(request, timeout=HANG_S)
                assert await asyncio.to_thread(process.stdout.readline) == "hangs\n"
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, HANG_S) == 0
                call.cancel()
        finally:
            process.kill()
