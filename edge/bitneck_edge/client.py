"""The edge client: photographs in, answers out.

async with EdgeClient("cloud.example:50051") as client:
    answer = await client.infer(Path("photo.jpg"))
    async for answer in client.stream(paths):
        ...

`bitneck_edge.sync.SyncEdgeClient` does the same without ``async``.
"""

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from types import TracebackType
from typing import Any, Self

from bitneck.errors import BitneckError, BundleMismatch, Unavailable
from bitneck.runtime import ModulePool
from bitneck.wire.messages import Device
from bitneck.workers import Workers
from bitneck_edge.answers.finishing import Finishing
from bitneck_edge.answers.results import Answer, Failure, Switch
from bitneck_edge.bundles.fetch import open_supply
from bitneck_edge.bundles.supply import Supply
from bitneck_edge.encoder import FIRST_RUN_S
from bitneck_edge.facts import ClientFacts
from bitneck_edge.observe.observing import metrics_page, reports
from bitneck_edge.observe.state import Tally
from bitneck_edge.passage import Passage, Ways
from bitneck_edge.pipeline import Slots, pipeline
from bitneck_edge.points import MeanInterval
from bitneck_edge.reopening import keep_current, keep_open, may_pass, open_at_last
from bitneck_edge.session import EdgeSession
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.sources.capture import Capture, captures, newest
from bitneck_edge.sources.photo import Photo, PhotoLike
from bitneck_edge.spool.outage import HandOut
from bitneck_edge.spool.spooling import Spooling

__all__ = ["EdgeClient"]

_LOG = logging.getLogger(__name__)
_KEPT_SWITCHES = 1000


