"""The edge's half of a bundle while its files come: which operating points can be used already, and what comes next.

server --FetchFile--> FileStore --files of a point whole, cost checked--> ready(point)
^ now: `need`; in the background, within a rate: `start`
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

from bitneck.backoff import Backoff
from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleCorrupt, Unreachable
from bitneck.manifest import FileEntry, Manifest
from bitneck_edge.bundles.cost import CostCheck
from bitneck_edge.bundles.pace import Pacer
from bitneck_edge.bundles.store import FileStore

__all__ = ["FileSource", "Progress", "Supply", "first_point"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.6, 5.0
_BACKGROUND_PAUSE_S = 30.0
"""Longest pause between attempts in the background: the link will come back some time."""

Progress = Callable[[int, int], None]
"""Called with (bytes that have come, bytes of all that is needed)."""


class FileSource(Protocol):
    """Where files come from."""

    def fetch(self, path: str, offset: int, length: int = 0) -> AsyncGenerator[bytes]:
        """A file in chunks, from a byte on; with `length` that many bytes only."""

    async def close(self) -> None:
        """No more files are wanted."""


def first_point(manifest: Manifest) -> str:
    """The operating point that a new device begins with: the most accurate one of the earliest split point.

    The earliest head is the smallest to fetch. The others come behind it.
    """
    ladder = manifest.ladder
    for split in manifest.split_points:
        points = [point for point in ladder.measured if point.split == split.name]
        if points:
            return max(points, key=lambda point: (point.accuracy, -point.payload_bytes)).id
    return ladder.best.id


class Supply:
    """The files of one bundle on this device. `need` and `start` fetch them; `close` ends that.

    Attributes:
        bundle: its manifest, and the files that are here.

    Args:
        store: of this device.
        bundle: of `store`, with the precision of what the device runs.
        source: the server.
        trusted: take ONNX files whose cost cannot be bounded, because the bundle was pinned.
        retries: attempts after a download that broke off; -1 for ever.
    """

    def __init__(
        self,
        store: FileStore,
        bundle: Bundle,
        source: FileSource,
        *,
        trusted: bool = False,
        retries: int = 3,
    ) -> None:
        self.bundle = bundle
        self._store = store
        self._source = source
        self._retries = retries
        self._check = None if trusted else CostCheck(bundle.manifest, bundle.precision, self._read)
        self._ready: set[str] = set()
        self._refused: set[str] = set()
        self._wanted: list[str] = []
        self._everything: list[str] = []
        self._changed = asyncio.Event()
        self._fetching = asyncio.Lock()
        self._urgent = 0
        self._background: asyncio.Task[None] | None = None

    def ready(self, point_id: str) -> bool:
        """Whether an operating point can be used."""
        return point_id in self._ready

    async def look(self, points: Iterable[str]) -> None:
        """Find out which operating points can be used already; this reads and checks their files once."""
        for point_id in points:
            if not await self._store.run(self._missing, [point_id]):
                try:
                    await self._admit(point_id)
                except BundleCorrupt as exc:
                    _LOG.error("operating point %s is left out: %s", point_id, exc)

    async def need(self, points: Sequence[str], progress: Progress = lambda _done, _all: None) -> None:
        """Fetch what operating points need, now. A download that breaks off is tried again and goes on.

        Args:
            points: their ids.
            progress: see `Progress`.

        Raises:
            Unavailable: files are missing, and no server can be reached.
            BundleCorrupt: a file arrived damaged, or must not be run.
            BitneckError: the server refuses.
        """
        self._urgent += 1
        self._changed.set()  # the background makes way
        try:
            async with self._fetching:
                await self._fetch_now(points, progress)
        finally:
            self._urgent -= 1
            self._changed.set()  # the background goes on
        for point_id in points:
            await self._admit(point_id)

    def want(self, point_id: str) -> None:
        """Fetch an operating point in the background, before all others. Nothing happens if it is here."""
        if point_id not in self._ready and point_id not in self._wanted and point_id not in self._refused:
            self._wanted.append(point_id)
            self._changed.set()

    def start(self, points: Sequence[str], pacer: Pacer) -> None:
        """Fetch operating points in the background, in this order, and what `want` asks for.

        Args:
            points: their ids.
            pacer: bounds the rate, and keeps out of the way of frames.
        """
        if self._background is None:
            self._everything = list(points)
            self._background = asyncio.create_task(self._run(pacer))

    async def close(self) -> None:
        """Stop fetching; what has come stays."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)
        await self._source.close()

    def _read(self, path: str) -> bytes:
        return self.bundle.path(path).read_bytes()

    def _missing(self, points: Iterable[str]) -> dict[str, FileEntry]:
        """The files of operating points that are not here, in the order of their use."""
        manifest = self.bundle.manifest
        paths = dict.fromkeys(path for point in points for path in manifest.files_of(point, self.bundle.precision))
        return {path: manifest.files[path] for path in paths if not self._store.has(manifest.files[path])}

    async def _admit(self, point_id: str) -> None:
        """Check the files of a point, and let it be used."""
        if point_id in self._ready:
            return
        if self._check is not None:
            try:
                await self._store.run(self._check.check, point_id)
            except BundleCorrupt:
                self._refused.add(point_id)
                raise
        self._ready.add(point_id)

    async def _fetch_now(self, points: Sequence[str], progress: Progress) -> None:
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=self._retries)
        while missing := await self._store.run(self._missing, points):
            counted = _Counted(
                await self._store.run(lambda files: sum(map(self._store.received, files)), list(missing.values())),
                sum(entry.size for entry in missing.values()),
                progress,
            )
            try:
                for path, entry in missing.items():
                    await self._store.receive(path, entry, self._source.fetch, counted.add)
            except BitneckError as exc:
                if counted.came:
                    backoff.succeeded()
                if not exc.transient:
                    raise
                pause_s = backoff.failed(random.random())  # noqa: S311  no secret
                if pause_s is None:
                    raise
                _LOG.warning("%s; the download goes on in %.1f s", exc, pause_s)
                await asyncio.sleep(pause_s)

    async def _run(self, pacer: Pacer) -> None:
        """Fetch in the background until everything is here, and then what is wanted."""
        pause_s = _FIRST_PAUSE_S
        while True:
            self._changed.clear()
            point_id = next((p for p in (*self._wanted, *self._everything) if p not in self._ready), None)
            if point_id is None or self._urgent:
                if not self._urgent:
                    await self._source.close()  # an idle connection costs pings
                await self._changed.wait()
                continue
            try:
                await self._fetch_paced(point_id, pacer)
                pause_s = _FIRST_PAUSE_S
            except BundleCorrupt as exc:
                self._forget(point_id)
                _LOG.error("operating point %s is left out: %s", point_id, exc)
            except BitneckError as exc:
                if not exc.transient and not isinstance(exc, Unreachable):
                    _LOG.warning("fetching the other operating points ends: %s", exc)
                    return
                _LOG.info("%s; fetching the other operating points goes on in %.0f s", exc, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _BACKGROUND_PAUSE_S)

    async def _fetch_paced(self, point_id: str, pacer: Pacer) -> None:
        """Fetch what one operating point needs, piece by piece; ends early if something urgent comes."""
        for path, entry in (await self._store.run(self._missing, [point_id])).items():

            async def pieces(name: str, offset: int, size: int = entry.size) -> AsyncGenerator[bytes]:
                while offset < size:
                    length = await pacer.next_piece(size - offset)
                    begun, before = time.perf_counter(), offset
                    async with contextlib.aclosing(self._source.fetch(name, offset, length)) as chunks:
                        async for data in chunks:
                            offset += len(data)
                            yield data
                    if offset == before:
                        return  # the server has no more: the store says what is missing
                    pacer.took(length, time.perf_counter() - begun)
                    if self._urgent:
                        raise _Interrupted

            async with self._fetching:
                try:
                    await self._store.receive(path, entry, pieces, lambda _size: None)
                except _Interrupted:
                    return
        if not await self._store.run(self._missing, [point_id]):
            await self._admit(point_id)
            self._forget(point_id)
            _LOG.info("operating point %s can be used now", point_id)

    def _forget(self, point_id: str) -> None:
        """Do not fetch a point any more."""
        for points in (self._wanted, self._everything):
            if point_id in points:
                points.remove(point_id)


class _Counted:
    """Bytes that have come, told on as they come. `came` says whether any did."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.came = False
        self._done, self._total, self._progress = done, total, progress
        progress(done, total)

    def add(self, size: int) -> None:
        """So many have come."""
        self.came = True
        self._done += size
        self._progress(self._done, self._total)


class _Interrupted(Exception):
    """Something urgent has to be fetched first."""
