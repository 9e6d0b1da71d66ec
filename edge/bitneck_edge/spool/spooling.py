"""A client's spool with all that works on it: frames in, frames out, and what was written to the disk in time."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Self

from bitneck.bundle import Bundle
from bitneck.wire.link_bytes import LinkBytes
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.link.link import Link
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import Limits, SpoolCounts
from bitneck_edge.spool.disk_thread import DiskThread
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.outage import HandOut, Outage
from bitneck_edge.spool.sender import Sender
from bitneck_edge.spool.writer import Writer

__all__ = ["Spooling"]

_LOG = logging.getLogger(__name__)
_SYNC_S = 0.5
_TIDY_EVERY = 20
"""Tidied up once in so many syncs."""
_DRAINED_POLL_S, _DRAINED_S = 0.1, 30.0
_KNOW_S = 1.0
_CLOSE_S = 30.0
"""A disk that does not answer for so long keeps no client from being closed."""


class Spooling:
    """The spool of an open client. `open` makes it, `start` lets it send.

    Attributes:
        outage: takes the frames that the link does not take.

    Args:
        spool: of the device.
        files: works on its files; it is closed with it.
        settings: of the client, with a spool.
        live: the link of the live frames; None while there is none.
        hand_out: the program's function for answers.
    """

    def __init__(
        self,
        spool: Spool,
        files: DiskThread,
        settings: EdgeSettings,
        live: Callable[[], Link | None],
        hand_out: HandOut,
    ) -> None:
        self._spool = spool
        self._program = hand_out
        self._files, self._house = files, DiskThread("bitneck-spool-sync")
        self._writer = Writer(spool, self._files)
        self._sender = Sender(spool, self._files, self._house, settings, live, self._hand_out)
        self.outage = Outage(self._writer, spool.spool_id, self._hand_out, self._sender.look)
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls, settings: EdgeSettings, live: Callable[[], Link | None], hand_out: HandOut) -> Self | None:
        """Open the spool of the settings; None if they have none.

        Raises:
            InvalidConfig: see `Spool.open`.
        """
        if settings.spool is None:
            return None
        limits = Limits(
            most_bytes=round(settings.spool_mb * 1e6),
            most_age_s=settings.spool_age * 3600,
            first=settings.spool_first,
        )
        folder, files, left = settings.spool, DiskThread("bitneck-spool"), contextlib.ExitStack()

        def begin() -> Spool:
            spool = Spool.open(folder, limits)
            left.callback(spool.close)
            return spool

        try:
            return cls(await files.run(begin), files, settings, live, hand_out)
        except BaseException:  # nobody waits for it any more: nobody else would close it
            files.post(left.close)
            files.end()
            raise

    def start(self, keeper: Coroutine[Any, Any, None]) -> None:
        """Send what is there from now on, and bring to the disk what is written.

        Args:
            keeper: keeps the client's own session open; it ends with the others.
        """
        self._tasks = [asyncio.create_task(each) for each in (self._sender.run(), self._keep_house(), keeper)]
        for task in self._tasks:
            task.add_done_callback(_log_failure)

    async def know(self, bundle: Bundle) -> None:
        """Keep what answers to a bundle's frames are understood with, before its first frame comes.

        A disk that does not answer is waited for a moment only: it is tried again with each frame.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KNOW_S):
                await self._house.run(self._writer.know, bundle)

    @property
    def spool_id(self) -> str:
        """The name under which the cloud knows the spool."""
        return self._spool.spool_id

    @property
    def counts(self) -> SpoolCounts:
        """What became of its frames."""
        counts = self._sender.counts
        return replace(counts, dropped=counts.dropped + self._writer.dropped)

    @property
    def link_bytes(self) -> LinkBytes:
        """What has crossed the link for its frames."""
        return self._sender.link_bytes

    async def drained(self, stop: asyncio.Event) -> None:
        """Wait until nothing more can be sent, nothing was answered for half a minute, or `stop` is set."""
        kept, since = -1, time.monotonic()
        while not await self._idle(stop):
            if (now_kept := self._spool.counts().kept) != kept:
                kept, since = now_kept, time.monotonic()
            elif time.monotonic() - since > _DRAINED_S:
                _LOG.warning("%d frames stay in the spool: none was answered for %.0f s", kept, _DRAINED_S)
                return
            await asyncio.sleep(_DRAINED_POLL_S)

    async def stop(self) -> None:
        """Send no more, and open no more sessions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """The session has ended: keep what is unanswered, and close the spool, also if this is cancelled."""
        try:
            await self.outage.close()
        finally:
            self._files.post(self._spool.close)  # behind all that is to be written, however long that takes
            self._files.end()
            self._house.end()
        limit = time.monotonic() + _CLOSE_S
        for thread in (self._files, self._house):
            if not await thread.close(limit - time.monotonic()):
                _LOG.error(
                    "the disk of the spool does not answer: frames that it has not taken are lost with the process"
                )
                return

    async def _idle(self, stop: asyncio.Event) -> bool:
        """Whether nothing can be sent now, `stop` is set, the disk does not answer, or the spool is closed."""
        asked, stopped = asyncio.ensure_future(self._sender.idle()), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({asked, stopped}, timeout=_DRAINED_S, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set() and not asked.done():
                _LOG.warning("frames stay in the spool: its disk has not answered for %.0f s", _DRAINED_S)
            return stop.is_set() or not asked.done() or asked.exception() is not None or asked.result()
        finally:
            asked.cancel()
            stopped.cancel()

    def _hand_out(self, result: Answer | Failure) -> None:
        """Give the program an answer. What it makes of it is its own business."""
        try:
            self._program(result)
        except Exception:  # noqa: BLE001  a bug there must not have the frame answered again and again
            _LOG.exception("the program failed on the answer to a frame of the spool")

    async def _keep_house(self) -> None:
        turns, failing = 0, False
        while True:
            await asyncio.sleep(_SYNC_S)
            turns += 1
            try:
                if self._spool.dirty:
                    await self._house.run(self._spool.sync)
                    await self._house.run(self._spool.prepare)
                if turns % _TIDY_EVERY == 0:
                    await self._house.run(self._spool.tidy)
            except OSError as exc:
                if not failing:  # once, not each half second
                    _LOG.warning("the spool cannot be tidied up: %s; it is tried again", exc)
                failing = True
            else:
                failing = failing and turns % _TIDY_EVERY != 0


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _LOG.error("a part of the spool stops working: %r", error, exc_info=error)