class EdgeClient(ClientFacts):
    """A session with a cloud server. Use it as an asynchronous context manager.

    Attributes:
        settings: of the client.
        switches: the last 1,000 changes of the operating point.
        dropped: pictures that newer ones overtook.
        workers: photographs that are encoded at once.
        tally: counts of what it has done.

    Args:
        server: HOST:PORT; None for the settings' own.
        settings: everything else.
        on_fetch: progress of a bundle's download, (bytes done, bytes in all).
        on_switch: called when the operating point changes.
        on_spooled: called with each answer to a frame of the spool (`EdgeSettings.spool`), or with the reason why there
            is none. `Answer.spool` and `Answer.captured_unix_us` tell which frame it is. It leaves the spool when the
            function has returned.
        finish: called in a thread with each photograph and its answer, for example to write it to a file. It returns
            the answer that the client gives; see `Finishing`.
        **values: single settings, such as ``point="s1-r3"``, in place of a `settings` object.

    Raises:
        InvalidConfig: a setting is refused.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        settings: EdgeSettings | None = None,
        on_fetch: Callable[[int, int], None] = lambda _done, _all: None,
        on_switch: Callable[[Switch], None] = lambda _switch: None,
        on_spooled: HandOut = lambda _result: None,
        finish: Callable[[Photo, Answer], Answer] | None = None,
        **values: Any,
    ) -> None:
        self.settings = settings or EdgeSettings.load({"server": server, **values})
        self.switches: deque[Switch] = deque(maxlen=_KEPT_SWITCHES)
        self.dropped = 0
        self.workers = self.settings.workers or min(2, os.cpu_count() or 1)
        self.tally = Tally()
        self._on_fetch = on_fetch
        self._on_switch = on_switch
        self._on_spooled = on_spooled
        self._spooling: Spooling | None = None
        self._finishing = Finishing(finish)
        self._pool = ModulePool(first_run_s=FIRST_RUN_S)
        self._interval = MeanInterval()
        self._threads: Workers | None = None
        self._session: EdgeSession | None = None
        self._ways = Ways(
            usable=self._usable,
            interval_s=lambda: self._interval.seconds,
            renews=lambda session: self._may_renew(session.failure),
            renew=self._renew,
            finished=self._finished,
            failed=self.tally.failed,
            outage=lambda: self._spooling.outage if self._spooling is not None else None,
        )
        self._telling = contextlib.AsyncExitStack()
        self._switched_times = 0
        self._renewing = asyncio.Lock()
        self._renewal_failure: BitneckError | None = None
        self._new_bundle = asyncio.Event()
        self._mover: asyncio.Task[None] | None = None
        self._revivals = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        """Fetch what the first frame needs of the bundle, load the head, open the session.

        The rest of the bundle follows in the background; `EdgeSettings.point` names a point to wait for.

        If the server cannot be reached and its last bundle is in the cache, the head is loaded from there, and the link
        goes on trying, as often as `EdgeSettings.retries` says; with a spool it does so for ever, and frames are kept
        there meanwhile. With a spool and no bundle in the cache, this waits for the server: nothing can be encoded.
        A spool whose disk does not answer for a few seconds is opened later; `spool` says so.

        Raises:
            BitneckError: see `open_supply`, `EdgeSession.open` and `Spooling.open`.
        """
        self._closed = False
        self._threads = Workers(self.workers, "bitneck-edge")
        self._finishing.open()
        try:
            self._spooling = await Spooling.open(
                self.settings, lambda: self._session.link if self._session is not None else None, self._on_spooled
            )
            await self._telling.enter_async_context(metrics_page(self.settings.metrics, self.state))
            self._session = await (open_at_last(self._open_first) if self._spooling else self._open_first())
            await self._telling.enter_async_context(reports(self.settings.report_s, self.state, self._tell))
        except BaseException:
            await self.close()
            raise
        if self._spooling is not None:
            self._spooling.start(keep_open(self._opened, self._reopen))
        if not self.settings.bundle_id:
            moving = keep_current(self._new_bundle, self._move, self.settings.going_over_s)
            self._mover = asyncio.create_task(moving, name="bitneck-bundle")
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the session."""
        await self.close()

    async def close(self) -> None:
        """End the session now; unanswered frames fail with `Unavailable`. Leaving the block does the same."""
        self._closed = True
        async with contextlib.AsyncExitStack() as last_first:  # whatever is cancelled or fails, the others follow
            if self._threads is not None:
                last_first.push_async_callback(asyncio.to_thread, self._threads.close, wait=True)
            if self._spooling is not None:
                last_first.push_async_callback(self._spooling.close)
            last_first.push_async_callback(self._finishing.close)
            if self._session is not None:
                last_first.push_async_callback(self._session.close)
            if self._spooling is not None:
                last_first.push_async_callback(self._spooling.stop)
            if self._mover is not None:
                self._mover.cancel()
                last_first.push_async_callback(asyncio.wait, {self._mover})
            last_first.push_async_callback(self._telling.aclose)

    @property
    def failure(self) -> BitneckError | None:
        """Why no further photograph can be answered; None while the link can be used, and with a spool."""
        if self._spooling is not None:
            return None
        failure = self._renewal_failure or self._opened().failure
        return None if self._may_renew(failure) else failure

    async def infer(self, photo: PhotoLike | Capture) -> Answer:
        """One photograph, one answer. If the link had been given up, this first tries to open it again.

        Raises:
            ImageError: it cannot be read.
            BitneckError: the cloud could not answer, or cannot be reached. With a spool the frame is kept there then.
        """
        await self._revive()
        self.tally.pictures += 1
        try:
            answer = await Passage(self._ways, Capture.of(photo)).alone()
        except BitneckError as exc:
            self.tally.failed(exc)
            raise
        if answer is None:
            raise Unavailable(f"no server answers: {self._kept_where}, its answer comes to on_spooled")
        return answer

    def stream(
        self,
        photos: Iterable[PhotoLike | Capture] | AsyncIterable[PhotoLike | Capture],
        *,
        stop: asyncio.Event | None = None,
        ordered: bool = True,
        newest_first: bool = False,
    ) -> AsyncGenerator[Answer | Failure]:
        """Many photographs: loading, encoding, sending and answering overlap.

        A photograph that cannot be read or answered gives a `Failure`, and the next one goes on. Once the link has
        failed for good (see `failure`) every further photograph of this stream gives one at once; another stream first
        tries to open the link again. Memory is bounded: by the window, or `EdgeSettings.in_flight`. A photograph whose
        frame goes to the spool gives nothing here; see `on_spooled`.

        Args:
            photos: in order; taken one by one, when there is room for one.
            stop: set it to end after the frames that are under way.
            ordered: results in the order of the photographs; else as they come.
            newest_first: read `photos` as fast as they come, as from a camera, and send the newest whenever the link
                has room. The ones that it overtook are dropped and counted in `dropped`.
        """
        source = captures(photos)
        if newest_first:
            source = newest(self._timed(source), self._drop)
        return pipeline(
            self._passages(source, live=newest_first),
            encoders=self.workers,
            slots=Slots(self._live_limit if newest_first else self._limit),
            ordered=ordered,
            stop=stop,
            all_sent=self._flush,
        )

    async def _open_first(self) -> EdgeSession:
        try:
            return await self._open(offline=True)
        except BundleMismatch:
            if self.settings.bundle_id:
                raise
            return await self._open()  # the cached bundle is not the server's any more

    async def _open(self, *, offline: bool = False, before: EdgeSession | None = None) -> EdgeSession:
        """A session with the bundle that the server has now; see `open_supply` and `EdgeSession.open`."""
        retries = None if self._spooling is None else 0  # with a spool, whoever calls this tries again
        supply = await open_supply(self.settings, offline=offline, retries=retries)
        return await self._open_with(supply, before)

    async def _open_with(self, supply: Supply, before: EdgeSession | None, *, at_once: bool = False) -> EdgeSession:
        assert self._threads is not None
        session = await EdgeSession.open(
            supply, self.settings, workers=self._threads, pool=self._pool, on_switch=self._switched,
            on_fetch=self._on_fetch, before=before, on_new_bundle=self._new_bundle.set, at_once=at_once,
        )  # fmt: skip
        try:
            if self._spooling is not None:
                await self._spooling.know(session.bundle)
        except BaseException:
            await session.close()
            raise
        return session

    def _usable(self) -> EdgeSession:
        """The session for the next photograph."""
        if self._renewal_failure is not None:
            raise self._renewal_failure
        return self._opened()

    async def _revive(self) -> None:
        """If the link was given up because no server answered, open it again.

        Raises:
            BitneckError: that failed too.
        """
        lost = self._opened()
        failure = self._renewal_failure or lost.failure
        if self._closed or self._spooling is not None or not may_pass(failure):
            return
        revivals = self._revivals
        async with self._renewing:
            if self._closed or self._opened() is not lost:
                return
            if revivals != self._revivals:  # somebody else has just tried in vain
                assert failure is not None
                raise failure
            self._revivals += 1
            await lost.close()
            await self._replace(lost)

    def _may_renew(self, failure: BitneckError | None) -> bool:
        return isinstance(failure, BundleMismatch) and not self.settings.bundle_id

    async def _renew(self, old: EdgeSession) -> None:
        """The server has another bundle now: fetch it, open a session with it, and put that in place of the old one.

        Raises:
            BitneckError: that failed. The old session stays; if trying again is of no use, `failure` says why.
        """
        async with self._renewing:
            if self._usable() is not old:
                return
            _LOG.warning("%s; fetching the server's bundle again", old.failure)
            await old.close()
            try:
                await self._replace(old)
            except BitneckError as exc:
                if not self._may_renew(exc):
                    self._renewal_failure = exc
                raise
            if self.bundle.bundle_id == old.bundle.bundle_id:
                raise BundleMismatch(
                    f"{self.settings.server} refuses the bundle that it offers, {old.bundle.bundle_id}"
                )

    async def _reopen(self, old: EdgeSession) -> None:
        """Put another session in place of one that has failed; that goes on encoding until then."""
        async with self._renewing:
            if self._opened() is not old:
                return
            await self._replace(old)
            try:
                await old.close()
            except asyncio.CancelledError:  # the client is being closed: leave nothing open
                await old.close()
                raise

    async def _move(self) -> None:
        """The server has another bundle for this client: open a session with it, then let the old one finish."""
        old = self._opened()
        if not old.link.new_bundle or self._closed or self.failure is not None:
            return
        supply = await open_supply(self.settings, retries=0)
        if supply.bundle.bundle_id == old.bundle.bundle_id:  # taken back meanwhile, or another server answered
            old.link.new_bundle = ""
            await supply.close()
            return
        session = await self._open_with(supply, old, at_once=True)  # for minutes, perhaps: nobody waits for it
        async with self._renewing, contextlib.AsyncExitStack() as unless_used:
            unless_used.push_async_callback(session.close, leave=True)
            if self._opened() is not old:  # it failed meanwhile, and another one took its place
                return
            self._session, self._renewal_failure = session, None
            unless_used.pop_all()
        _LOG.info("going over to the bundle %s", session.bundle.bundle_id)
        await old.leave()
        session.follow(old, planned=True)

    async def _replace(self, old: EdgeSession) -> None:
        """Open a session and put it in place of another one, unless the client was closed meanwhile."""
        session = await self._open(before=old)
        if self._closed:
            await session.close()
            raise Unavailable("the client is closed")
        self._session, self._renewal_failure = session, None

    async def _passages(self, source: AsyncGenerator[Capture], *, live: bool) -> AsyncGenerator[Passage]:
        with contextlib.suppress(BitneckError):  # else each photograph says why
            await self._revive()
        async with contextlib.aclosing(source):
            async for capture in source:
                self.tally.pictures += 1
                yield Passage(self._ways, capture, live=live)

    async def _timed(self, source: AsyncGenerator[Capture]) -> AsyncGenerator[Capture]:
        """Measures the interval between pictures."""
        async with contextlib.aclosing(source):
            async for capture in source:
                self._interval.add(capture.at)
                yield capture

    def _limit(self) -> int:
        """Frames of a stream that may be under way: unanswered ones, and those that are being encoded."""
        return (self.settings.in_flight or self.window) + self.workers

    def _live_limit(self) -> int:
        """The same where one frame more would only wait: as many as the link holds at once, and one."""
        return self.settings.in_flight or self._opened().room(self._interval.seconds)

    async def _finished(self, capture: Capture, answer: Answer) -> Answer:
        answer = await self._finishing(capture.photo, answer)
        self.tally.answered(answer)
        return answer

    async def _tell(self, device: Device) -> None:
        """A report of this device, if a connection is up."""
        if self._session is not None:
            await self._session.link.report(device)

    async def _flush(self) -> None:
        """Nothing more follows for a while."""
        if self._session is not None:
            await self._session.link.flush()

    def _drop(self, _capture: Capture) -> None:
        self.dropped += 1

    def _switched(self, switch: Switch) -> None:
        self.switches.append(switch)
        self._switched_times += 1
        self._on_switch(switch)
