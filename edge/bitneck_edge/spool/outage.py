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
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept

__all__ = ["Flight", "HandOut", "Outage"]

_LOG = logging.getLogger(__name__)
_HOLD_S = 0.5
"""A frame that was encoded and has no answer after this time is written to the disk."""
_LOOK_S = 0.25
_LATEST_US = 1 << 62

HandOut = Callable[[Answer | Failure], None]
"""Takes the answers to frames of the spool, and why there is none."""


@dataclass(slots=True, eq=False)
class Flight:
    """A frame, from the beginning of its encoding to its answer.

    Attributes:
        session: that encodes it, and may send it.
        encoding: of its picture.
        before: the same picture, coded for an earlier bundle; its record stays until this frame needs none, or has one.
        sent: the frame, once the session has sent it.
        seq: its number in the spool, if it is there.
        over: it was answered, left to the spool, or given up.
        given: its answer, or its fault, has gone to whoever waits for it.
        lost: why it could not be left to the spool.
        timer: of its writing to the disk.
    """

    session: EdgeSession
    encoding: Encoding
    before: "Flight | None" = None
    sent: Sent | None = None
    seq: int | None = None
    over: bool = False
    given: bool = False
    lost: BitneckError | None = None
    timer: asyncio.TimerHandle | None = None


