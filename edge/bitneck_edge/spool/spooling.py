"""A client's spool with all that works on it: frames in, frames out, and what was written to the disk in time."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Self

from bitneck.backoff import Backoff
from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import InvalidConfig
from bitneck.wire.link_bytes import LinkBytes
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.link.link import Link
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import Limits, SpoolCounts
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
_OPEN_S = 5.0
"""A disk that does not answer for so long keeps no client from being opened."""
_CLOSE_S = 30.0
"""Nor from being closed, after so long."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 1.0, 60.0
"""Between attempts to open a spool whose disk has refused at last."""


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
        self.outage = Outage(self._writer, self._hand_out, self._sender.look)
        self._ending = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(cls, settings: EdgeSettings, live: Callable[[], Link | None], hand_out: HandOut) -> Self | None:
        """Open the spool of the settings; None if they have none.

        A disk that does not answer is waited for a few seconds. Then the spool is opened beside the client, when the
        disk answers: frames wait for that in memory, as they do whenever the disk is slow.

        Raises:
            InvalidConfig: see `Spool.begin`; only in these few seconds.
        """
        if settings.spool is None:
            return None
        limits = Limits(
            most_bytes=round(settings.spool_mb * 1e6),
            most_age_s=settings.spool_age * 3600,
            first=settings.spool_first,
        )
        spooling = cls(Spool(settings.spool, limits), DiskThread("bitneck-spool"), settings, live, hand_out)
        try:
            await spooling._begin()
        except BaseException:  # nobody waits for it any more: nobody else would close it
            spooling._end()
            raise
        return spooling

    async def _begin(self) -> None:
        opening = asyncio.ensure_future(self._files.run(self._spool.begin))
        try:
            await asyncio.wait({opening}, timeout=_OPEN_S)
            if opening.done():
                opening.result()
                return
        finally:
            opening.cancel()
        _LOG.warning(
            "the disk of the spool %s has not answered for %.0f s: the client goes on without it, and opens it when it "
            "does. Until then nothing of it is sent, and frames that it is to keep wait in memory",
            self._spool.folder, _OPEN_S,
        )  # fmt: skip
        self._files.post(self._begin_at_last)

    def _begin_at_last(self) -> None:
        """Open the spool, if that has not succeeded meanwhile. While its disk refuses, everything behind this waits."""
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S)
        while not self._spool.opened:
            try:
                self._spool.begin()
            except InvalidConfig as exc:
                pause_s = backoff.failed(random.random()) or _MOST_PAUSE_S  # noqa: S311  no secret
                _LOG.warning("%s; trying again in %.0f s, and frames wait in memory", exc, pause_s)
                if self._ending.wait(pause_s):
                    return
        _LOG.info("the spool %s is open now", self._spool.folder)

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
        if not self._spool.opened:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KNOW_S):
                await self._house.run(self._writer.know, bundle)

    @property
    def spool_id(self) -> str:
        """The name under which the cloud knows the spool; empty before it is open."""
        return self._spool.spool_id

    @property
    def counts(self) -> SpoolCounts:
        """What became of its frames."""
        counts = self._sender.counts
        return replace(counts, dropped=counts.dropped + self._writer.dropped, waiting=self._writer.waiting)

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
            self._end()
        if not self._spool.opened and not self._writer.waiting:
            return  # nothing can be lost
        limit = time.monotonic() + _CLOSE_S
        for thread in (self._files, self._house):
            if not await thread.close(limit - time.monotonic()):
                _LOG.error(
                    "the disk of the spool does not answer: frames that it has not taken are lost with the process"
                )
                return

    def _end(self) -> None:
        """Close the spool behind all that is to be written, however long that takes."""
        self._ending.set()
        self._files.post(self._spool.close)
        self._files.end()
        self._house.end()

    async def _idle(self, stop: asyncio.Event) -> bool:
        """Whether nothing can be sent now, `stop` is set, the disk does not answer, or the spool is closed."""
        asked, stopped = asyncio.ensure_future(self._sender.idle()), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({asked, stopped}, timeout=_DRAINED_S, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set() and not asked.done():
                _LOG.warning("what is in the spool stays there: its disk has not answered for %.0f s", _DRAINED_S)
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
