"""One open stream: reads frames, has them computed, and writes answers when they are ready.

    Peer --Frame, Pack--> Session (new? window?) --> Engine --> Session --> Answering --> Outbox --> Peer

`bitneck_cloud.sessions.session` has the state that outlives a stream, `answering` what a client gets for a frame,
`acknowledging` what it gets instead.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from bitneck.errors import BitneckError, MalformedFrame, ModelFailure, ProtocolError, Unavailable
from bitneck.wire.frames import check_frame
from bitneck.wire.messages import (
    Acknowledge,
    ClientMessage,
    Device,
    Fault,
    Frame,
    GoAway,
    NewBundle,
    Pack,
    Result,
    ServerMessage,
    SetPoint,
)
from bitneck_cloud.access.callers import ANONYMOUS, Caller
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.job import INTERNAL_ERROR, Computed, Job, JobState
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.faults import fault_of
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.observe.tracing import FrameTracer
from bitneck_cloud.sessions.answering import Answering
from bitneck_cloud.sessions.jobs import job_of, origin_of, result_of
from bitneck_cloud.sessions.outbox import Outbox
from bitneck_cloud.sessions.rates import link_limit_kbps
from bitneck_cloud.sessions.session import Event, Session, StreamState, Verdict

__all__ = ["Conversation", "Peer"]

_LOG = logging.getLogger(__name__)
_SUPERSEDED_GRACE_S = 2.0
"""Seconds in which a replaced stream may write its last messages. Its link is probably dead."""


class Peer(Protocol):
    """The client at the other end of a stream."""

    def messages(self) -> AsyncIterator[ClientMessage | None]:
        """What it sends; None for an empty message.

        After a `MalformedFrame` the next message can still be taken. A stream that is gone raises `ConnectionError`.
        """

    async def write(self, message: ServerMessage) -> None:
        """Send it a message.

        Raises:
            ConnectionError: the stream is gone.
        """


@dataclass(frozen=True, slots=True)
class _Moment:
    """When a message came: seconds since 1970, and on `time.monotonic`'s clock."""

    wall: float
    monotonic: float


