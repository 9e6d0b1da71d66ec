"""A picture with the moment when it was taken; and what is done with pictures that come faster than they are sent."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from bitneck.errors import ImageError
from bitneck_edge.sources.photo import Photo, PhotoLike, Pixels, photo_of

__all__ = ["Ahead", "Capture", "captures", "newest"]


@dataclass(frozen=True, slots=True)
class Capture:
    """A picture with the moment when it was taken.

    Attributes:
        photo: the picture.
        name: for its answer.
        at: when it was taken, on `time.perf_counter`'s clock.
        unix_us: the same on the wall clock, microseconds since 1970; 0 for a file, whose picture is older.
        similar: whether it resembles the picture before it, as in a video.
        broken: why there is no picture, if its source could not give it; then it fails alone.
    """

    photo: Photo
    name: str
    at: float = field(default_factory=time.perf_counter)
    unix_us: int = 0
    similar: bool = False
    broken: ImageError | None = None

    @classmethod
    def of(cls, photo: "PhotoLike | Capture") -> "Capture":
        """The capture itself, or a photograph as a capture of this moment. What is no photograph fails alone."""
        if isinstance(photo, Capture):
            return photo
        try:
            picture = photo_of(photo)
        except ImageError as exc:
            return cls(b"", f"<{type(photo).__name__}>", broken=exc)
        match picture:
            case Path():
                name = str(picture)
            case Image.Image():
                name = str(getattr(picture, "filename", "") or "<image>")
            case Pixels():
                name = f"<{picture.order} array>"
            case _:
                name = str(getattr(photo, "name", "") or f"<{len(picture)} bytes>")
        return cls(picture, name)


async def captures(
    photos: Iterable[PhotoLike | Capture] | AsyncIterable[PhotoLike | Capture],
) -> AsyncGenerator[Capture]:
    """Any source as an asynchronous one."""
    if isinstance(photos, AsyncIterable):
        async for photo in photos:
            yield Capture.of(photo)
    else:
        for photo in photos:
            yield Capture.of(photo)


async def newest(source: AsyncGenerator[Capture], on_drop: Callable[[Capture], None]) -> AsyncGenerator[Capture]:
    """The newest picture whenever the caller asks for one; a picture that a newer one overtakes is dropped.

    Args:
        source: is read all the time, and closed at the end.
        on_drop: called with each picture that is dropped.
    """
    waiting: Capture | None = None
    arrived = asyncio.Event()

    async def read() -> None:
        nonlocal waiting
        async with contextlib.aclosing(source):
            async for capture in source:
                if waiting is not None:
                    on_drop(waiting)
                waiting = capture
                arrived.set()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: arrived.set())
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            if waiting is not None:
                capture, waiting = waiting, None
                if reader.done():
                    arrived.set()
                yield capture
            elif reader.done():
                reader.result()
                return
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class Ahead:
    """Reads a source from now on. Until somebody takes its pictures, the newest few are kept, the others dropped.

    Args:
        source: of the pictures; closed at the end.
        most: pictures that are kept.
        on_drop: called with each picture that is dropped.
    """

    def __init__(self, source: AsyncGenerator[Capture], most: int, on_drop: Callable[[Capture], None]) -> None:
        self._source, self._most, self._on_drop = source, most, on_drop
        self._kept: deque[Capture] = deque()
        self._taken = False
        self._arrived, self._empty = asyncio.Event(), asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._arrived.set())

    async def pictures(self) -> AsyncGenerator[Capture]:
        """The pictures; none is dropped any more. What the source raises comes behind them."""
        self._taken = True
        while True:
            await self._arrived.wait()
            while self._kept:
                yield self._kept.popleft()
            self._empty.set()
            if self._reader.done():
                self._reader.result()
                return
            self._arrived.clear()

    async def close(self) -> None:
        """Read no more."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async with contextlib.aclosing(self._source):
            async for capture in self._source:
                while self._taken and self._kept:
                    self._empty.clear()
                    await self._empty.wait()
                if len(self._kept) == self._most:
                    self._on_drop(self._kept.popleft())
                self._kept.append(capture)
                self._arrived.set()
