"""The edge client: photographs in, answers out.

async with EdgeClient("cloud.example:50051") as client:
    answer = await client.infer(Path("photo.jpg"))
    async for answer in client.stream(paths):
        ...

`bitneck_edge.sync.SyncEdgeClient` does the same without ``async``.
"""

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleMismatch, Unavailable
from bitneck.runtime import ModulePool
from bitneck.workers import Workers
from bitneck_edge.answers.assemble import answer_of
from bitneck_edge.answers.results import Answer, Failure, Switch
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder, EncodedPhoto, Photo
from bitneck_edge.link.link import Link, LinkSettings, Received, Sent
from bitneck_edge.link.records import Candidate, Coded
from bitneck_edge.ratecontrol import Decision, RateController
from bitneck_edge.settings import AUTO, EdgeSettings
from bitneck_edge.sources.capture import Capture, Slots, captures, newest

__all__ = ["EdgeClient"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_KEPT_SWITCHES = 1000
_BUNDLE_CHANGES = 3
"""So often one photograph is encoded again because the server came back with another bundle."""


class EdgeClient:
    """A session with a cloud server. Use it as an asynchronous context manager.

    Args:
        server: HOST:PORT; None for the settings' own.
        settings: everything else.
        on_fetch: progress of a bundle's download, (bytes done, bytes in all).
        on_switch: called when the operating point changes.
        finish: called in a thread with each photograph and its answer, such as to write it; what it gives back is the
            answer.
        **values: single settings, such as ``point="s1-r2"``, in place of a `settings` object.

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
        finish: Callable[[Photo, Answer], Answer] | None = None,
        **values: Any,
    ) -> None:
        self.settings = settings or EdgeSettings.load({"server": server, **values})
        self.switches: deque[Switch] = deque(maxlen=_KEPT_SWITCHES)
        self.dropped = 0
        self.workers = self.settings.workers or min(2, os.cpu_count() or 1)
        self._on_fetch = on_fetch
        self._on_switch = on_switch
        self._finish = finish
        self._pool = ModulePool()
        self._encoder: EdgeEncoder | None = None
        self._link: Link | None = None
        self._rate: RateController | None = None
        self._threads: Workers | None = None
        self._renewing = asyncio.Lock()
        self._auto = self.settings.point == AUTO
        self._point = ""
        self._last_seq = 0
        self._reconnects = 0
        self._interval_s = 0.0
        self._captured_at: float | None = None

    async def __aenter__(self) -> Self:
        """Fetch what is missing of the bundle, load the head, open the session.

        A server that cannot be reached is no hindrance where its last bundle is in the cache: the head is loaded, and
        the link goes on trying, as often as `EdgeSettings.retries` says.

        Raises:
            BitneckError: see `fetch_bundle` and `bitneck_edge.link.link.Link.open`.
        """
        self._threads = Workers(self.workers, "bitneck-edge")
        try:
            try:
                await self._begin(offline=True)
            except BundleMismatch:
                if self.settings.bundle_id:
                    raise
                await self._begin(offline=False)  # the bundle of last time is not the server's any more
        except BaseException:
            self._threads.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the session."""
        await self.close()

    async def close(self) -> None:
        """End the session now; frames that are not answered fail with `Unavailable`. Leaving the block does it too."""
        if self._link is not None:
            await self._link.close()
        if self._threads is not None:
            self._threads.close()

    @property
    def encoder(self) -> EdgeEncoder:
        """The edge's half of the network.

        Raises:
            Unavailable: outside the ``async with`` block.
        """
        if self._encoder is None:
            raise Unavailable("the client is not open: use it inside `async with`")
        return self._encoder

    @property
    def bundle(self) -> Bundle:
        """The bundle in use."""
        return self.encoder.bundle

    @property
    def session_id(self) -> str:
        """The session's id, for the control API."""
        return self._opened().session_id

    @property
    def reconnects(self) -> int:
        """How often the link was opened again."""
        return self._reconnects + self._opened().reconnects

    @property
    def failure(self) -> BitneckError | None:
        """Why the link is of no more use: no further photograph can be answered. None while it is."""
        failure = self._opened().failure
        return None if self._may_renew(failure) else failure

    @property
    def point(self) -> str:
        """The operating point of the next frame. Assign another, or ``"auto"``; the control API can do so too."""
        return self._point

    @point.setter
    def point(self, point_id: str) -> None:
        self._auto = point_id == AUTO
        if not self._auto:
            self.encoder.ladder[point_id]
            self._change(point_id, "set by the program")

    @property
    def auto(self) -> bool:
        """Whether the operating point is chosen for each frame by what the link and the device can do."""
        return self._auto

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._opened().window

    async def infer(self, photo: Photo | Capture) -> Answer:
        """One photograph, one answer.

        Raises:
            ImageError: it cannot be read.
            BitneckError: the cloud could not answer, or cannot be reached.
        """
        return await self._process(Capture.of(photo))

    async def stream(
        self,
        photos: Iterable[Photo | Capture] | AsyncIterable[Photo | Capture],
        *,
        stop: asyncio.Event | None = None,
        ordered: bool = True,
        newest_first: bool = False,
    ) -> AsyncGenerator[Answer | Failure]:
        """Many photographs: loading, encoding, sending and answering overlap.

        A photograph that cannot be read or answered gives a `Failure`, and the next one goes on. Once the link has
        failed for good (see `failure`) every further photograph gives one at once. Memory is bounded: by the window, or
        `EdgeSettings.in_flight`.

        Args:
            photos: in order; taken one by one, when there is room for one.
            stop: set it to end after the frames that are under way.
            ordered: results in the order of the photographs; else as they come.
            newest_first: read `photos` as fast as they come, as from a camera, and send the newest whenever the link
                has room; the ones that were overtaken are dropped and counted in `dropped`.
        """
        results: asyncio.Queue[asyncio.Task[Answer | Failure] | None] = asyncio.Queue()
        slots = Slots(self._live_limit if newest_first else self._limit)
        tasks: set[asyncio.Task[Answer | Failure]] = set()
        source = captures(photos)
        if newest_first:
            source = newest(self._timed(source), self._drop)

        async def produce() -> None:
            turn: asyncio.Event | None = None
            encoding = asyncio.Semaphore(self.workers)
            try:
                async with contextlib.aclosing(source):
                    while stop is None or not stop.is_set():
                        await encoding.acquire()
                        await slots.take()
                        capture = await anext(source, None)
                        if capture is None or (stop is not None and stop.is_set()):
                            break
                        before, turn = turn, asyncio.Event()
                        task = asyncio.create_task(self._guarded(capture, before, turn, encoding))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                        if ordered:
                            results.put_nowait(task)
                        else:
                            task.add_done_callback(results.put_nowait)
            finally:
                if not ordered and tasks:
                    await asyncio.wait(tasks)

        producer = asyncio.create_task(produce())
        producer.add_done_callback(lambda _: results.put_nowait(None))
        try:
            while (task := await results.get()) is not None:
                result = await task
                slots.give()
                yield result
            producer.result()
        finally:
            for each in (producer, *tasks):
                each.cancel()
            await asyncio.gather(producer, *tasks, return_exceptions=True)

    async def _begin(self, *, offline: bool) -> None:
        """The server's bundle, its head loaded, and a session."""
        settings = self.settings
        bundle = await fetch_bundle(settings, self._on_fetch, offline=offline)
        encoder = EdgeEncoder(bundle, threads=settings.threads, pool=self._pool)
        wanted = "" if self._auto else self._point or settings.point
        if wanted and wanted != AUTO and not (self._point and wanted not in encoder.ladder):
            encoder.ladder[wanted]  # refuse an unknown one before a session is opened
        link = Link(
            LinkSettings(
                access=settings.access,
                model=bundle.manifest.name,
                bundle_id=bundle.bundle_id,
                client=settings.client,
                connect_timeout_s=settings.connect_timeout_s,
                answer_timeout_s=settings.answer_timeout_s,
                retries=settings.retries,
                references=settings.similar != "off" and bundle.has_conditional,
                key_every=settings.key_every,
            ),
            self._switch,
            self._reconnected,
        )
        edge_s = await self._in_thread(encoder.time_splits) if self._auto else {}
        self._encoder, self._link = encoder, link
        self._rate = RateController(
            encoder.ladder,
            target_s=settings.latency_ms / 1e3,
            max_edge_s=settings.max_edge_ms / 1e3 or None,
            edge_s=edge_s,
        )
        if self._point and self._point not in encoder.ladder:
            self._point = encoder.ladder.best.id  # a picture may ask before the link is open
        try:
            await link.open()
            if link.initial_point and not self._point and settings.point in ("", AUTO):
                if self._auto:
                    _LOG.warning(
                        "the cloud asks new sessions for %s: the point is not chosen here, until its control API hands "
                        "that back",
                        link.initial_point,
                    )
                self._auto = False
            if self._auto:
                self._point = self._rate.choose(time.perf_counter()).point
            else:
                known = wanted if wanted in encoder.ladder else ""
                self._point = known or link.initial_point or encoder.ladder.best.id
            await self._in_thread(encoder.point_encoder, self._point)
        except BaseException:
            await link.close()
            raise

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        assert self._threads is not None
        return await self._threads.run(function, *args)

    def _may_renew(self, failure: BitneckError | None) -> bool:
        return isinstance(failure, BundleMismatch) and not self.settings.bundle_id

    async def _renew(self, old: Link) -> None:
        """The server has another bundle now: fetch it, and begin a new session. Equal segments stay loaded."""
        async with self._renewing:
            if self._link is not old:
                return
            _LOG.warning("%s; fetching the server's bundle again", old.failure)
            before = self.bundle.bundle_id
            self._reconnects += old.reconnects + 1
            await old.close()
            await self._begin(offline=False)
            if self.bundle.bundle_id == before:
                raise BundleMismatch(f"{self.settings.server} refuses the bundle that it offers, {before}")

    async def _guarded(
        self, capture: Capture, before: asyncio.Event | None, turn: asyncio.Event, encoding: asyncio.Semaphore
    ) -> Answer | Failure:
        """One photograph of a stream: sent after the one before it, whatever became of that."""
        try:
            return await self._process(capture, before, turn, encoding)
        except BitneckError as exc:
            if before is not None:
                await before.wait()
            return Failure(capture.name, exc)
        finally:
            if not turn.is_set():
                turn.set()
                encoding.release()

    async def _process(
        self,
        capture: Capture,
        before: asyncio.Event | None = None,
        turn: asyncio.Event | None = None,
        encoding: asyncio.Semaphore | None = None,
    ) -> Answer:
        changes = 0
        while True:
            link = self._opened()
            try:
                decision, encoded, candidate = await self._encode(link, capture)
                if before is not None:
                    await before.wait()
                sent = await self._send(link, capture, decision, encoded, candidate)
                if turn is not None and encoding is not None and not turn.is_set():
                    turn.set()
                    encoding.release()
                received = await sent.answer
                answer = answer_of(capture, encoded, sent, received, self.bundle.manifest, self.encoder.labels)
                return answer if self._finish is None else await asyncio.to_thread(self._finish, capture.photo, answer)
            except BundleMismatch:
                changes += 1
                if not self._may_renew(link.failure) or changes > _BUNDLE_CHANGES:
                    raise
                await self._renew(link)

    async def _encode(self, link: Link, capture: Capture) -> tuple[Decision, EncodedPhoto, Candidate | None]:
        """In a thread, at the point of this moment."""
        if link.failure is not None:
            raise link.failure
        decision = self._decide()
        mode = self.settings.similar
        similar = mode == "on" or (mode == "auto" and capture.similar)
        # A probe asks what the link makes of a frame of its point's usual size.
        candidate = link.candidate(decision.point) if similar and not decision.probe else None
        encode = functools.partial(
            self.encoder.encode, similar=similar, reference=candidate.reference if candidate is not None else None
        )
        return decision, await self._in_thread(encode, capture.photo, decision.point), candidate

    def _decide(self) -> Decision:
        assert self._rate is not None
        if not self._auto:
            return Decision(self._point, "")
        decision = self._rate.choose(time.perf_counter(), self._interval_s)
        if not decision.probe:
            self._change(decision.point, decision.reason)
        return decision

    async def _send(
        self,
        link: Link,
        capture: Capture,
        decision: Decision,
        encoded: EncodedPhoto,
        candidate: Candidate | None,
    ) -> Sent:
        settings = self.settings
        similar = None
        if encoded.symbols is not None:
            similar = Coded(symbols=encoded.symbols, candidate=candidate, payload=encoded.encoded.similar)
        sent = await link.send(
            encoded.point,
            encoded.encoded.payload,
            deadline_ms=settings.deadline_ms,
            captured_unix_us=capture.unix_us,
            in_flight=settings.in_flight,
            similar=similar,
        )
        self._last_seq = sent.seq
        rate = self._rate
        if rate is not None:
            edge_s = (encoded.head_ms + encoded.encode_ms) / 1e3
            other_s = max(0.0, sent.at - capture.at - edge_s)
            rate.sent(sent.seq, decision, len(sent.payload), sent.at, edge_s=edge_s, other_s=other_s)
            sent.answer.add_done_callback(lambda answer: _tell(rate, sent.seq, answer))
        return sent

    def _opened(self) -> Link:
        if self._link is None:
            raise Unavailable("the client is not open: use it inside `async with`")
        return self._link

    def _limit(self) -> int:
        """Frames of a stream that may be under way: unanswered ones, and those that are being encoded."""
        return (self.settings.in_flight or self.window) + self.workers

    def _live_limit(self) -> int:
        """The same where every frame more would only wait: as many as are on their way at once, and one."""
        if self.settings.in_flight:
            return self.settings.in_flight
        room = 1 if self._rate is None else self._rate.room(time.perf_counter(), self._interval_s, fixed=not self._auto)
        return min(room, self.window)

    async def _timed(self, source: AsyncGenerator[Capture]) -> AsyncGenerator[Capture]:
        """Measures the interval between pictures."""
        async with contextlib.aclosing(source):
            async for capture in source:
                if self._captured_at is not None:
                    interval = max(1e-4, capture.at - self._captured_at)
                    self._interval_s += (interval - self._interval_s) * (0.1 if self._interval_s else 1.0)
                self._captured_at = capture.at
                yield capture

    def _drop(self, _capture: Capture) -> None:
        self.dropped += 1

    def _reconnected(self) -> None:
        if self._rate is not None:
            self._rate.reconnected(time.perf_counter())

    def _switch(self, point_id: str, reason: str) -> None:
        """The cloud asks for another operating point; for none where it leaves the choice to us."""
        if not point_id:
            _LOG.info("%s: the point is chosen here from now on", reason)
            self._auto = True
            return
        if point_id not in self.encoder.ladder:
            _LOG.warning("the cloud asks for %r, which this bundle does not have; staying at %s", point_id, self._point)
            return
        self._auto = False
        self._change(point_id, reason)

    def _change(self, point_id: str, reason: str) -> None:
        if point_id == self._point or not self._point:
            self._point = point_id
            return
        switch = Switch(self._last_seq, self._point, point_id, reason)
        _LOG.info("after frame %d: %s -> %s: %s", switch.after_seq, switch.old, switch.new, reason)
        self._point = point_id
        self.switches.append(switch)
        self._on_switch(switch)


def _tell(rate: RateController, seq: int, answer: "asyncio.Future[Received]") -> None:
    """What a frame's end says of the link."""
    if answer.cancelled() or answer.exception() is not None:
        rate.lost(seq, time.perf_counter())
        return
    received = answer.result()
    timings = received.result.timings
    server_s = (timings.queued_us + timings.decode_us + timings.compute_us) / 1e6
    rate.answered(seq, received.at, server_s=server_s)
