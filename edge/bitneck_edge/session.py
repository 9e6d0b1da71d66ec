"""One session with the cloud: a bundle, its encoder, the link, rate control, and the operating point of each frame.

capture --begin--> Encoding --send--> Sent --answer--> Answer
            ^ point                            |
            +---- PointChoice <-- RateController, delays and sizes
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleMismatch, Unavailable
from bitneck.runtime import ModulePool
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import Answers
from bitneck.workers import Workers
from bitneck_edge.answers.assemble import answer_of
from bitneck_edge.answers.results import Answer, Switch
from bitneck_edge.bundles.pace import Pacer
from bitneck_edge.bundles.supply import Progress, Supply
from bitneck_edge.encoder import EdgeEncoder, EncodedPhoto
from bitneck_edge.link.cost import OVERHEAD_BYTES, LinkCost
from bitneck_edge.link.link import Link
from bitneck_edge.link.records import Candidate, Coded
from bitneck_edge.link.sent import MessageSent, Received, Sent
from bitneck_edge.opening import fetch_first, link_settings
from bitneck_edge.points import MeanInterval, PointChoice, Wish
from bitneck_edge.ratecontrol import Decision, RateController
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.sources.capture import Capture

__all__ = ["EdgeSession", "Encoding"]

_LOG = logging.getLogger(__name__)
_SAMPLE_EVERY = 4
"""Without answers, automatic rate and live pictures ask for the acknowledgement of one message in so many."""
_LATEST_US = 1 << 62
"""A time of capture beyond this is no time, and is not sent."""
_SILENCE = 1 / 3
"""Share of `answer_timeout_s`."""
_LEAVE = 2.0
"""The longest wait for last answers, in `answer_timeout_s`: time for one connection that breaks meanwhile."""
_COST_FRESH = 8
"""Messages after which it weighs anew what a message costs on the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """A picture that is being encoded, or ready to be sent.

    Attributes:
        capture: the picture.
        decision: its operating point, and why.
        photo: what the encoder makes of it, or why it cannot: an `ImageError` or another error of bitneck's.
        candidate: the answered frame that it is also coded against; None for none.
    """

    capture: Capture
    decision: Decision
    photo: "asyncio.Future[EncodedPhoto]"
    candidate: Candidate | None