class Outage:
    """What a client does with frames while its link does not serve.

    Args:
        spool: of the device.
        hand_out: takes the answers that come after the program has been told that the frame is in the spool.
        on_change: called when the spool has another frame to send.
    """

    def __init__(self, spool: Spool, hand_out: HandOut, on_change: Callable[[], None]) -> None:
        self._spool = spool
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
        flight = Flight(session, encoding, before)
        self._flights.add(flight)
        encoding.photo.add_done_callback(functools.partial(self._encoded, flight))
        return flight

    async def encoded(self, flight: Flight) -> None:
        """Wait until a picture is encoded.

        Raises:
            ImageError: it cannot be read.
            BitneckError: it could not be encoded.
        """
        self._busy += 1
        try:
            await flight.encoding.photo
        finally:
            self._busy -= 1

    async def keep(self, flight: Flight) -> None:
        """Leave a frame to the spool, once it is encoded.

        Raises:
            Overloaded: the spool has no room, or the frame is larger than any server takes. It counts as dropped.
            Unavailable: the spool is closed.
            BitneckError: see `encoded`.
        """
        await self.encoded(flight)
        if not flight.over:
            self._leave(flight)
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
                    flight.over = True  # it stays held: the session may be resumed, and answer it
                    if flight.seq is None:  # no room until now
                        self._leave(flight)
                    break
                pause_s = _LOOK_S
            if not flight.over and _passes(flight.session, answer):
                self._leave(flight)
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
        """The session has ended: what is out goes to the spool. Waits until nothing is being written."""
        for flight in list(self._flights):
            if flight.sent is None:
                self._leave_if_encoded(flight, told=True)
            elif not flight.sent.answer.done() or _passes(flight.session, flight.sent.answer):
                self._leave(flight, told=False)
        for _ in range(100):
            if not self._busy:
                return
            await asyncio.sleep(0.01)

    def _encoded(self, flight: Flight, photo: "asyncio.Future[EncodedPhoto]") -> None:
        """A picture was encoded, or cannot be."""
        if not _is_encoded(flight):  # what is known of the picture before stays until the program is told
            self._end(flight)
        elif not flight.over:
            flight.timer = photo.get_loop().call_later(_HOLD_S, self._hold, flight)

    def _hold(self, flight: Flight) -> None:
        """Nobody has its answer in time: write it to the disk, whatever it waits for. Without room, do so later."""
        self._stop_timer(flight)
        if flight.seq is not None:
            return
        try:
            flight.seq = self._put(flight, held=True)
        except BitneckError:  # whoever sends it, or leaves it to the spool, is told
            return
        if flight.seq is None:
            flight.timer = asyncio.get_running_loop().call_later(_LOOK_S, self._hold, flight)

    def _end(self, flight: Flight) -> None:
        """Nothing more is to be done with a frame."""
        flight.over = True
        self._flights.discard(flight)
        self._stop_timer(flight)

    def _stop_timer(self, flight: Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None

    def _leave_if_encoded(self, flight: Flight, *, told: bool = False) -> None:
        """Leave a frame that was not sent to the spool; if it is not encoded, what its picture gave before."""
        if _is_encoded(flight):
            self._leave(flight, told=told)
            return
        self._end(flight)
        if flight.before is not None:
            self._leave_if_encoded(flight.before)

    def _forget_before(self, flight: Flight) -> None:
        """What a picture was encoded to before is not needed any more."""
        if (before := flight.before) is not None:
            flight.before = None
            self._cross_out(before)

    def _cross_out(self, flight: Flight) -> None:
        """A picture needs no record any more."""
        self._end(flight)
        if flight.seq is not None:
            self._spool.done([flight.seq])
        self._forget_before(flight)

    def _leave(self, flight: Flight, *, told: bool = True) -> None:
        """Leave a frame without an answer to the spool.

        Args:
            flight: the frame.
            told: whether somebody raises `Flight.lost` if it cannot be left there; else the log has it.
        """
        self._end(flight)
        if flight.lost is not None:
            return
        try:
            if flight.seq is None:
                flight.seq = self._put_or_lose(flight)
            else:
                self._spool.release(flight.seq)
                self._on_change()
        except BitneckError as exc:
            flight.lost = exc
            if not told:
                _LOG.warning("%s: %s", flight.encoding.capture.name, exc)
                if flight.before is not None:
                    self._leave_if_encoded(flight.before)

    def _answered(self, flight: Flight, answer: "asyncio.Future[Received]") -> None:
        """The session has settled a frame; if nobody watches it any more, hand its answer out, once."""
        if flight.given:
            return
        if not flight.over:  # whoever watches it goes on
            return
        self._end(flight)
        if _passes(flight.session, answer):
            self._leave(flight, told=False)
            return
        if (seq := _newest_seq(flight)) is None or flight.sent is None:
            return
        flight.given = True
        name = flight.encoding.capture.name
        try:
            found: Answer | Failure = replace(
                flight.session.answer_of(flight.encoding, flight.sent, answer.result()),
                seq=seq, spool=self._spool.spool_id, captured_unix_us=_captured_us(flight.encoding),
            )  # fmt: skip
        except BitneckError as exc:
            found = Failure(name, exc)
        self._hand_out(found)
        self._cross_out(flight)

    def _put_or_lose(self, flight: Flight) -> int:
        seq = self._put(flight, held=False)
        if seq is None:
            raise Overloaded(
                "the spool has no room, the frame is lost: make room, or let the spool have more (--spool-mb)"
            )
        return seq

    def _put(self, flight: Flight, *, held: bool) -> int | None:
        encoding, bundle = flight.encoding, flight.session.bundle
        photo = encoding.photo.result()
        try:
            self._spool.known.keep(bundle)
        except OSError as exc:
            _LOG.warning("the manifest of the bundle cannot be kept in the spool: %s", exc)
        seq = self._spool.put(
            Kept(
                seq=0,
                bundle_id=bundle.bundle_id,
                point=photo.point,
                payload=photo.encoded.payload,
                captured_unix_us=_captured_us(encoding),
                name=encoding.capture.name,
            ),
            held=held,
        )
        if seq is not None:
            self._forget_before(flight)
        if not held:
            self._on_change()
        return seq


def _is_encoded(flight: Flight) -> bool:
    photo = flight.encoding.photo
    return photo.done() and not photo.cancelled() and photo.exception() is None


def _newest_seq(flight: Flight | None) -> int | None:
    """Number of the newest record of a flight's picture; None if there is none."""
    while flight is not None and flight.seq is None:
        flight = flight.before
    return flight.seq if flight is not None else None


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
