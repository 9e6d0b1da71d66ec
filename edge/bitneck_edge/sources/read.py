"""The pictures of sources: photographs, folders, watched folders, standard input, videos, network streams, cameras.

A source that blocks is read in its own thread, one picture ahead of the program. A camera or network stream that breaks
off is opened again after a pause.
"""

import asyncio
import contextlib
import logging
import random
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import IO

from bitneck.backoff import Backoff
from bitneck.errors import ImageError
from bitneck.image import find_photos
from bitneck.manifest import InputSpec
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.parse import Source
from bitneck_edge.sources.threads import in_thread
from bitneck_edge.sources.video import read_video
from bitneck_edge.sources.watch import watched, watching

__all__ = ["begun_watches", "read_sources"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.3, 5.0


async def read_sources(
    sources: Sequence[Source],
    *,
    repeat: int = 1,
    fps: float | None = None,
    retries: int = 3,
    hurry: Callable[[], bool] = lambda: False,
    spec: Callable[[], InputSpec | None] = lambda: None,
    watches: Mapping[str, AsyncGenerator[Capture]] = MappingProxyType({}),
) -> AsyncGenerator[Capture]:
    """The pictures of some sources, one source after another.

    Args:
        sources: from `parse_sources`.
        repeat: how often to go through them; endless sources are read once only.
        fps: at most this many pictures a second. A video file then plays at its own speed: pictures between are left
            out.
        retries: attempts in a row to open a live source again without getting a picture; -1 for no limit.
        hurry: called before each picture that is not live; if it returns True, `fps` is ignored.
        spec: see `read_video`.
        watches: of `begun_watches`; a folder that is not among them is watched when its turn comes.

    Raises:
        ImageError: a source cannot be read.
    """
    pace = _Pace(fps)
    for turn in range(repeat):
        for source in sources:
            if source.endless:
                if turn:
                    continue
                pictures = watches.get(source.name) if source.watch is not None else None
                pictures = pictures or _endless(source, retries, spec)
            elif source.video:
                name = source.name
                pictures = in_thread(lambda name=name: read_video(name, fps, spec=spec))  # type: ignore[misc]
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
                    unix_us = capture.unix_us if source.watch is not None else 0  # of a file that is new, or old
                    yield replace(capture, at=time.perf_counter(), unix_us=unix_us)


@contextlib.asynccontextmanager
async def begun_watches(sources: Sequence[Source]) -> AsyncGenerator[Mapping[str, AsyncGenerator[Capture]]]:
    """Watch the folders among some sources from now on, so that what appears before their turn is not passed over."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            source.name: await stack.enter_async_context(watching(Path(source.name), source.watch))
            for source in sources
            if source.watch is not None
        }


class _Pace:
    """Moments at equal intervals; a moment that has passed is skipped."""

    def __init__(self, fps: float | None) -> None:
        self._interval = 1.0 / fps if fps else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Wait until the next moment."""
        pause = self._next - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        self._advance()

    def due(self) -> bool:
        """Whether the next moment has come. A little early counts: a camera has its own clock."""
        if time.perf_counter() < self._next - self._interval * 0.1:
            return False
        self._advance()
        return True

    def _advance(self) -> None:
        now = time.perf_counter()
        self._next = max(self._next, now - self._interval) + self._interval if self._next else now + self._interval


def _endless(source: Source, retries: int, spec: Callable[[], InputSpec | None]) -> AsyncGenerator[Capture]:
    if source.watch is not None:
        return watched(Path(source.name), source.watch)
    return _standard_input() if source.stdin else _live(source.name, retries, spec)


async def _files(paths: Sequence[Path]) -> AsyncGenerator[Capture]:
    for path in paths:
        yield Capture(path, str(path))


async def _standard_input() -> AsyncGenerator[Capture]:
    """One path on each line, of a photograph or a folder. A path that does not exist fails when it is read."""
    async with contextlib.aclosing(in_thread(lambda: _listed(sys.stdin))) as pictures:
        async for capture in pictures:
            yield capture


def _listed(stream: IO[str]) -> Iterator[Capture]:
    for line in stream:
        if not (name := line.rstrip("\r\n")):
            continue
        path = Path(name)
        try:
            photos = find_photos(path) if path.is_dir() else [path]
        except ImageError as exc:  # a folder without photographs fails alone
            yield Capture(path, name, broken=exc)
            continue
        for photo in photos:
            yield Capture(photo, str(photo))


async def _live(name: str, retries: int, spec: Callable[[], InputSpec | None]) -> AsyncGenerator[Capture]:
    """A camera or network stream, opened again when it breaks off; a video behind a URL ends with its last picture."""
    backoff, number = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=retries), 0
    complete = threading.Event()
    while True:
        try:
            async with contextlib.aclosing(in_thread(lambda: read_video(name, None, complete, spec))) as pictures:
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
