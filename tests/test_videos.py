"""Videos that are damaged, joined, turned, without times, or gigantic. Every file is made here, by FFmpeg."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from bitneck.bundle import Bundle
from bitneck.errors import ImageError
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.parse import parse_sources
from bitneck_edge.sources.video import MAX_VIDEO_PIXELS, read_video
from bitneck_testing.photographs import photo_bytes
from bitneck_testing.processes import BIN, Server, running_server

WIDTH, HEIGHT = 64, 48


def video_bytes(count: int = 20, fps: int = 10, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    """A short video whose pictures become brighter one by one, with a bright corner at their top left."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(count):
            picture = np.full((HEIGHT, WIDTH, 3), 20 + 100 * k // count, np.uint8)
            picture[:16, :16] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return buffer.getvalue()


def pictures(path: Path, fps: float | None = None) -> list[Capture]:
    return list(read_video(str(path), fps))


def with_broken_pictures(data: bytes, numbers: set[int]) -> bytes:
    """An AVI of JPEGs in which some are only zeros."""
    damaged, at = bytearray(data), 0
    for number in range(max(numbers) + 1):
        at = damaged.index(b"\xff\xd8\xff", at + 3)
        if number in numbers:
            end = damaged.index(b"\xff\xd9", at)
            damaged[at:end] = bytes(end - at)
            at = end
    return bytes(damaged)


def test_a_broken_picture_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "street.avi"
    path.write_bytes(with_broken_pictures(video_bytes(container="avi", codec="mjpeg"), {7, 12}))
    found = pictures(path)
    assert [capture.name for capture in found] == [f"{path}#{k}" for k in range(20)]
    broken = [k for k, capture in enumerate(found) if capture.broken is not None]
    assert broken == [7, 12]
    assert "cannot be decoded" in str(found[7].broken)
    levels = [np.asarray(c.photo)[30:, 30:].mean() for c in found if c.broken is None]
    assert levels == sorted(levels)  # none of the others was lost or taken twice


def test_many_broken_pictures_in_a_row_end_a_video(tmp_path: Path) -> None:
    path = tmp_path / "street.avi"
    path.write_bytes(with_broken_pictures(video_bytes(60, container="avi", codec="mjpeg"), set(range(10, 50))))
    found = []
    with pytest.raises(ImageError, match="25 pictures in a row"):
        for capture in read_video(str(path), None):
            found.append(capture)
    assert sum(capture.broken is None for capture in found) == 10


@pytest.mark.parametrize("count", [1, 3])
def test_recordings_that_were_joined_play_to_their_end(tmp_path: Path, count: int) -> None:
    path = tmp_path / "joined.ts"
    path.write_bytes(video_bytes(60, fps=30, container="mpegts", codec="mpeg2video") * count)
    assert len(pictures(path)) == 60 * count
    thinned = len(pictures(path, fps=10))
    assert 20 * count - 2 <= thinned <= 20 * count + 2


def test_a_video_without_times_plays_at_its_rate(tmp_path: Path) -> None:
    path = tmp_path / "raw.m4v"
    path.write_bytes(video_bytes(50, fps=25, container="m4v"))
    assert len(pictures(path)) == 50
    assert 9 <= len(pictures(path, fps=5)) <= 12


@pytest.mark.parametrize("name", ["a.h264", "a.3gp", "a.HEVC", "a.mts", "a.mjpg", "a.wmv"])
def test_these_are_videos(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (source,) = parse_sources([str(tmp_path / name)])
    assert source.video


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 whose first track has another display matrix."""
    at = data.index(b"tkhd") + 4
    matrix = at + (52 if data[at] == 1 else 40)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[matrix : matrix + 36] == identity
    fixed = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:matrix] + fixed + data[matrix + 36 :]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((-1, 0, 0, 1), ImageOps.mirror),
        ((1, 0, 0, -1), ImageOps.flip),
        ((-1, 0, 0, -1), lambda image: image.rotate(180)),
        ((0, 1, -1, 0), lambda image: image.rotate(-90, expand=True)),
        ((0, -1, 1, 0), lambda image: image.rotate(90, expand=True)),
        ((0, 1, 1, 0), lambda image: ImageOps.mirror(image.rotate(-90, expand=True))),
        ((0, -1, -1, 0), lambda image: ImageOps.flip(image.rotate(-90, expand=True))),
    ],
)
def test_pictures_are_shown_as_a_player_shows_them(tmp_path: Path, matrix: Any, shown: Any) -> None:
    plain, other = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    plain.write_bytes(video_bytes(2))
    other.write_bytes(turned(plain.read_bytes(), *matrix))
    expected, got = shown(pictures(plain)[0].photo), pictures(other)[0].photo
    assert isinstance(got, Image.Image)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


MEMORY = """
import sys
from bitneck.errors import ImageError
from bitneck_edge.sources.video import read_video
try:
    for _ in read_video(sys.argv[1], None):
        pass
    print("read")
except ImageError as exc:
    print(exc)
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) // 1024)
"""


@pytest.mark.parametrize("suffix", [".mov", ".avi"])
def test_a_gigantic_video_is_refused_before_it_takes_memory(tmp_path: Path, suffix: str) -> None:
    path, side = tmp_path / f"gigantic{suffix}", 12_000
    assert side * side > MAX_VIDEO_PIXELS
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side, "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((side, side), np.uint8), format="gray")
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert path.stat().st_size < 2_000_000
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, timeout=120, check=True)
    text, mib = done.stdout.strip().rsplit("\n", 1)
    assert str(MAX_VIDEO_PIXELS) in text
    assert int(mib) < 400  # the interpreter and FFmpeg; three pictures as RGB would be 1,300


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root) as running:
        yield running


def edge(server: Server, tmp_path: Path, *sources: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [BIN / "bitneck-edge", "run", "--server", server.grpc, "--cache-dir", tmp_path / "cache", "--json-lines"]
    environment = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(
        [*command, *sources], input=lines, capture_output=True, text=True, timeout=90, env=environment
    )  # type: ignore[list-item]


def test_a_broken_picture_fails_alone_on_the_command_line(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "street.avi"
    path.write_bytes(with_broken_pictures(video_bytes(container="avi", codec="mjpeg"), {5}))
    done = edge(server, tmp_path, path)
    assert done.returncode == 1
    assert len([line for line in done.stdout.splitlines() if '"labels"' in line]) == 19
    assert f"{path}#5" in done.stdout + done.stderr


def test_a_folder_without_photographs_among_lines_fails_alone(server: Server, tmp_path: Path) -> None:
    empty, good = tmp_path / "empty", tmp_path / "good.png"
    empty.mkdir()
    good.write_bytes(photo_bytes(1))
    done = edge(server, tmp_path, "-", lines=f"{good}\n{empty}\n{tmp_path / 'nowhere.png'}\n{good}\n")
    assert done.returncode == 1
    assert len([line for line in done.stdout.splitlines() if '"labels"' in line]) == 2
    assert "no photographs in this folder" in done.stdout + done.stderr
    assert "nowhere.png" in done.stdout + done.stderr