class Conversation:
    """One open stream of a session.

    Args:
        engine: computes the frames.
        model: the session's.
        session: its state.
        state: the stream's phase.
        streams: every session's newest conversation, by session id. This one adds itself. Answers go to the newest
            one.
        metrics: counts what happens.
        tracer: takes the frames' spans.
        idle_s: seconds without a message after which the stream ends; 0 for never.
        stall_s: seconds that the client may leave one message unread, before the stream ends; 0 for ever.
        caller: the client.
        limits: of the callers.
        token_number: of the resume token that this stream's ``Opened`` had. Its first frame shows that the client has
            it, so older tokens are worth nothing from then on.
        answering: what the client gets for each frame.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        session: Session,
        state: StreamState,
        streams: MutableMapping[str, "Conversation"],
        metrics: Metrics,
        tracer: FrameTracer,
        answering: Answering,
        idle_s: float,
        stall_s: float = 0.0,
        limits: CallerLimits | None = None,
        caller: Caller = ANONYMOUS,
        token_number: int = 0,
    ) -> None:
        self.caller = caller
        self._answering = answering
        self._token_number = token_number
        self._expelled: BitneckError | None = None
        self._engine = engine
        self._model = model
        self._session = session
        self._state = state
        self._outbox = Outbox(limit=2 * session.window)
        self._streams = streams
        self._metrics = metrics
        self._tracer = tracer
        self._trace: Any = None
        self._idle_s = idle_s
        self._jobs: dict[Job, tuple[int, _Moment]] = {}
        self._none_left: asyncio.Future[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._stall_s = stall_s
        self._limits = limits or CallerLimits()
        self._silent_since = math.inf
        self._writing_since = math.inf

    def enter(self) -> None:
        """Become the session's stream: what is pushed from now on is sent once `run` serves it."""
        older = self._streams.get(self._session.session_id)
        self._streams[self._session.session_id] = self
        if older is not None:
            older.supersede()

    @property
    def is_newest(self) -> bool:
        """Whether it is the session's stream."""
        return self._streams.get(self._session.session_id) is self

    def leave(self) -> None:
        """Be the session's stream no more. Nothing happens if a newer one is."""
        if not self.is_newest:
            return
        del self._streams[self._session.session_id]
        self._keep_untold()
        for job, (seq, _) in list(self._jobs.items()):
            if job.state is JobState.WAITING:  # what is being computed is kept for a resume
                job.abandon()
                self._session.drop(seq)

    async def run(self, peer: Peer, trace: Any) -> None:
        """Serve the stream until the client has finished, or is gone. `enter` comes first.

        Args:
            peer: the client.
            trace: the caller's trace, from `FrameTracer.parent`.

        Raises:
            BitneckError: that of `expel`.
        """
        self._trace = trace
        if self._expelled is not None:
            raise self._expelled
        writer = self._writer = asyncio.create_task(self._write(peer))
        reader = asyncio.create_task(self._read(peer.messages()))
        watchdog = asyncio.create_task(self._watch(reader))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not writer.done():
                if (
                    not reader.cancelled()
                    and (exc := reader.exception()) is not None
                    and not isinstance(exc, ConnectionError)
                ):
                    _LOG.error("session %s: reading failed: %r", self._session.session_id, exc)
                if self._jobs:  # the client has sent everything: answer it
                    self._none_left = asyncio.get_running_loop().create_future()
                    await self._none_left
                self._send(self._answering.flush(time.monotonic()))
                self._outbox.close()
                await asyncio.wait({writer})
        finally:
            self._state.on(Event.CLOSE)
            for task in (reader, writer, watchdog):
                task.cancel()
            self.leave()
            _, written, _ = await asyncio.gather(reader, writer, watchdog, return_exceptions=True)
            if isinstance(written, Exception):
                _LOG.error("session %s: writing failed: %r", self._session.session_id, written)
                self._expelled = self._expelled or ModelFailure(INTERNAL_ERROR)
        if self._expelled is not None:
            raise self._expelled

    def supersede(self) -> None:
        """A newer stream has taken over the session: end this one. The newer one gets the answers."""
        self._keep_untold()
        self._outbox.control(GoAway("the session was resumed on another stream"))
        self._outbox.close()
        if self._writer is not None:
            asyncio.get_running_loop().call_later(_SUPERSEDED_GRACE_S, self._writer.cancel)

    def expel(self, error: BitneckError) -> None:
        """End the stream now, with an error. What is unanswered is dropped."""
        self._expelled = error
        if self._writer is not None:
            self._writer.cancel()

    def _keep_untold(self) -> None:
        """Let the session's next stream say what this one has not."""
        if self._outbox.waits(SetPoint):
            self._session.told = False

    def push(self, message: SetPoint | GoAway | NewBundle) -> None:
        """Send a control message, ahead of the answers."""
        self._outbox.control(message)

    async def _write(self, peer: Peer) -> None:
        with contextlib.suppress(ConnectionError):
            loop = asyncio.get_running_loop()
            while (message := await self._outbox.get()) is not None:
                self._writing_since = loop.time()
                try:
                    await peer.write(message)
                except BaseException:
                    if isinstance(message, SetPoint):
                        self._session.told = False
                    raise
                self._writing_since = math.inf

    async def _read(self, messages: AsyncIterator[ClientMessage | None]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._outbox.room()
            self._silent_since = loop.time()
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                return
            except MalformedFrame as exc:
                self._fault(0, exc)
                continue
            finally:
                self._silent_since = math.inf
            if isinstance(message, Frame):
                self._frames((message,))
            elif isinstance(message, Pack):
                self._frames(message.frames)
            elif isinstance(message, Acknowledge):
                self._send(self._answering.acknowledge(self._session.seqs_in_flight, time.monotonic()))
            elif isinstance(message, Device):
                self._session.device = message, time.monotonic()
            else:
                kind = "an empty message" if message is None else "Open"
                self._fault(0, ProtocolError(f"{kind} is illegal here: after Open, send frames"))

    async def _watch(self, reader: "asyncio.Task[None]") -> None:
        """End reading if no message has come for too long, and writing if one is not taken for too long.

        One clock for the stream needs no timer for each message.
        """
        loop = asyncio.get_running_loop()
        idle, stall = self._idle_s or math.inf, self._stall_s or math.inf
        while not math.isinf(longest := min(idle, stall)):
            now = loop.time()
            if now - self._writing_since >= stall:
                self.expel(Unavailable(f"an answer was not read for {stall:.0f} s; come back with your token"))
                return
            if now - self._silent_since >= idle:
                self._outbox.control(GoAway(f"no message for {self._idle_s:.0f} s; come back with your token"))
                reader.cancel()
                idle = math.inf
            due = min(self._silent_since + idle, self._writing_since + stall, now + longest)
            await asyncio.sleep(max(due - now, 0.001))

    def _frames(self, frames: tuple[Frame, ...]) -> None:
        """The frames of one message."""
        received = _Moment(time.time(), time.monotonic())
        self._send(self._answering.expect(frames))
        link_bytes = round(self._session.link_bytes_since_last(received.monotonic) / len(frames))
        for frame in frames:
            self._frame(frame, received, link_bytes)

    def _frame(self, frame: Frame, received: "_Moment", link_bytes: int) -> None:
        try:
            self._limits.frame(self.caller.name, received.monotonic)
            self._state.on(Event.FRAME)
            frame = self._model.named(frame)
            self._session.oldest_token = max(self._session.oldest_token, self._token_number)
            reference = self._session.reference(frame.seq, frame.reference, frame.point)
            check_frame(frame, reference.crc32c if reference is not None else None)
            self._model.check(frame)
            before = self._session.last_point
            verdict = self._session.accept(frame.seq, frame.point, len(frame.payload), received.monotonic)
        except BitneckError as exc:
            self._fault(frame.seq, exc)
            return
        if verdict is Verdict.ANSWERED:
            self._metrics.frame(self._model.name, "RESENT")
            self._put(self._session.kept_answer(frame.seq), received.monotonic)
        elif verdict is Verdict.NEW:
            turn = self.caller.name, self._session.session_id
            step = self._answering.answers.map_step
            origin = origin_of(
                frame, self._session.client, self._session.session_id, received.wall, link_bytes, self._session.spool,
                self.caller.binding,
            )  # fmt: skip
            job = job_of(
                self._model, frame, turn, origin, reference=reference, keep=self._session.reach > 0, map_step=step
            )
            try:
                self._engine.submit(job, self._answer)
            except BitneckError as exc:
                self._session.drop(frame.seq)
                self._fault(frame.seq, exc)
                return
            self._jobs[job] = frame.seq, received
            switched = before is not None and before != frame.point
            similar = reference is not None
            asyncio.get_running_loop().call_soon(self._accepted, frame.point, len(frame.payload), switched, similar)

    def _accepted(self, point: str, payload_bytes: int, switched: bool, similar: bool) -> None:
        """Work that can wait until the frame is on its way to the engine's thread."""
        self._metrics.accepted(self._model.name, point, payload_bytes, switched=switched, similar=similar)
        if (wanted := self._session.weigh_again()) is not None:
            reason = f"max_kbps at {self._session.frames_per_s:.1f} frames per second"
            self._outbox.control(SetPoint(wanted, reason, link_limit_kbps(self._session.policy)))

    def _answer(self, job: Job, computed: Computed | BitneckError) -> None:
        """Send a frame's answer to the session's newest stream."""
        seq, received = self._jobs.pop(job)
        if isinstance(computed, BitneckError):
            self._session.fail(seq, computed.grpc_code)
            message: Fault | Result = fault_of(seq, computed)
            outcome = computed.grpc_status
        else:
            message = result_of(computed, seq, received.wall)
            self._session.complete(message, job.kept)
            outcome = "OK"
        newest = self._streams.get(self._session.session_id)
        if newest is not None:
            newest._put(message, received.monotonic)
        asyncio.get_running_loop().call_soon(self._done, job, seq, received.wall, computed, outcome)
        if self._none_left is not None and not self._jobs and not self._none_left.done():
            self._none_left.set_result(None)

    def _put(self, message: Fault | Result, received: float) -> None:
        """Send what this stream's client gets for a frame that is settled."""
        self._send(self._answering.settled(message, received, time.monotonic()))

    def _send(self, messages: Iterable[ServerMessage]) -> None:
        for message in messages:
            self._outbox.put(message)

    def _done(self, job: Job, seq: int, received: float, computed: Computed | BitneckError, outcome: str) -> None:
        """Work that can wait until the answer is written."""
        self._metrics.frame(self._model.name, outcome)
        link, messages = self._session.unreported(asyncio.get_running_loop().time())
        self._metrics.link(self._model.name, link, messages)
        if isinstance(computed, Computed):
            self._tracer.frame(self._model.name, job.point, seq, received, computed, self._trace)
        job.count(computed)

    def _fault(self, seq: int, exc: BitneckError) -> None:
        self._session.refused(seq, exc.grpc_code)
        self._metrics.frame(self._model.name, exc.grpc_status)
        self._model.count_fault(exc)
        self._put(fault_of(seq, exc), time.monotonic())
