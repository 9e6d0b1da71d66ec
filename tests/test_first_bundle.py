"""A device with a spool that starts without a server and without a bundle waits, and counts what it leaves out."""

import asyncio
import io
import json
import signal
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import ImageError, UnknownPoint
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Ahead, Capture
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import edge_run, free_port, heeding_interrupts, running_server

HANG_S = 60.0
WAITS = "nothing can be encoded until the server's bundle is here"


class Handler(BaseHTTPRequestHandler):
    """Shows the same second of a video for every call, as a camera that breaks off."""

    showing = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.showing)
        time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def camera() -> Iterator[str]:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as out:
        stream: Any = out.add_stream("mpeg2video", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(photo(k, (64, 48))), format="rgb24")))
        out.mux(stream.encode())
    Handler.showing = buffer.getvalue()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/camera.ts"
        server.shutdown()
        thread.join()


def wait_for(log: Path, text: str, times: int = 1) -> None:
    limit = time.monotonic() + HANG_S
    while log.read_text().count(text) < times:
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.05)


def device(address: str, folder: Path, *sources: object) -> list[str]:
    options = ("--spool", folder / "spool", "--model", "tiny", "--connect-timeout-s", 1)
    return heeding_interrupts(edge_run(address, folder / "cache", *options, "--json-lines", *sources))


def test_a_watched_folder_waits_for_the_first_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """What appears in it meanwhile is answered when there is a bundle; what was there before is not new."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "before.png").write_bytes(photo_bytes(1))
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "log"
    command = device(address, tmp_path, "--watch", tmp_path / "photos")
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        try:
            wait_for(log, WAITS)
            (tmp_path / "photos" / "meanwhile.png").write_bytes(photo_bytes(2))
            wait_for(log, WAITS, 3)
            with running_server(tiny_bundle.root, grpc=address):
                assert child.stdout is not None
                answer = json.loads(child.stdout.readline())
                child.send_signal(signal.SIGINT)
                summary = json.loads(child.stdout.readline())["summary"]
                assert child.wait(HANG_S) == 130
        finally:
            child.kill()
    assert Path(answer["file"]).name == "meanwhile.png"
    assert answer["labels"]
    assert (summary["frames"], summary["failed"], summary["dropped"]) == (1, 0, 0)
    assert "bitneck-edge fetch" in log.read_text()


def test_a_camera_drops_and_counts_pictures_until_the_first_bundle(
    tiny_bundle: Bundle, camera: str, tmp_path: Path
) -> None:
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            device(address, tmp_path, "--every", camera), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        try:
            wait_for(log, "opening it again", 2)  # twenty pictures were shown
            wait_for(log, WAITS)
            with running_server(tiny_bundle.root, grpc=address):
                assert child.stdout is not None
                answer = json.loads(child.stdout.readline())
                child.send_signal(signal.SIGINT)
                summary = json.loads(child.stdout.read().splitlines()[-1])["summary"]
                assert child.wait(HANG_S) == 130
        finally:
            child.kill()
    first = int(answer["file"].rpartition("#")[2])
    assert first >= 16, "the newest four were kept"
    assert summary["dropped"] == first, "each that is older was counted"


async def test_a_client_waits_for_its_first_bundle_but_not_where_waiting_is_of_no_use(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"127.0.0.1:{free_port()}"
    values: dict[str, Any] = {
        "cache_dir": tmp_path / "cache", "spool": tmp_path / "spool", "retries": 0, "connect_timeout_s": 0.5
    }  # fmt: skip
    async with asyncio.timeout(HANG_S):
        client = EdgeClient(address, **values, model="tiny")
        opening = asyncio.create_task(client.__aenter__())
        while caplog.text.count(WAITS) < 2:
            assert not opening.done()
            await asyncio.sleep(0.02)
        assert not client.opened
        with running_server(tiny_bundle.root, grpc=address):
            await opening
            assert (await client.infer(photo(1))).labels
            await client.close()
            with pytest.raises(UnknownPoint):
                await EdgeClient(address, **values, model="another").__aenter__()


async def numbered(count: int, error: Exception | None = None) -> AsyncGenerator[Capture]:
    for number in range(count):
        yield Capture(b"", str(number))
        await asyncio.sleep(0)
    if error is not None:
        raise error


async def test_pictures_that_come_ahead() -> None:
    """The newest few are kept; none is dropped once they are taken; what the source raises comes at its end."""
    dropped: list[Capture] = []
    ahead = Ahead(numbered(10), 4, dropped.append)
    await asyncio.sleep(0.1)
    assert [each.name for each in dropped] == list("012345")
    assert [each.name async for each in ahead.pictures()] == list("6789")
    ahead = Ahead(numbered(50, ImageError("it broke off")), 4, dropped.append)
    pictures = ahead.pictures()
    found = [(await anext(pictures)).name]
    with pytest.raises(ImageError, match="broke off"):
        while True:
            await asyncio.sleep(0)
            found.append((await anext(pictures)).name)
    assert found == [str(number) for number in range(50)]
    assert len(dropped) == 6
    endless = Ahead(numbered(1 << 30), 4, dropped.append)
    await asyncio.sleep(0.01)
    await endless.close()
    count = len(dropped)
    await asyncio.sleep(0.05)
    assert len(dropped) == count
