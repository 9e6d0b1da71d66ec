"""The exchange of a session's frames and answers, over whichever connection is up.

    send --> Records --> Connection --> cloud
    answer <-- settle <-- result, fault <--'

Frames that are sent while no connection is up wait in the records; `attach` sends them over the next one.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bitneck.errors import GRPC_CODES, BitneckError, error_from_status
from bitneck.wire.frames import wire_bytes
from bitneck.wire.messages import Fault, Frame, Result
from bitneck_edge.link.connection import Connection
from bitneck_edge.link.records import Candidate, Coded, Records

__all__ = ["Exchange", "Received", "Sent"]

_LOG = logging.getLogger(__name__)
_PASSING = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))
"""Faults that may not come again when the frame is sent again."""
_BUSY = GRPC_CODES["RESOURCE_EXHAUSTED"]
"""The fault of a server that has too much to do."""
_REFERENCE = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS"))
"""Faults of a frame whose reference the cloud lacks, or has with other symbols."""


@dataclass(frozen=True, slots=True)
class Received:
    """A result, and when it came on `time.perf_counter`'s clock."""

    result: Result
    at: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A frame on its way, as it was first sent.

    Attributes:
        seq: its number.
        payload: its coded bytes.
        reference: how far back in seq the frame lies that the payload is coded against; 0 for none.
        wire_bytes: of its message on the stream.
        at: when it was sent, on `time.perf_counter`'s clock.
        answer: await it.
    """

    seq: int
    payload: bytes
    reference: int
    wire_bytes: int
    at: float
    answer: asyncio.Future[Received]


class Exchange:
    """Frames out, answers in. Any task may send; one task attaches connections and takes messages.

    Args:
        key_every: see `Records`.
        positions: likewise.
    """

    def __init__(self, key_every: int, positions: Mapping[str, int] | None = None) -> None:
        self._records = Records[asyncio.Future[Received]](key_every=key_every, positions=positions)
        self._room = asyncio.Condition()
        self._write_lock = asyncio.Lock()
        self._connection: Connection | None = None
        self._failure: BitneckError | None = None
        self._connections = 0  # how often unanswered frames have been sent over a new one
        self._later: set[asyncio.Task[None]] = set()
        self._added = asyncio.Event()

    @property
    def failure(self) -> BitneckError | None:
        """The error of `fail`; None before it."""
        return self._failure

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._records.window

    @property
    def unanswered(self) -> tuple[int, ...]:
        """Numbers of the frames that wait for their answer."""
        return self._records.seqs

    @property
    def progress(self) -> tuple[int, int]:
        """Changes with each frame that is sent or answered."""
        return self._records.next_seq, len(self._records)

    def waits_for(self, seqs: frozenset[int]) -> bool:
        """Whether any of these frames is unanswered."""
        return any(seq in self._records for seq in seqs)

    def overdue(self, limit_s: float) -> bool:
        """Whether a frame was last sent more than this long ago and has no answer yet."""
        oldest_s = self._records.oldest_sent_s
        return oldest_s is not None and time.perf_counter() - oldest_s > limit_s

    def candidate(self, point: str) -> Candidate | None:
        """What the next frame at a point may be coded against; None if it has to be coded by itself."""
        return self._records.candidate(point)

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
            in_flight: frames that may be unanswered, this one included; 0 for the window.
            similar: see `Records.add`.

        Raises:
            Overloaded: the frame is larger than any server takes; the session is not harmed.
            BitneckError: the session has failed for good.
        """
        async with self._room:
            await self._room.wait_for(lambda: self._records.has_room(in_flight) or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            answer: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
            record = self._records.add(
                point,
                payload,
                answer=answer,
                now_s=time.perf_counter(),
                deadline_ms=deadline_ms,
                captured_unix_us=captured_unix_us,
                similar=similar,
            )
            connections = self._connections
        self._added.set()
        frame = record.frame
        await self._write(frame, connections)
        return Sent(frame.seq, frame.payload, frame.reference, wire_bytes(frame), record.sent_s, answer)

    async def frame_comes(self, timeout_s: float) -> None:
        """Wait until a frame is sent, or the time is over."""
        self._added.clear()
        if not self.unanswered:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._added.wait(), timeout_s)

    def granted(self, *, window: int, reach: int, same_session: bool) -> None:
        """The server has opened the session.

        Args:
            window: see `Records.opened`.
            reach: likewise.
            same_session: False if the server has forgotten the session, and this is another one.
        """
        if not same_session:
            self._records.restart()
        self._records.opened(window=window, reach=reach)

    async def attach(self, connection: Connection) -> None:
        """Send what is unanswered over a new connection, then let new frames through."""
        async with self._write_lock:
            self._connections += 1
            for seq in self._records.seqs:
                frame = self._records.resend(seq, time.perf_counter())
                if frame is not None:
                    await connection.write(frame)
            self._connection = connection
        await self._wake()

    async def release(self) -> None:
        """New frames wait for the next connection; a write that is under way is finished."""
        async with self._write_lock:
            self._connection = None

    def detach(self) -> None:
        """The connection has ended."""
        self._connection = None

    async def finish(self) -> None:
        """Tell the server, if a connection is up, that nothing more will be sent."""
        if self._connection is not None:
            await self._connection.finish()

    async def take(self, message: Result | Fault) -> None:
        """A frame's result, or why it could not be answered."""
        if isinstance(message, Result):
            await self._settle(message.seq, Received(message, time.perf_counter()))
            return
        error = error_from_status(message.code, message.message)
        if message.code in _REFERENCE:
            self._records.reference_refused(message.seq)
        again = None
        if message.code in _PASSING:
            spread = random.random()  # noqa: S311  no secret
            again = self._records.retry(message.seq, time.perf_counter(), busy=message.code == _BUSY, spread=spread)
        if again is not None:
            frame, pause_s = again
            _LOG.warning("frame %d is sent again in %.1f s: %s", frame.seq, pause_s, error)
            task = asyncio.create_task(self._write_later(frame, pause_s, self._connections))
            self._later.add(task)
            task.add_done_callback(self._later.discard)
        elif message.seq:
            await self._settle(message.seq, error)
        else:
            _LOG.warning("the server refused a message: %s", error)

    async def fail(self, error: BitneckError) -> None:
        """No more frames: everyone who waits learns why. The first error counts."""
        self._failure = self._failure or error
        for task in self._later:
            task.cancel()
        for record in self._records.give_up():
            _fail_answer(record.answer, error)
        await self._wake()

    async def _write_later(self, frame: Frame, pause_s: float, connections: int) -> None:
        await asyncio.sleep(pause_s)
        if frame.seq in self._records:
            await self._write(frame, connections)

    async def _write(self, frame: Frame, connections: int) -> None:
        """Write a frame if a connection is up; else the next one gets it from the records.

        Args:
            frame: of the records.
            connections: how many there had been when it was to be written. A newer one has got it already.
        """
        async with self._write_lock:
            if self._connection is not None and connections == self._connections:
                await self._connection.write(frame)

    async def _settle(self, seq: int, outcome: Received | BitneckError) -> None:
        """The end of a frame; a second answer to one frame is ignored."""
        record = self._records.settle(seq, answered=isinstance(outcome, Received))
        if record is None:
            return
        if isinstance(outcome, BitneckError):
            _fail_answer(record.answer, outcome)
        elif not record.answer.done():
            record.answer.set_result(outcome)
        await self._wake()

    async def _wake(self) -> None:
        """Let those who wait for room look again."""
        async with self._room:
            self._room.notify_all()


def _fail_answer(answer: asyncio.Future[Received], error: BitneckError) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # marks it as seen: asyncio need not warn if nobody awaits it any more
