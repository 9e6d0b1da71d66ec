"""The bidirectional stream: kept open, reopened and resumed, with a bounded window of unanswered frames.

One task owns the connection. It opens the stream, resends what is unanswered, and reads answers; when the stream ends,
or an answer is overdue, it connects again after a pause that doubles and varies. Frames are numbered once: the cloud
answers each number once, whatever the number of reconnects.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from bitneck.backoff import Backoff
from bitneck.errors import (
    GRPC_CODES,
    BitneckError,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    Unavailable,
    error_from_status,
)
from bitneck.frames import MAX_MESSAGE_BYTES, seal_frame, wire_bytes
from bitneck.messages import Frame
from bitneck.v1 import inference_pb2 as pb
from bitneck_edge.link.flow import Flow
from bitneck_edge.link.references import Candidate, Coded, References
from bitneck_edge.link.remote import Access, from_rpc_error, stub_of
from bitneck_edge.link.wire import frame_to_wire

__all__ = ["Link", "LinkSettings", "Received", "Sent"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.2, 5.0
_PASSING = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))
"""Faults that may not come again when the frame is sent again."""
_REFERENCE = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS"))
"""Faults of a frame whose reference the cloud does not have, or has otherwise."""
_MAX_WINDOW = 1024
_FAIR_S = 1.0
"""A server that sends us away after so long did its part; one that does it at once counts as failing."""

Call = grpc.aio.StreamStreamCall[pb.ClientMessage, pb.ServerMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """See `bitneck_edge.settings.EdgeSettings`."""

    access: Access
    model: str
    bundle_id: str
    client: str
    connect_timeout_s: float
    answer_timeout_s: float
    retries: int
    references: bool = False
    key_every: int = 1


@dataclass(frozen=True, slots=True)
class Received:
    """A result, and when it came on `time.perf_counter`'s clock."""

    result: pb.Result
    at: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A frame on its way, as it was first sent: await ``answer``. `reference` is the distance in seq, 0 for none."""

    seq: int
    payload: bytes
    reference: int
    wire_bytes: int
    at: float
    answer: asyncio.Future[Received]


class Link:
    """The stream to the cloud.

    Args:
        settings: addresses and limits.
        on_point: called with (point, reason) when the cloud asks for another operating point.
        on_reconnect: called when the link was opened again and unanswered frames have been sent again.
    """

    def __init__(
        self,
        settings: LinkSettings,
        on_point: Callable[[str, str], None],
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._address = settings.access.address
        self._on_point = on_point
        self._on_reconnect = on_reconnect
        self._flow = Flow(window=1)
        self._references = References(settings.key_every)
        self._answers: dict[int, asyncio.Future[Received]] = {}
        self._sent_at: dict[int, float] = {}
        self._room = asyncio.Condition()
        self._write_lock = asyncio.Lock()
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: BitneckError | None = None
        self._leaving: set[int] | None = None
        self._token = ""
        self._asked_point = ""
        self._closing = False
        self._sent_away = False
        self.session_id = ""
        self.reconnects = 0
        self.initial_point = ""

    async def open(self) -> None:
        """Connect and open the session.

        Raises:
            Unavailable: no server after the retries.
            BundleMismatch: the server runs another bundle.
            BitneckError: whatever else the server refuses.
        """
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(opened), name="bitneck-link")
        await opened
        self.initial_point = self._asked_point

    @property
    def failure(self) -> BitneckError | None:
        """Why the link is of no more use; None while it is."""
        return self._failure

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._flow.window

    async def close(self) -> None:
        """End the session; unanswered frames fail with `Unavailable`."""
        self._closing = True  # from here on the end of the stream is what was asked for
        if self._call is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1.0):
                    await self._call.done_writing()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._fail(Unavailable("the link was closed before the answer came"))

    @property
    def unanswered(self) -> int:
        """Frames that wait for their answer."""
        return self._flow.unanswered

    def candidate(self, point: str) -> Candidate | None:
        """What the next frame at a point may be coded against; None where it has to be coded by itself."""
        return self._references.candidate(point, self._flow.next_seq())

    async def send(
        self,
        point: str,
        payload: bytes,
        *,
        deadline_ms: int = 0,
        captured_unix_us: int = 0,
        in_flight: int = 0,
        similar: Coded | None = None,
    ) -> Sent:
        """Send a frame; waits while the window is full.

        Args:
            point: its operating point.
            payload: its coded bytes.
            deadline_ms: from its receipt in the cloud; 0 for none.
            captured_unix_us: when the picture was taken; 0 if unknown.
            in_flight: frames that may be unanswered with this one; 0 for the window.
            similar: its symbols, and its payload coded against another frame: that is sent where it is the smaller one
                and the reference still holds.

        Raises:
            Overloaded: the frame is larger than any server takes; the link is not harmed.
            BitneckError: the link has failed for good.
        """
        async with self._room:
            await self._room.wait_for(
                lambda: (
                    (self._flow.has_room and not 0 < in_flight <= self._flow.unanswered) or self._failure is not None
                )
            )
            if self._failure is not None:
                raise self._failure
            frame = seal_frame(
                seq=self._flow.next_seq(),
                point=point,
                payload=payload,
                deadline_ms=deadline_ms,
                captured_unix_us=captured_unix_us,
            )
            alone, size = frame, wire_bytes(frame)
            if similar is not None:
                frame = self._smaller(alone, similar)
                size = wire_bytes(frame)
            if size > MAX_MESSAGE_BYTES:  # gRPC would end the call, and again at each resend
                raise Overloaded(
                    f"a frame of {size} bytes at {point}, the limit is {MAX_MESSAGE_BYTES}; "
                    "it is not sent: choose an operating point of a lower rate"
                )
            answer: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
            self._answers[frame.seq] = answer
            at = self._sent_at[frame.seq] = time.perf_counter()
            self._flow.add(frame, alone if frame is not alone else None)
            if similar is not None:
                self._references.sent(frame.seq, similar.symbols, alone=frame is alone)
        await self._write(frame)
        return Sent(frame.seq, frame.payload, frame.reference, size, at, answer)

    def _smaller(self, alone: Frame, similar: Coded) -> Frame:
        """A frame coded by itself, or the same against its reference."""
        distance = self._references.distance(similar.candidate, alone.seq)
        if not distance or similar.candidate is None or similar.payload is None:
            return alone
        frame = seal_frame(
            seq=alone.seq,
            point=alone.point,
            payload=similar.payload,
            deadline_ms=alone.deadline_ms,
            captured_unix_us=alone.captured_unix_us,
            reference=distance,
            reference_crc32c=similar.candidate.reference.crc32c,
        )
        return frame if wire_bytes(frame) < wire_bytes(alone) else alone

    async def _write(self, frame: Frame) -> None:
        """Write a frame, if there is a connection; else it goes out with the resends of the next one."""
        async with self._write_lock:
            if self._call is not None:
                await _put(self._call, pb.ClientMessage(frame=frame_to_wire(frame)))

    async def _run(self, opened: asyncio.Future[None]) -> None:
        """Keep connected until that fails for good; then tell everyone who waits."""
        try:
            await self._connections(opened)
        except BitneckError as exc:
            await self._fail(exc, opened)
        except Exception as exc:  # noqa: BLE001  whoever waits for an answer must not wait for ever
            _LOG.exception("the link failed")
            await self._fail(BitneckError(f"the link failed: {exc!r}"), opened)

    async def _connections(self, opened: asyncio.Future[None]) -> None:
        """Connections, one after another; raises what cannot be helped by another."""
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=self._settings.retries)
        while True:
            answered_before = self._flow.unanswered, self._flow.next_seq()
            self._sent_away, begun = False, time.perf_counter()
            try:
                await self._connection(opened)
                error: BitneckError = Unavailable(f"{self._address}: the server ended the stream")
            except grpc.aio.AioRpcError as exc:
                error = from_rpc_error(exc, self._address)
            except BitneckError as exc:
                error = exc
            if not isinstance(error, (Unavailable, DeadlineExceeded, Overloaded)):
                raise error  # trying again would be refused again
            if self._closing:
                return
            fairly = self._sent_away and time.perf_counter() - begun > _FAIR_S
            if fairly or answered_before != (self._flow.unanswered, self._flow.next_seq()):
                backoff.succeeded()
            pause_s = backoff.failed(random.random())  # noqa: S311  no secret
            if pause_s is None:
                raise Unavailable(f"{error}; gave up after {backoff.failures} attempts") from error
            _LOG.warning("%s; connecting again in %.1f s", error, pause_s)
            await asyncio.sleep(pause_s)
            self.reconnects += 1

    async def _connection(self, opened: asyncio.Future[None]) -> None:
        """One connection, from connecting to its end."""
        async with self._settings.access.channel() as channel:
            await self._settings.access.connected(channel, self._settings.connect_timeout_s)
            call = stub_of(channel).Stream(metadata=self._settings.access.metadata)
            try:
                await self._handshake(call)
                if not opened.done():
                    opened.set_result(None)
                await self._serve(call)
            finally:
                self._call = None
                call.cancel()

    async def _handshake(self, call: Call) -> None:
        """Open the session, or resume it; then resend what is unanswered."""
        s = self._settings
        request = pb.Open(
            model=s.model,
            bundle_id=s.bundle_id,
            client=s.client,
            resume_token=self._token,
            references=s.references,
        )
        try:
            async with asyncio.timeout(s.answer_timeout_s):
                await _put(call, pb.ClientMessage(open=request))
                message = await call.read()
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{self._address}: no answer to Open within {s.answer_timeout_s:.1f} s") from exc
        if not isinstance(message, pb.ServerMessage):
            raise Unavailable(f"{self._address}: the server ended the stream before it was open")
        if not message.HasField("opened"):
            raise ProtocolError(
                f"{self._address}: the first message was {message.WhichOneof('message')}, expected Opened"
            )
        reply = message.opened
        if self.session_id and reply.session_id != self.session_id:
            _LOG.warning("the session is not known any more; going on in a new one")
            self._flow.restart()
            self._references.forget()
        self._references.opened(min(reply.references, _MAX_WINDOW) if s.references else 0)
        self.session_id, self._token = reply.session_id, reply.resume_token
        self._flow.window = min(max(1, reply.window), _MAX_WINDOW)
        if reply.point != self._asked_point:
            self._asked_point = reply.point
            if self.reconnects and reply.point:
                self._on_point(reply.point, "asked for while the link was down")
        try:
            async with asyncio.timeout(s.answer_timeout_s), self._write_lock:
                for frame in self._flow.to_resend():
                    self._sent_at[frame.seq] = time.perf_counter()
                    await _put(call, pb.ClientMessage(frame=frame_to_wire(frame)))
                self._call = call
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"{self._address}: the server does not read; waited {s.answer_timeout_s:.1f} s"
            ) from exc
        if self.reconnects:
            self._on_reconnect()
        async with self._room:
            self._room.notify_all()

    async def _serve(self, call: Call) -> None:
        """Read until the stream ends, or is to be left; raises the status it ended with."""
        self._leaving = None
        watchdog = asyncio.create_task(self._watch(call))
        try:
            while isinstance(message := await call.read(), pb.ServerMessage):
                if not await self._take(message):
                    return
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            if watchdog.done():
                watchdog.result()  # raises: its way of ending a read
            raise Unavailable(f"{self._address}: the stream was cancelled in the middle of a write") from None
        finally:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)

    async def _watch(self, call: Call) -> None:
        """Cancel a call on which an answer is overdue: the other side may be gone without a word."""
        limit = self._settings.answer_timeout_s
        while True:
            await asyncio.sleep(limit / 10)
            oldest = min(self._sent_at.values(), default=None)
            if oldest is not None and time.perf_counter() - oldest > limit:
                call.cancel()
                raise DeadlineExceeded(
                    f"{self._address}: a frame waited {limit:.1f} s for its answer; the link counts as dead"
                )

    async def _take(self, message: pb.ServerMessage) -> bool:
        """One message of the server; False where the stream is to be left."""
        kind = message.WhichOneof("message")
        if kind == "result":
            await self._settle(message.result.seq, Received(message.result, time.perf_counter()))
        elif kind == "fault":
            await self._fault(message.fault)
        elif kind == "set_point":
            self._asked_point = message.set_point.point
            self._on_point(message.set_point.point, message.set_point.reason)
        elif kind == "go_away":
            _LOG.info("the server is going away: %s", message.go_away.reason)
            async with self._write_lock:
                self._call = None  # new frames go to the next connection
            self._sent_away = True
            self._leaving = {frame.seq for frame in self._flow.to_resend()}
        return self._leaving is None or any(seq in self._answers for seq in self._leaving)

    async def _fault(self, fault: pb.Fault) -> None:
        error = error_from_status(fault.code, fault.message)
        if fault.code in _REFERENCE and self._flow.refers(fault.seq):
            self._references.forget()
        frame = self._flow.retry(fault.seq) if fault.code in _PASSING else None
        if frame is not None:
            _LOG.warning("frame %d is sent again: %s", fault.seq, error)
            self._sent_at[fault.seq] = time.perf_counter()
            await self._write(frame)
        elif fault.seq:
            await self._settle(fault.seq, error)
        else:
            _LOG.warning("the server refused a message: %s", error)

    async def _settle(self, seq: int, outcome: Received | BitneckError) -> None:
        """A frame's end; a second answer to one frame is ignored."""
        if not self._flow.answered(seq):
            return
        self._references.settled(seq, answered=isinstance(outcome, Received))
        self._sent_at.pop(seq, None)
        answer = self._answers.pop(seq)
        if not answer.done():
            if isinstance(outcome, BitneckError):
                answer.set_exception(outcome)
                answer.exception()  # where nobody awaits it any more it is no news
            else:
                answer.set_result(outcome)
        async with self._room:
            self._room.notify_all()

    async def _fail(self, error: BitneckError, opened: asyncio.Future[None] | None = None) -> None:
        """The link is of no more use: everyone who waits learns why."""
        self._failure = self._failure or error
        if opened is not None and not opened.done():
            opened.set_exception(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # as above
        self._answers.clear()
        self._sent_at.clear()
        async with self._room:
            self._room.notify_all()


async def _put(call: Call, message: pb.ClientMessage) -> None:
    """Write to a call. Whether it is over is not told here: the task that reads from it learns that, and why.

    gRPC reports a call that another task cancelled as a cancellation of this one, which it is not.
    """
    try:
        await call.write(message)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
        _LOG.debug("a message was not written: the stream is over")
    except asyncio.CancelledError:
        if _being_cancelled():
            raise


def _being_cancelled() -> bool:
    """Whether a `CancelledError` is meant for the running task; else it is how a call says that it was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
