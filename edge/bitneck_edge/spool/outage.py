"""Frames that the link does not take, or does not answer: into the spool with them, so that none is lost.

    Passage --begin--> encoded --no answer for half a second, wherever it waits--> held in the spool --answer--> done
                          |                                                           `--link fails--> spool --> Sender
                          `--link down or silent--> keep ------------------------------------------> spool --> Sender

The half second counts from the moment in which the frame is encoded, and not from its sending: it may wait for others,
for room in the window, for its turn, or for a connection to be written to. A held frame waits for the session that it
was sent on, so that the cloud does not compute it twice. If the process ends before its answer comes, it is a frame
like any other in the spool. So it is until the program has taken the answer, and until a frame that was coded again,
for another bundle, is on the disk itself.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from bitneck.errors import BitneckError, Overloaded, Unavailable
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.encoder import EncodedPhoto
from bitneck_edge.link.sent import Received, Sent
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.spool.segment import Kept
from bitneck_edge.spool.writer import Record, Writer

__all__ = ["Flight", "HandOut", "Outage"]

_LOG = logging.getLogger(__name__)
_HOLD_S = 0.5
"""A frame that was encoded and has no answer after this time is written to the disk."""
_LOOK_S = 0.25
_CLOSE_S = 1.0
_LATEST_US = 1 << 62
_NO_ROOM = "the spool has no room, the frame is lost: make room, or let the spool have more (--spool-mb)"

HandOut = Callable[[Answer | Failure], None]
"""Takes the answers to frames of the spool, and why there is none."""


@dataclass(slots=True, eq=False)
class Flight:
    """A frame, from the beginning of its encoding to its answer.

    Attributes:
        session: that encodes it, and may send it.
        encoding: of its picture; None once its frame is left to the spool without having been sent. A picture is large.
        frame: as the spool keeps it; None until it is given to the disk.
        before: the same picture, coded for an earlier bundle; its record stays until this frame needs none, or has one.
        sent: the frame, once the session has sent it.
        record: the frame as it was given to the disk; None before, and if that has not taken it.
        over: it was answered, left to the spool, or given up.
        given: its answer, or its fault, has gone to whoever waits for it.
        lost: why it could not be left to the spool.
        waited: somebody waits for the disk, and raises `lost`.
        promised: the program was told that it is in the spool, though the disk had not answered yet.
        timer: of its writing to the disk.
    """

    session: EdgeSession
    encoding: Encoding | None
    frame: Kept | None = None
    before: "Flight | None" = None
    sent: Sent | None = None
    record: Record | None = None
    over: bool = False
    given: bool = False
    lost: BitneckError | None = None
    waited: bool = False
    promised: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def seq(self) -> int | None:
        """Its number in the spool, if it is there."""
        return self.record.seq if self.record is not None else None


class Outage:
    """What a client does with frames while its link does not serve.

    Args:
        writer: writes frames into the spool of the device. The event loop does not wait for it.
        hand_out: takes the answers that come after the program has been told that the frame is in the spool.
        on_change: called when the spool has another frame to send.
    """

    def __init__(self, writer: Writer, hand_out: HandOut, on_change: Callable[[], None]) -> None:
        self._writer = writer
        self._hand_out = hand_out
        self._on_change = on_change
        self._flights: set[Flight] = set()
        self._busy = 0

    def begin(self, session: EdgeSession, encoding: Encoding, before: Flight | None = None) -> Flight:
        """A picture is being encoded: half a second after that, its frame is on the disk if it has no answer.

        Args:
            session: that encodes it.
            encoding: of the picture.
            before: the same picture, if it was encoded before, for another bundle.
        """
        flight = Flight(session, encoding, before=before)
        self._flights.add(flight)
        encoding.photo.add_done_callback(functools.partial(self._encoded, flight))
        return flight

    async def encoded(self, flight: Flight) -> None:
        """Wait until a picture is encoded.

        Raises:
            ImageError: it cannot be read.
            BitneckError: it could not be encoded.
        """
        if flight.encoding is None:
            return
        self._busy += 1
        try:
            await flight.encoding.photo
        finally:
            self._busy -= 1

    async def keep(self, flight: Flight) -> None:
        """Leave a frame to the spool, once it is encoded. A disk that does not answer is not waited for.

        Raises:
            Overloaded: the spool has no room, or the frame is larger than any server takes. It counts as dropped.
            Unavailable: the spool is closed.
            BitneckError: see `encoded`.
        """
        await self.encoded(flight)
        if not flight.over:
            self._leave(flight)
        await self._disk_answers(flight)
        if flight.lost is not None:
            raise flight.lost

    def sent(self, flight: Flight, sent: Sent) -> None:
        """A frame was sent."""
        flight.sent = sent
        sent.answer.add_done_callback(functools.partial(self._answered, flight))

    def give_up(self, flight: Flight) -> None:
        """Nobody waits for a frame any more. If it is encoded and has no answer, it is left to the spool."""
        if flight.over:
            return
        if flight.sent is None:
            self._leave_if_encoded(flight)
            return
        flight.over, flight.given = True, False
        if flight.sent.answer.done():
            self._answered(flight, flight.sent.answer)

    def told(self, flight: Flight) -> None:
        """The program has a frame's answer, or knows why there is none."""
        if flight.over:  # it is in the spool, or was never encoded
            self._forget_before(flight)
        else:
            self._cross_out(flight)

    async def watch(self, flight: Flight) -> bool:
        """Wait for the answer of a frame that was sent.

        Returns:
            Whether the answer, or a fault that does not pass, is there: call `told` once the program has it. If not,
            the frame is in the spool.

        Raises:
            Overloaded: there is no answer, and the spool has no room.
            Unavailable: there is no answer, and the spool is closed.
        """
        assert flight.sent is not None
        answer, pause_s = flight.sent.answer, _HOLD_S
        self._busy += 1
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=pause_s)
                if answer.done() or flight.over:
                    break
                link = flight.session.link
                if not link.up or link.silent_s > flight.session.silence_s:
                    self._hold(flight)
                    await self._disk_answers(flight)
                    if answer.done() or flight.over:
                        break
                    flight.over = True  # it stays held: the session may be resumed, and answer it
                    if flight.record is None:  # no room until now
                        self._leave(flight)
                        await self._disk_answers(flight)
                    break
                pause_s = _LOOK_S
            if not flight.over and _passes(flight.session, answer):
                self._leave(flight)
                await self._disk_answers(flight)
            if flight.lost is not None:
                raise flight.lost
            if flight.over:
                return False
            flight.given = True  # `_answered` may be called after this
            return True
        except asyncio.CancelledError:  # nobody waits for the answer any more
            flight.over = True
            if answer.done():
                self._answered(flight, answer)
            raise
        finally:
            self._busy -= 1

    async def close(self) -> None:
        """The session has ended: what is out goes to the spool. Waits a moment for what is being encoded."""
        for flight in list(self._flights):
            if flight.sent is None:
                if _is_encoded(flight):
                    self._leave(flight)
            elif not flight.sent.answer.done() or _passes(flight.session, flight.sent.answer):
                self._leave(flight)
        limit = time.monotonic() + _CLOSE_S
        while self._busy and time.monotonic() < limit:  # noqa: ASYNC110  many things change it
            await asyncio.sleep(0.01)
        for flight in list(self._flights):
            if flight.sent is None and not self._leave_if_encoded(flight):
                flight.lost = Unavailable("the client was closed before the picture was encoded")

    def _encoded(self, flight: Flight, photo: "asyncio.Future[EncodedPhoto]") -> None:
        """A picture was encoded, or cannot be."""
        if not _is_encoded(flight):  # what is known of the picture before stays until the program is told
            self._end(flight)
        elif not flight.over:
            flight.timer = photo.get_loop().call_later(_HOLD_S, self._hold, flight)

    def _hold(self, flight: Flight) -> None:
        """Nobody has its answer in time: write it to the disk, whatever it waits for. Without room, do so later."""
        self._stop_timer(flight)
        if flight.record is None:
            flight.record = self._put(flight, held=True)

    async def _disk_answers(self, flight: Flight) -> None:
        """Wait until it is known whether the spool takes a frame; for a moment only if the disk does not answer."""
        flight.waited = True
        try:
            while (record := flight.record) is not None and record.waits:
                await self._writer.settled(record)
                if record.waits:
                    flight.promised = True
                    return
        finally:
            flight.waited = False

    def _written(self, flight: Flight, record: Record) -> None:
        """The spool has taken a frame, or refused it."""
        if record.seq is not None:
            self._forget_before(flight)
            return
        flight.record = None
        answered = (
            flight.sent is not None and flight.sent.answer.done() and not _passes(flight.session, flight.sent.answer)
        )
        if not record.held:
            self._lose(flight, record.error or Overloaded(_NO_ROOM))
        elif flight.over and not answered:
            self._leave(flight)
        elif not flight.over and record.error is None:
            flight.timer = asyncio.get_running_loop().call_later(_LOOK_S, self._hold, flight)

    def _lose(self, flight: Flight, error: BitneckError) -> None:
        """The spool cannot take a frame that was left to it."""
        flight.lost = error
        if flight.waited:
            return
        assert flight.frame is not None
        name = flight.frame.name
        _LOG.warning("%s: %s", name, error)
        if flight.promised:
            self._hand_out(Failure(name, error))
        if flight.before is not None:
            self._leave_if_encoded(flight.before)

    def _end(self, flight: Flight) -> None:
        """Nothing more is to be done with a frame."""
        flight.over = True
        self._flights.discard(flight)
        self._stop_timer(flight)

    def _stop_timer(self, flight: Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None

    def _leave_if_encoded(self, flight: Flight) -> bool:
        """Leave a frame that was not sent to the spool; if it is not encoded, what its picture gave before, if any."""
        if _is_encoded(flight):
            self._leave(flight)
            return True
        self._end(flight)
        return flight.before is not None and self._leave_if_encoded(flight.before)

    def _forget_before(self, flight: Flight) -> None:
        """What a picture was encoded to before is not needed any more."""
        if (before := flight.before) is not None:
            flight.before = None
            self._cross_out(before)

    def _cross_out(self, flight: Flight) -> None:
        """A picture needs no record any more."""
        self._end(flight)
        if flight.record is not None:
            self._writer.done(flight.record)
        self._forget_before(flight)

    def _leave(self, flight: Flight) -> None:
        """Leave a frame without an answer to the spool."""
        self._end(flight)
        if flight.lost is not None:
            return
        if flight.record is None:
            flight.record = self._put(flight, held=False)
        else:
            self._writer.release(flight.record)
        if flight.sent is None:
            flight.encoding = None
        self._on_change()

    def _answered(self, flight: Flight, answer: "asyncio.Future[Received]") -> None:
        """The session has settled a frame; if nobody watches it any more, hand its answer out, once."""
        if flight.given:
            return
        if not flight.over:  # whoever watches it goes on
            return
        self._end(flight)
        if _passes(flight.session, answer):
            self._leave(flight)
            return
        record = _newest_record(flight)
        if record is not None and record.waits:  # its number is not known yet
            record.settled.add_done_callback(lambda _: self._answered(flight, answer))
            return
        encoding, sent = flight.encoding, flight.sent
        if (record is None and not flight.promised) or flight.lost is not None or encoding is None or sent is None:
            return
        flight.given = True
        try:
            found: Answer | Failure = flight.session.answer_of(encoding, sent, answer.result())
            if isinstance(found, Answer) and record is not None and record.seq is not None:
                captured_us = _captured_us(encoding)
                found = replace(found, seq=record.seq, spool=self._writer.spool_id, captured_unix_us=captured_us)
        except BitneckError as exc:
            found = Failure(encoding.capture.name, exc)
        self._hand_out(found)
        self._cross_out(flight)

    def _put(self, flight: Flight, *, held: bool) -> Record:
        bundle = flight.session.bundle
        if flight.frame is None:
            assert flight.encoding is not None
            encoding, photo = flight.encoding, flight.encoding.photo.result()
            flight.frame = Kept(
                seq=0,
                bundle_id=bundle.bundle_id,
                point=photo.point,
                payload=photo.encoded.payload,
                captured_unix_us=_captured_us(encoding),
                name=encoding.capture.name,
            )
        return self._writer.put(flight.frame, bundle, held=held, on_settled=functools.partial(self._written, flight))


def _is_encoded(flight: Flight) -> bool:
    if flight.encoding is None:
        return True
    photo = flight.encoding.photo
    return photo.done() and not photo.cancelled() and photo.exception() is None


def _newest_record(flight: Flight | None) -> Record | None:
    """The newest record of a flight's picture; None if there is none."""
    while flight is not None and flight.record is None:
        flight = flight.before
    return flight.record if flight is not None else None


def _captured_us(encoding: Encoding) -> int:
    """When a picture was taken; of a file, when it was read."""
    capture = encoding.capture
    if 0 < capture.unix_us < _LATEST_US:
        return capture.unix_us
    return max(0, round((time.time() - (time.perf_counter() - capture.at)) * 1e6))


def _passes(session: EdgeSession, answer: "asyncio.Future[Received]") -> bool:
    """Whether a frame has no answer for a reason that does not lie in the frame."""
    if answer.cancelled():
        return True
    error = answer.exception()
    return error is not None and (session.failure is not None or isinstance(error, Unavailable | Overloaded))
