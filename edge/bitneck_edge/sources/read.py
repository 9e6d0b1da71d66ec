"""Where pictures come from: photographs, folders, paths on standard input, video files, network streams and cameras.

A source that blocks is read in a thread of its own, one picture ahead of the program. Video needs the extra ``video``
(PyAV). A camera or network stream that breaks off is opened again, like the link to the cloud.
"""

import asyncio
import contextlib
import logging
import random
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from PIL import Image

from bitneck.backoff import Backoff
from bitneck.errors import ImageError, InvalidConfig
from bitneck.image import find_photos
from bitneck_edge.sources.capture import Capture

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["VIDEO_SUFFIXES", "Source", "in_thread", "parse_sources", "read_sources"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mjpeg", ".ogv"})
"""What is read as a video; any other file is a photograph."""

_CAMERA = "camera:"
_OPEN_S, _READ_S = 10.0, 5.0
"""How long a live source may take to open, and between two pictures."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.3, 5.0
_LAST_S = 1.5
"""A video was shown to its end if its last picture begins so shortly before its duration; sound may be longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """One thing that gives pictures.

    Attributes:
        name: as it was written: a path, ``-``, a URL, or ``camera:`` and a number or name.
        photos: of a path that is no video.
    """

    name: str
    photos: tuple[Path, ...] = ()

    @property
    def live(self) -> bool:
        """A camera or a network stream: its pictures come when they come."""
        return self.name.startswith(_CAMERA) or "://" in self.name

    @property
    def video(self) -> bool:
        """Whether it is read with PyAV."""
        return self.live or Path(self.name).suffix.lower() in VIDEO_SUFFIXES

    @property
    def stdin(self) -> bool:
        """Whether paths are read from standard input, a line each."""
        return self.name == "-"


def parse_sources(names: Sequence[str]) -> list[Source]:
    """The sources of a command line, checked as far as that can be done without opening them.

    Raises:
        InvalidConfig: standard input stands twice, or video is asked for and PyAV is not installed.
        ImageError: no such file.
    """
    sources = [Source(name) for name in names]
    if sum(source.stdin for source in sources) > 1:
        raise InvalidConfig("standard input (-) can be read once only")
    if any(source.video for source in sources):
        _av()
    for k, source in enumerate(sources):
        if source.video and not source.live and not Path(source.name).is_file():
            raise ImageError(f"{source.name}: no such video")
        if not source.video and not source.stdin:
            sources[k] = Source(source.name, tuple(find_photos(Path(source.name))))
    return sources


async def read_sources(
    sources: Sequence[Source],
    *,
    repeat: int = 1,
    fps: float | None = None,
    retries: int = 3,
    hurry: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[Capture]:
    """The pictures of some sources, one source after another.

    Args:
        sources: from `parse_sources`.
        repeat: go through them so often; standard input and live sources only once.
        fps: pictures a second, at most. A video file then plays at its own speed: pictures between are left out.
        retries: attempts to open a live source again, one after another without a picture; -1 for no end.
        hurry: asked before each picture that is not live; where it says so, `fps` is left aside.

    Raises:
        ImageError: a source cannot be read, or not any more.
    """
    pace = _Pace(fps)
    for turn in range(repeat):
        for source in sources:
            if source.stdin or source.live:
                if turn:
                    continue
                pictures = _standard_input() if source.stdin else _live(source.name, retries)
            elif source.video:
                name = source.name
                pictures = in_thread(lambda name=name: _video(name, fps))  # type: ignore[misc]
            else:
                pictures = _files(source.photos)
            async with contextlib.aclosing(pictures):
                async for capture in pictures:
                    if source.live:
                        if pace.due():
                            yield capture
                        continue
                    if not hurry():
                        await pace.wait()
                    yield Capture(capture.photo, capture.name, similar=capture.similar)


class _Pace:
    """Moments at equal distances; one that has passed is not made up for."""

    def __init__(self, fps: float | None) -> None:
        self._interval = 1.0 / fps if fps else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Until the next moment."""
        pause = self._next - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        self._advance()

    def due(self) -> bool:
        """Whether the next moment has come; a little early counts, for a camera's own clock."""
        if time.perf_counter() < self._next - self._interval * 0.1:
            return False
        self._advance()
        return True

    def _advance(self) -> None:
        now = time.perf_counter()
        self._next = max(self._next, now - self._interval) + self._interval if self._next else now + self._interval


async def _files(paths: Sequence[Path]) -> AsyncGenerator[Capture]:
    for path in paths:
        yield Capture(path, str(path))


async def _standard_input() -> AsyncGenerator[Capture]:
    """Paths, a line each; of a folder its photographs. A path that is none is told when it is read."""
    async with contextlib.aclosing(in_thread(lambda: _lines(sys.stdin))) as lines:
        async for line in lines:
            for path in await asyncio.to_thread(_found, Path(line)):
                yield Capture(path, str(path))


def _found(path: Path) -> list[Path]:
    return find_photos(path) if path.is_dir() else [path]


def _lines(stream: IO[str]) -> Iterator[str]:
    for line in stream:
        if path := line.rstrip("\r\n"):
            yield path


async def _live(name: str, retries: int) -> AsyncGenerator[Capture]:
    """A camera or network stream, opened again when it breaks off; a video behind a URL ends where it ends."""
    backoff, number = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=retries), 0
    complete = threading.Event()
    while True:
        try:
            async with contextlib.aclosing(in_thread(lambda: _video(name, None, complete))) as pictures:
                async for capture in pictures:
                    backoff.succeeded()
                    yield replace(capture, name=f"{name}#{number}")
                    number += 1
            if complete.is_set():
                return
            error = ImageError(f"{name}: it gave its last picture; is it still plugged in, and is it sending?")
        except ImageError as exc:
            error = exc
        pause_s = backoff.failed(random.random())  # noqa: S311  no secret
        if pause_s is None:
            raise error
        _LOG.warning("%s; opening it again in %.1f s", error, pause_s)
        await asyncio.sleep(pause_s)


def _av() -> Any:
    try:
        import av
    except ImportError as exc:
        raise InvalidConfig(f"video and cameras need `pip install 'bitneck[video]'` ({exc})") from exc
    return av


def _video(name: str, fps: float | None, complete: threading.Event | None = None) -> Iterator[Capture]:
    """The pictures of a video or camera, decoded; upright.

    Args:
        name: as in `Source`.
        fps: of a video file, the pictures between are left out; None for all.
        complete: set behind the last picture of something that has a duration, and was shown to its end.

    Raises:
        ImageError: it cannot be opened, has no pictures, or breaks off.
    """
    av = _av()
    live = Source(name).live
    file, file_format = _device(name)
    try:
        with av.open(file, format=file_format, timeout=(_OPEN_S, _READ_S) if live else None) as container:
            if not container.streams.video:
                raise ImageError(f"{name}: no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            due = 0.0
            shown_s: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                shown_s = frame.time if frame.time is not None else shown_s or 0.0
                if fps and not live and frame.time is not None:
                    if frame.time < due - 1e-6:
                        continue
                    due = max(due, frame.time - 1.0 / fps) + 1.0 / fps
                yield Capture(
                    _upright(frame), f"{name}#{number}", unix_us=time.time_ns() // 1000 if live else 0, similar=True
                )
            if shown_s is None:
                raise ImageError(f"{name}: no picture in it")
            if complete is not None and _shown_to_its_end(container, stream, shown_s):
                complete.set()
    except (av.FFmpegError, OSError, ValueError) as exc:
        raise ImageError(f"{name}: cannot be read as video ({exc})") from exc


def _shown_to_its_end(container: Any, stream: Any, shown_s: float) -> bool:
    """Whether the picture of this time is the last one; False where nobody knows how long it is.

    Some containers count their duration from their start time and others from zero.
    """
    if not container.duration:
        return False
    duration, start = container.duration / 1e6, (container.start_time or 0) / 1e6
    end: float = duration if duration > start else start + duration
    rate = float(stream.average_rate or 0)
    return shown_s >= end - max(_LAST_S, 2 / rate if rate else 0.0)


def _device(name: str) -> tuple[str, str | None]:
    """What FFmpeg opens for a source, and the format to open it with."""
    if not name.startswith(_CAMERA):
        return name, None
    device = name.removeprefix(_CAMERA)
    if sys.platform == "darwin":
        return device, "avfoundation"
    return (f"/dev/video{device}" if device.isdigit() else device), "v4l2"


def _upright(frame: "VideoFrame") -> Image.Image:
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


async def in_thread(source: Callable[[], Iterator[T]]) -> AsyncGenerator[T]:
    """What a blocking iterator gives, read in a thread of its own, one item ahead.

    The thread is a daemon's: one that blocks for ever, as on standard input, does not keep the program alive.

    Args:
        source: called in the thread.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[T | None, BaseException | None, bool]] = asyncio.Queue()
    room, stopped = threading.Semaphore(2), threading.Event()

    def hand(item: T | None, error: BaseException | None, last: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(items.put_nowait, (item, error, last))

    def read() -> None:
        try:
            for item in source():
                room.acquire()
                if stopped.is_set():
                    return
                hand(item, None, False)
            hand(None, None, True)
        except BaseException as exc:  # noqa: BLE001  raised again where the items are taken
            hand(None, exc, True)

    threading.Thread(target=read, name="bitneck-source", daemon=True).start()
    try:
        while True:
            item, error, last = await items.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
            room.release()
    finally:
        stopped.set()
        room.release()