class EdgeSession:
    """An open session. `open` makes it; nothing of it is replaced later.

    Attributes:
        encoder: the edge's half of the network, with the bundle.
        link: to the cloud.
        points: the operating point of the next frame.
        answers: what comes back for each frame.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        workers: Workers,
        supply: Supply,
        encoder: EdgeEncoder,
        rate: RateController,
        on_switch: Callable[[Switch], None],
        before: "EdgeSession | None" = None,
        on_new_bundle: Callable[[], None] = lambda: None,
        *,
        planned: bool = False,
    ) -> None:
        self.encoder = encoder
        self.answers = Answers(settings.answers)
        self.points = PointChoice(encoder.ladder, rate, on_switch, supply.ready, supply.want)
        self.link: Link = Link(
            replace(link_settings(settings, encoder.bundle), follows=before.link.token if before is not None else ""),
            self.points.ask,
            lambda: rate.reconnected(time.perf_counter()),
            self._opened_late,
            on_new_bundle,
        )
        self._settings = settings
        self._workers = workers
        self._supply = supply
        self._rate = rate
        self._reconnects_before, self._link_bytes_before = 0, LinkBytes()
        if before is not None:
            self.follow(before, planned=planned)
        self._interval = MeanInterval()  # between messages
        self._messages = 0
        self._unawaited = 0
        self._sample_every = _SAMPLE_EVERY if self.answers is Answers.NONE and settings.pack == 1 else 1

    @classmethod
    async def open(
        cls,
        supply: Supply,
        settings: EdgeSettings,
        *,
        workers: Workers,
        pool: ModulePool,
        on_switch: Callable[[Switch], None],
        on_fetch: Progress = lambda _done, _all: None,
        before: "EdgeSession | None" = None,
        on_new_bundle: Callable[[], None] = lambda: None,
        at_once: bool = False,
    ) -> Self:
        """Fetch what the first frame needs, load the encoder and open the session.

        The other operating points follow in the background, unless the settings name one. If anything fails, nothing
        stays open.

        Args:
            supply: of the server's bundle; the session closes it.
            settings: of the client.
            workers: threads that encode.
            pool: of ONNX modules; those that an earlier bundle has loaded are shared.
            on_switch: called when the operating point changes.
            on_fetch: progress of the files that the first frame needs.
            before: the session that this one follows: its point, the rate that the cloud asked of it, and its count of
                reconnects go on.
            on_new_bundle: see `Link`.
            at_once: the session before goes on until this one is open: with a spool, too, it has to open now, and that
                is no reconnect. Else the frames of a spool are kept until it opens.

        Raises:
            UnknownPoint: the settings name a point that the bundle does not have.
            InvalidConfig: they ask for answers that its task does not have.
            Unavailable: it could not be opened at once.
            BitneckError: see `Supply.need`, `Link.open` and `EdgeEncoder`.
        """

        def wish() -> Wish:
            return Wish.of(settings.point) if before is None else before.points.wish

        link: Link | None = None
        try:
            await fetch_first(supply, wish(), known=before is not None, progress=on_fetch)
            Answers(settings.answers).check(supply.bundle.manifest.task)
            encoder = await _loaded(supply, settings, pool)
            edge_s = await workers.run(encoder.time_splits) if wish().auto else {}
            if edge_s and 0 < settings.max_edge_ms < 1e3 * min(edge_s.values()):
                fastest = min(edge_s, key=edge_s.__getitem__)
                _LOG.warning(
                    "no split point keeps max_edge_ms, %.1f: the fastest, %s, takes %.1f ms here and is used",
                    settings.max_edge_ms, fastest, edge_s[fastest] * 1e3,
                )  # fmt: skip
            rate = RateController(
                encoder.ladder,
                target_s=settings.latency_ms / 1e3,
                max_edge_s=settings.max_edge_ms / 1e3 or None,
                edge_s=edge_s,
                cost=LinkCost(OVERHEAD_BYTES / settings.pack, frames=settings.pack),
            )
            session = cls(settings, workers, supply, encoder, rate, on_switch, before, on_new_bundle, planned=at_once)
            link = session.link
            if settings.spool is None:
                await link.open()
                opened = True
            elif not (opened := await link.start()) and at_once:
                raise Unavailable(f"{settings.server}: the session with {supply.bundle.bundle_id} does not open yet")
            first = wish() if opened else replace(wish(), own=None)  # what the cloud asks for is not known yet
            session.points.begin(first, link.initial_point, time.perf_counter())
            await session._ready(session.points.point)
            await workers.run(encoder.point_encoder, session.points.point)
        except BaseException:
            if link is not None:
                await link.close()
            await supply.close()
            raise
        best = encoder.ladder.best.id
        rest = [] if settings.point else [best, *(point.id for point in encoder.ladder if point.id != best)]
        supply.start(rest, Pacer(settings.fetch_kbps, lambda: bool(session.link.unanswered)))
        return session

    def _opened_late(self, asked: str) -> None:
        """The session is open at last: the cloud may ask for a point, as it does at the beginning."""
        if asked and not self.points.wish.named:
            self.points.ask(asked, "asked of new sessions")

    @property
    def bundle(self) -> Bundle:
        """The bundle in use."""
        return self.encoder.bundle

    @property
    def reconnects(self) -> int:
        """How often this session and those before it connected again."""
        return self._reconnects_before + self.link.reconnects

    @property
    def link_bytes(self) -> LinkBytes:
        """What has crossed the link for this session's frames and those before it; see `bitneck.wire.link_bytes`."""
        return self._link_bytes_before + self.link.link_bytes

    @property
    def failure(self) -> BitneckError | None:
        """Why the session cannot be used any more; None while it can."""
        return self.link.failure

    def follow(self, before: "EdgeSession", *, planned: bool) -> None:
        """Go on with the counts of the session before; another session is a reconnect unless it was planned."""
        self._reconnects_before, self._link_bytes_before = before.reconnects + (not planned), before.link_bytes

    async def leave(self) -> None:
        """Another session takes new pictures: wait for the answers to the frames that were sent, then end this one.

        What is not sent by then fails with `BundleMismatch`, and so does what has no answer in time.
        """
        reason = BundleMismatch(f"the server has another bundle for this client than {self.bundle.bundle_id}")
        try:
            await self.link.leave(reason, _LEAVE * self._settings.answer_timeout_s)
        finally:
            await self.close(leave=True)

    async def close(self, *, leave: bool = False) -> None:
        """End the session; unanswered frames fail with `Unavailable`. For `leave` see `Link.close`."""
        await self.link.close(leave=leave)
        await self._supply.close()

    def room(self, interval_s: float) -> int:
        """Frames that may be unanswered if fresh pictures matter; see `RateController.room`.

        Args:
            interval_s: between pictures; 0 if unknown.
        """
        pack = self._settings.pack
        room = self._rate.room(time.perf_counter(), interval_s * pack, fixed=not self.points.auto)
        return min(room * pack + self._sample_every - 1, self.link.window)

    def begin(self, capture: Capture, interval_s: float) -> Encoding:
        """Begin to encode a picture in a thread, at the operating point of this moment.

        Args:
            capture: the picture.
            interval_s: between pictures; 0 if unknown.

        Raises:
            ImageError: it cannot be read.
            BitneckError: the session has failed, and there is no spool; the picture is not touched then.
        """
        if self.failure is not None and self._settings.spool is None:
            raise self.failure
        if capture.broken is not None:
            raise capture.broken
        decision = self.points.choose(time.perf_counter(), interval_s * self._settings.pack)
        mode = self._settings.similar
        similar = mode == "on" or (mode == "auto" and capture.similar)
        # A probe asks how the link takes a frame of its point's usual size.
        candidate = self.link.candidate(decision.point) if similar and not decision.probe else None
        encode = functools.partial(
            self.encoder.encode, similar=similar, reference=candidate.reference if candidate is not None else None
        )
        if self._supply.ready(decision.point):
            photo = self._workers.submit(encode, capture.photo, decision.point)
        else:
            photo = asyncio.ensure_future(self._encode_when_ready(encode, capture, decision.point))
        return Encoding(capture=capture, decision=decision, photo=photo, candidate=candidate)

    async def _encode_when_ready(
        self, encode: Callable[..., EncodedPhoto], capture: Capture, point_id: str
    ) -> EncodedPhoto:
        await self._ready(point_id)
        return await self._workers.run(encode, capture.photo, point_id)

    async def send(self, encoding: Encoding, *, prompt: bool = False, live: bool = False) -> Sent:
        """Send a picture once it is encoded; waits while the window is full.

        Args:
            encoding: the picture.
            prompt: it waits for no others, and its acknowledgement comes at once.
            live: of a stream in which fresh pictures matter.

        Raises:
            ImageError: it cannot be read.
            BitneckError: see `Link.send`.
        """
        photo = await encoding.photo
        similar = None
        if photo.symbols is not None:
            similar = Coded(symbols=photo.symbols, candidate=encoding.candidate, payload=photo.encoded.similar)
        edge_s = (photo.head_ms + photo.encode_ms) / 1e3
        on_sent = functools.partial(self._message_sent, encoding.decision)
        sent = await self.link.send(
            photo.point,
            photo.encoded.payload,
            deadline_ms=self._settings.deadline_ms,
            captured_unix_us=encoding.capture.unix_us if 0 < encoding.capture.unix_us < _LATEST_US else 0,
            in_flight=self._settings.in_flight,
            similar=similar,
            prompt=prompt,
            ask=encoding.decision.probe or ((live or self.points.auto) and self._unawaited + 1 >= self._sample_every),
            on_sent=on_sent,
        )
        self.points.last_seq = sent.seq
        other_s = max(0.0, sent.at - encoding.capture.at - edge_s)
        self._rate.encoded(encoding.decision, edge_s=edge_s, other_s=other_s)
        return sent

    def _message_sent(self, decision: Decision, sent: MessageSent) -> None:
        """A message was sent: its last frame shows how long the link takes, if its answer comes at once."""
        self._interval.add(sent.at)
        self._unawaited = 0 if sent.awaited else self._unawaited + 1
        if sent.awaited:
            sent.answer.add_done_callback(functools.partial(self._learn, sent.seq))
            self._rate.sent(sent.seq, decision, sent.payload_bytes, sent.at, sent.frames)
        self._messages += 1
        if self.points.auto and self._messages % _COST_FRESH == 0:
            self._rate.cost = self._cost()

    def _cost(self) -> LinkCost:
        """What a message costs on the link, as it has been used lately."""
        frames = self._settings.pack
        each = self.link.expected_link_bytes(0.0, self._interval.seconds / frames)
        return LinkCost(each.up, each.down, frames)

    async def takes_frames(self) -> bool:
        """Wait for room for a frame on the link; False if the link is down, or silent for too long."""
        return await self.link.takes(self._settings.in_flight, self.silence_s)

    @property
    def silence_s(self) -> float:
        """Seconds without any answer after which frames do not wait for the link, if there is a spool."""
        return self._settings.answer_timeout_s * _SILENCE

    async def answer(self, encoding: Encoding, sent: Sent) -> Answer:
        """The answer to a frame that was sent.

        Raises:
            ProtocolError: the cloud's result is not what it should be.
            BitneckError: the cloud could not answer, or the session has failed.
        """
        return self.answer_of(encoding, sent, await sent.answer)

    def answer_of(self, encoding: Encoding, sent: Sent, received: Received) -> Answer:
        """The answer to a frame, from what has come for it.

        Raises:
            ProtocolError: see `answer`.
        """
        photo, manifest = encoding.photo.result(), self.bundle.manifest
        found = answer_of(encoding.capture, photo, sent, received, manifest, self.encoder.labels, self.answers)
        return replace(found, session=self.link.session_id)

    async def _ready(self, point_id: str) -> None:
        """Wait for the files of an operating point that was asked for by name."""
        if not self._supply.ready(point_id):
            await self._supply.need([point_id])

    def _learn(self, seq: int, answer: "asyncio.Future[Received]") -> None:
        """Tell the rate controller how a frame ended. A server cannot have taken longer than the frame was away."""
        if answer.cancelled() or answer.exception() is not None:
            self._rate.lost(seq, time.perf_counter())
            return
        received = answer.result()
        server_s = sum(received.result.stages_ms) / 1e3
        self._rate.answered(seq, received.at, server_s=min(server_s, received.at - received.sent_at))


async def _loaded(supply: Supply, settings: EdgeSettings, pool: ModulePool) -> EdgeEncoder:
    """The encoder, loaded by a thread of its own: the cache's disk may not answer, and frames go on meanwhile."""
    thread = Workers(1, "bitneck-load")
    load = functools.partial(EdgeEncoder, threads=settings.threads, pool=pool, exact=settings.exact)
    try:
        return await thread.run(load, supply.bundle)
    finally:
        thread.close()
