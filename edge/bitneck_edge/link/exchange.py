"""The exchange of a session's frames and answers, over whichever connection is up.

    send --> Records --> Packer --> Connection --> cloud
    answer <-- settle <-- result, results, ack, fault <--'

Frames that are sent while no connection is up wait in the records; `attach` sends them over the next one.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from bitneck.errors import GRPC_CODES, BitneckError, error_from_status
from bitneck.wire.frames import pack_bytes, wire_bytes
from bitneck.wire.link_bytes import LinkBytes, LinkMeter
from bitneck.wire.messages import Ack, Acknowledge, Device, Fault, Frame, Pack, Result, Results
from bitneck_edge.link.connection import Connection
from bitneck_edge.link.packing import Packer, frames_of, together
from bitneck_edge.link.records import Candidate, Coded, Records
from bitneck_edge.link.sent import MessageSent, Received, Sent, Waiting

__all__ = ["Exchange"]

_LOG = logging.getLogger(__name__)
_PASSING = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))
"""Faults that may not come again when the frame is sent again."""
_BUSY = GRPC_CODES["RESOURCE_EXHAUSTED"]
"""The fault of a server that has too much to do."""
_REFERENCE = frozenset(GRPC_CODES[name] for name in ("ABORTED", "DATA_LOSS"))
"""Faults of a frame whose reference the cloud lacks, or has with other symbols."""


class Exchange:
    """Frames out, answers in. Any task may send; one task attaches connections and takes messages.

    Args:
        key_every: see `Records`.
        positions: likewise.
        ask_s: likewise.
        pack: frames in one message.
        pack_s: seconds that a frame may wait for others of its message.
    """

    def __init__(
        self,
        key_every: int,
        positions: Mapping[str, int] | None = None,
        ask_s: float | None = None,
        pack: int = 1,
        pack_s: float = 0.0,
    ) -> None:
        self._records = Records[Waiting](key_every=key_every, positions=positions, ask_s=ask_s)
        self.down = False  # whether the last attempt to connect failed
        self._heard_s = -math.inf
        self._silent = ask_s is not None
        self._pack = pack
        self._packer = Packer(pack)
        self._pack_s = pack_s
        self._pack_due: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # there may be room, or the session has failed
        self._write_lock = asyncio.Lock()
        self._connection: Connection | None = None
        self.failure: BitneckError | None = None  # the error of `fail`
        self._connections = 0  # how often unanswered frames have been sent over a new one
        self._later: set[asyncio.Task[None]] = set()
        self._added = asyncio.Event()
        self._meter = LinkMeter()  # of the newest connection
        self._earlier = LinkBytes()  # on those before it
        self._shared_out = LinkBytes()  # of the link bytes, told with an answer

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

    def silent_s(self) -> float:
        """Seconds for which frames have been out without any answer; 0 if none is out."""
        oldest_s = self._records.oldest_sent_s
        return 0.0 if oldest_s is None else max(0.0, time.perf_counter() - max(oldest_s, self._heard_s))

    async def takes(self, in_flight: int, limit_s: float) -> bool:
        """Wait until a frame can be sent at once; False if the link is down, or silent for longer than this."""
        while self.failure is None and not self.down and self.silent_s() <= limit_s:
            if self._records.has_room(in_flight):
                return True
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s / 4):
                    await self._changed.wait()
        return False

    @property
    def link_bytes(self) -> LinkBytes:
        """What has crossed the link since the session was opened, the openings of connections left out."""
        return self._earlier + self._meter.total(time.perf_counter())

    def expected_link_bytes(self, payload_bytes: float, interval_s: float) -> LinkBytes:
        """See `LinkMeter.expected`."""
        return self._meter.expected(payload_bytes, interval_s)

    def settles(self, message: object) -> bool:
        """Whether a message is about a frame that is unanswered."""
        match message:
            case Result(seq=seq) | Fault(seq=seq):
                return seq in self._records
            case Results(results):
                return any(result.seq in self._records for result in results)
            case Ack():
                return bool(self._records.acknowledged(message))
        return False

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
        prompt: bool = False,
        ask: bool = False,
        on_sent: Callable[[MessageSent], None] = lambda _written: None,
        seq: int = 0,
    ) -> Sent:
        """Send a frame; waits while the window is full. It may then wait for others of its pack.

        Args:
            point: its operating point.
            payload: its coded bytes.
            deadline_ms: from its receipt in the cloud; 0 for none.
            captured_unix_us: when the picture was taken; 0 if unknown.
            in_flight: frames that may be unanswered, this one included; 0 for the window.
            similar: see `Records.add`.
            prompt: it waits for no others, and asks for its acknowledgement.
            ask: see `Records.add`.
            on_sent: called when a message is sent whose last frame this is.
            seq: see `Records.add`.

        Raises:
            Overloaded: the frame is larger than any server takes; the session is not harmed.
            BitneckError: the session has failed for good.
        """
        while self.failure is None and not self._records.has_room(in_flight):
            self._changed.clear()
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure
        answer: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        added_s = time.perf_counter()
        frame = self._records.add(
            point,
            payload,
            answer=Waiting(answer, on_sent),
            now_s=added_s,
            deadline_ms=deadline_ms,
            captured_unix_us=captured_unix_us,
            similar=similar,
            ask=ask or prompt,
            in_flight=in_flight,
            waits=self._packer.most > 1,
            seq=seq,
        ).frame
        messages = self._packer.add(frame)
        if prompt or not self._records.has_room(in_flight):
            messages += self._packer.take()
        connections = self._connections
        self._added.set()
        for message in messages:
            if isinstance(message, Pack):  # frames of other callers, too: they go even if this one gives up
                await asyncio.shield(self._keep(self._depart(message, connections)))
            else:
                await self._depart(message, connections)
        if len(self._packer) and self._pack_due is None:
            self._pack_due = asyncio.create_task(self._send_pack_later())
        return Sent(frame.seq, frame.payload, frame.reference, added_s, answer)

    async def flush(self) -> None:
        """Nothing more follows for a while: send what waits for others, and ask for the acknowledgements."""
        for message in self._packer.take():
            await self._depart(message, self._connections)
        await self.ask()

    async def ask(self, oldest_s: float = 0.0) -> None:
        """Where frames have no answers: ask for the acknowledgements.

        Args:
            oldest_s: only if an unanswered frame, and the last time that was asked, are older than this; and only if
                nobody else is writing.
        """
        now_s, sent_s = time.perf_counter(), self._records.oldest_sent_s
        if not self._silent or sent_s is None or now_s - max(sent_s, self._records.asked_s) < oldest_s:
            return
        if oldest_s and self._write_lock.locked():  # the writer may wait for a server that does not read
            return
        async with self._write_lock:
            if self._connection is not None:
                self._records.asked(now_s)
                await self._connection.write(Acknowledge())

    async def report(self, device: Device) -> None:
        """Send how the device is, if a connection is up and nobody else is writing."""
        if not self._write_lock.locked():
            async with self._write_lock:
                if self._connection is not None:
                    await self._connection.write(device)

    async def _send_pack_later(self) -> None:
        await asyncio.sleep(self._pack_s)
        self._pack_due = None  # from here on nobody cancels this task
        for message in self._packer.take():
            await self._depart(message, self._connections)

    async def _depart(self, message: Frame | Pack, connections: int) -> None:
        """Write the message of frames that are sent for the first time."""
        if self._pack_due is not None:
            self._pack_due.cancel()
            self._pack_due = None
        frames, now_s = frames_of(message), time.perf_counter()
        if self._pack > 1:
            size = pack_bytes(message) if isinstance(message, Pack) else wire_bytes(message)
            self._records.departed(frames, size, now_s)
        record = self._records.get(frames[-1].seq)
        if record is not None:
            payload_bytes = sum(len(frame.payload) for frame in frames) / len(frames)
            awaited = not self._silent or any(frame.acknowledge for frame in frames)
            waiting = record.answer
            waiting.on_sent(MessageSent(frames[-1].seq, len(frames), payload_bytes, awaited, now_s, waiting.answer))
        await self._write(message, connections)

    async def frame_comes(self, timeout_s: float) -> None:
        """Wait until a frame is sent, or the time is over."""
        self._added.clear()
        if not self.unanswered:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._added.wait()

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
        self._packer.most = min(self._pack, window)  # no server takes more in one message

    async def attach(self, connection: Connection) -> None:
        """Send what is unanswered over a new connection, then let new frames through."""
        async with self._write_lock:
            self._connections += 1
            self._earlier, self._meter = self.link_bytes, connection.meter
            self._packer.take()  # they are among the unanswered
            frames = [self._records.resend(seq, time.perf_counter()) for seq in self._records.seqs]
            for message in together([frame for frame in frames if frame is not None], self._packer.most):
                await connection.write(message)
            if frames and self._silent:
                self._records.asked(time.perf_counter())
                await connection.write(Acknowledge())
            self._connection = connection
        self._changed.set()

    async def release(self) -> None:
        """Send what waits for others, and ask for what is not acknowledged; new frames wait for the next connection."""
        await self.flush()
        async with self._write_lock:
            self.detach()

    def detach(self) -> None:
        """The connection has ended."""
        self._connection = None

    async def finish(self, *, leave: bool) -> None:
        """Tell the server, if a connection is up, that nothing more will be sent; see `Connection.finish`."""
        if self._connection is not None:
            await self._connection.finish(leave=leave)

    def take(self, message: Result | Results | Ack | Fault) -> None:
        """The answers of frames, or why one could not be answered."""
        self._heard_s = time.perf_counter()
        match message:
            case Result():
                self._answered((message,))
                return
            case Results(results):
                self._answered(results)
                return
            case Ack():
                self._records.asked(time.perf_counter())
                self._answered(self._records.acknowledged(message))
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
            self._keep(self._write_later(frame, pause_s, self._connections))
        elif message.seq:
            self._failed(message.seq, error)
        else:
            _LOG.warning("the server refused a message: %s", error)

    def _answered(self, results: Sequence[Result]) -> None:
        """Results that came in one message; they share the link bytes since the last one."""
        now_s = time.perf_counter()
        known = [result for result in results if result.seq in self._records]
        total = self.link_bytes
        link = (total - self._shared_out) / max(1, len(known))
        if known:
            self._shared_out = total
        for result in results:
            record = self._records.settle(result.seq, answered=True)
            if record is not None and not record.answer.answer.done():
                received = Received(result, now_s, record.sent_s, record.message_bytes, link)
                record.answer.answer.set_result(received)
        self._changed.set()

    def fail(self, error: BitneckError) -> None:
        """No more frames: everyone who waits learns why. The first error counts."""
        self.failure = self.failure or error
        for task in self._later:
            task.cancel()
        if self._pack_due is not None:
            self._pack_due.cancel()
        for record in self._records.give_up():
            record.answer.fail(error)
        self._changed.set()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the exchange, at the latest."""
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task

    async def _write_later(self, frame: Frame, pause_s: float, connections: int) -> None:
        await asyncio.sleep(pause_s)
        if frame.seq in self._records:
            await self._write(frame, connections)

    async def _write(self, message: Frame | Pack, connections: int) -> None:
        """Write frames if a connection is up; else the next one gets it from the records.

        Args:
            message: of frames in the records.
            connections: how many there had been when it was to be written. A newer one has got it already.
        """
        async with self._write_lock:
            if self._connection is not None and connections == self._connections:
                await self._connection.write(message)

    def _failed(self, seq: int, error: BitneckError) -> None:
        """A frame has no answer; what comes for it later is ignored."""
        record = self._records.settle(seq, answered=False)
        if record is not None:
            record.answer.fail(error)
            self._changed.set()

    def wake(self) -> None:
        """Let those who wait for room look again."""
        self._changed.set()
