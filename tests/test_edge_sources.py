"""Where pictures come from: files, standard input, videos, network streams that break off; and bench."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.errors import ImageError, InvalidConfig
from bitneck_edge.pipeline import Slots
from bitneck_edge.sources.capture import Capture, captures, newest
from bitneck_edge.sources.parse import Source, parse_sources
from bitneck_edge.sources.read import read_sources
from bitneck_edge.sources.threads import in_thread
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import Server, running_server

BIN = Path(sys.executable).parent
HANG_S = 60.0


def video_bytes(count: int = 20, fps: int = 10, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A short video whose pictures become brighter one by one."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(count):
            picture = np.full((48, 64, 3), 20 + 200 * k // count, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return buffer.getvalue()


async def taken(source: AsyncGenerator[Capture], at_most: int = 1000) -> list[Capture]:
    found: list[Capture] = []
    async with asyncio.timeout(HANG_S):
        async for capture in source:
            found.append(capture)
            if len(found) == at_most:
                break
        await source.aclose()
    return found


async def test_a_video_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(video_bytes())
    pictures = await taken(read_sources(parse_sources([str(path)]), repeat=2))
    assert [p.name for p in pictures] == [f"{path}#{k}" for k in range(20)] * 2
    levels = [np.asarray(p.photo).mean() for p in pictures[:20] if isinstance(p.photo, Image.Image)]
    assert levels == sorted(levels)
    assert levels[-1] > levels[0] + 100


async def test_a_video_at_a_lower_rate_leaves_pictures_out(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(video_bytes())
    pictures = await taken(read_sources(parse_sources([str(path)]), fps=5, hurry=lambda: True))
    assert [p.name for p in pictures] == [f"{path}#{k}" for k in range(0, 20, 2)]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "sound"])
async def test_a_video_that_is_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.mp4"
    data = video_bytes()
    if damage == "sound":
        with av.open(str(path), "w") as out:
            stream: Any = out.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            for packet in [*stream.encode(frame), *stream.encode()]:
                out.mux(packet)
    else:
        path.write_bytes({"cut": data[:200], "noise": bytes(range(256)) * 8, "empty": b""}[damage])
    with pytest.raises(ImageError, match=r"a\.mp4"):
        await taken(read_sources(parse_sources([str(path)])))


class Camera(ThreadingHTTPServer):
    """A network camera that breaks off after each showing, and is gone after some."""

    daemon_threads = True

    def __init__(self, data: bytes, showings: int) -> None:
        self.data, self.left, self.file = data, showings, "camera.ts"
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.file}"


class Handler(BaseHTTPRequestHandler):
    server: Camera

    def do_GET(self) -> None:
        if self.server.left <= 0:
            self.send_error(503)
            return
        self.server.left -= 1
        self.send_response(200)
        if self.server.file != "camera.ts":  # a camera does not know how much it will send
            self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        self.wfile.write(self.server.data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def camera() -> Iterator[Camera]:
    with Camera(video_bytes(10, container="mpegts", codec="mpeg2video"), showings=3) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


async def test_a_camera_that_breaks_off_is_opened_again(camera: Camera) -> None:
    pictures = await taken(read_sources([Source(camera.url)], retries=5), at_most=25)
    assert len(pictures) == 25
    assert camera.left == 0
    assert all(p.unix_us > 0 for p in pictures)


async def test_a_video_behind_a_url_is_shown_once(camera: Camera) -> None:
    camera.data, camera.file = video_bytes(10, container="matroska"), "drive.mkv"
    pictures = await taken(read_sources([Source(camera.url)], retries=5), at_most=25)
    assert len(pictures) == 10
    assert camera.left == 2


async def test_a_video_behind_a_url_that_breaks_off_is_opened_again(camera: Camera) -> None:
    camera.data = video_bytes(40, container="matroska")
    camera.data, camera.file = camera.data[: len(camera.data) // 3], "drive.mkv"
    with pytest.raises(ImageError, match=r"drive\.mkv"):
        await taken(read_sources([Source(camera.url)], retries=1))
    assert camera.left == 0


async def test_a_slow_video_behind_a_url_and_one_without_pictures(camera: Camera) -> None:
    camera.data, camera.file = video_bytes(4, fps=1, container="matroska"), "slow.mkv"
    assert len(await taken(read_sources([Source(camera.url)], retries=5), at_most=25)) == 4
    assert camera.left == 2
    header = camera.data.index(bytes.fromhex("1f43b675"))  # the first cluster
    camera.data = camera.data[:header]
    with pytest.raises(ImageError, match=r"slow\.mkv"):
        await taken(read_sources([Source(camera.url)], retries=0))


async def test_a_camera_that_is_unplugged_for_good_is_told(camera: Camera) -> None:
    camera.left = 1
    found = []
    with pytest.raises(ImageError, match=r"camera\.ts"):
        async for capture in read_sources([Source(camera.url)], retries=1):
            found.append(capture)
    assert len(found) >= 8


async def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(ImageError, match="camera:63"):
        await taken(read_sources(parse_sources(["camera:63"]), retries=0))


def test_sources_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="once only"):
        parse_sources(["-", "-"])
    with pytest.raises(ImageError, match="no such video"):
        parse_sources([str(tmp_path / "a.mp4")])
    with pytest.raises(ImageError, match="no such file"):
        parse_sources([str(tmp_path / "a.jpg")])


async def test_only_the_newest_is_kept_and_errors_come_through() -> None:
    dropped: list[str] = []

    async def source() -> AsyncGenerator[Capture]:
        for k in range(10):
            yield Capture(b"", str(k))
            if k == 4:
                await asyncio.sleep(0.2)
        raise ImageError("unplugged")

    got: list[str] = []
    with pytest.raises(ImageError, match="unplugged"):
        async for capture in newest(source(), lambda c: dropped.append(c.name)):
            got.append(capture.name)
            await asyncio.sleep(0.05)
    assert got[0] in "01234"
    assert got[-1] == "9"
    assert sorted(got + dropped) == [str(k) for k in range(10)]


async def test_a_blocking_source_is_read_one_ahead_and_left_alone_at_the_end() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for k in range(100):
            read.append(k)
            yield k

    found = []
    source = in_thread(numbers)
    async for number in source:
        found.append(number)
        if number == 3:
            break
    await source.aclose()
    assert found == [0, 1, 2, 3]
    assert len(read) <= 8
    with pytest.raises(ZeroDivisionError):
        async for _ in in_thread(lambda: iter([1 // 0])):
            pass


async def test_any_iterable_is_a_source() -> None:
    async def pictures() -> AsyncGenerator[Image.Image]:
        yield photo(0)

    assert [c.name async for c in captures([photo_bytes(0), Path("a.png")])] == [
        f"<{len(photo_bytes(0))} bytes>",
        "a.png",
    ]
    assert [c.name async for c in captures(pictures())] == ["<image>"]


async def test_slots_follow_their_limit() -> None:
    limit = 1
    slots = Slots(lambda: limit)
    await slots.take()
    waiting = asyncio.create_task(slots.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    limit = 2
    slots.give()
    await waiting
    assert slots.taken == 1


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root) as one:
        yield one


def edge(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [str(BIN / "bitneck-edge"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=HANG_S, check=False)


def test_paths_on_standard_input_and_lines_of_json(server: Server, tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(photo_bytes(k))
    lines = f"{tmp_path / '0.png'}\n\n{tmp_path / 'none.png'}\n{tmp_path / '2.png'}\n"
    done = edge(
        "run", "-", "--json-lines", "--server", server.grpc, "--cache-dir", tmp_path / "c", stdin=lines.encode()
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(f["file"]).name for f in found[:-1]] == ["0.png", "none.png", "2.png"]
    assert "no such file" in found[1]["error"]
    assert (found[-1]["summary"]["frames"], found[-1]["summary"]["failed"]) == (2, 1)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_video_through_the_command_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes())
    done = edge("run", tmp_path / "a.mp4", "--json", "--server", server.grpc, "--cache-dir", tmp_path / "c")
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [f["seq"] for f in document["frames"]] == list(range(1, 21))
    assert document["summary"]["peak_mb"] > 10


def test_a_camera_through_the_command_line(server: Server, tmp_path: Path, camera: Camera) -> None:
    """Live sources print lines, drop what is overtaken, and end with an error when the camera is gone for good."""
    done = edge(
        "run", camera.url, "--json-lines", "--server", server.grpc, "--cache-dir", tmp_path / "c", "--retries", 0
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert lines[-1]["summary"]["frames"] + lines[-1]["summary"]["dropped"] >= 8
    assert "camera.ts" in lines[-2]["error"]
    assert b"Traceback" not in done.stderr


def test_one_document_for_an_endless_source_is_refused(server: Server) -> None:
    done = edge("run", "camera:0", "--json", "--server", server.grpc)
    assert done.returncode == 2
    assert b"--json-lines" in done.stderr


def test_bench_measures_every_split_point(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(0))
    done = edge("bench", tmp_path, "--bundle", tiny_bundle.root, "--frames", 5, "--json")
    document = json.loads(done.stdout)
    assert [s["split"] for s in document["splits"]] == ["s2", "s1"]
    for split in document["splits"]:
        assert set(split["ms"]) == {"load", "preprocess", "head", "encode", "total", "total_p95"}
        assert split["payload_bytes_mean"] > 0
        assert split["cpu_ms"] > 0
        each, none, packed = (split["link"][way] for way in ("--answers all", "--answers none", "--pack 10"))
        payload = split["payload_bytes_mean"]
        assert packed["up"] + 120 < none["up"] + 60 < each["up"] < payload + 220
        assert payload < packed["up"]
    assert document["peak_mb"] > 10
    table = edge("bench", tmp_path, "--bundle", tiny_bundle.root, "--frames", 2)
    assert table.returncode == 0
    assert b"peak of resident memory" in table.stdout
    nothing = edge("bench", os.devnull, "--bundle", tiny_bundle.root)
    assert nothing.returncode == 2
    assert b"Traceback" not in nothing.stderr
