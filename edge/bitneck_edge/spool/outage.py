"""Frames that the link does not take, or does not answer: into the spool with them, so that none is lost.

    Passage --link down or silent--> keep -----------------------------------------> spool --> Sender
    Passage --sent--> watch --no answer for half a second--> held in the spool --answer--> done
                                                              `--link fails--------> spool --> Sender

A held frame waits for the session that it was sent on, so that the cloud does not compute it twice. If the process ends
before its answer comes, it is a frame like any other in the spool.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from bitneck.errors import BitneckError, Overloaded, Unavailable
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.link.sent import Received, Sent
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept

__all__ = ["Flight", "HandOut", "Outage"]

_LOG = logging.getLogger(__name__)
_HOLD_S = 0.5
"""A frame that has no answer after this time is written to the disk."""
_LOOK_S = 0.25
_LATEST_US = 1 << 62

HandOut = Callable[[Answer | Failure], None]
"""Takes the answers to frames of the spool, and why there is none."""


@dataclass(slots=True, eq=False)
class Flight:
    """A frame that was sent live.

    Attributes:
        session: that it was sent on.
        encoding: of its picture.
        sent: the frame.
        seq: its number in the spool, if it is there.
        over: it was answered, or left to the spool.
        lost: why it could not be left to the spool.
    """

    session: EdgeSession
    encoding: Encoding
    sent: Sent
    seq: int | None = None
    over: bool = False
    lost: BitneckError | None = None


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

    async def keep(self, session: EdgeSession, encoding: Encoding) -> int:
        """Keep a picture's frame in the spool, once it is encoded.

        Returns:
            Its number there.

        Raises:
            ImageError: the picture cannot be read.
            Overloaded: the spool has no room, or the frame is larger than any server takes. It counts as dropped.
            Unavailable: the spool is closed.
            BitneckError: it could not be encoded.
        """
        self._busy += 1
        try:
            await encoding.photo
            return self._put_or_lose(session, encoding)
        finally:
            self._busy -= 1

    def sent(self, session: EdgeSession, encoding: Encoding, sent: Sent) -> Flight:
        """A frame was sent."""
        flight = Flight(session, encoding, sent)
        self._flights.add(flight)
        sent.answer.add_done_callback(functools.partial(self._answered, flight))
        return flight

    async def watch(self, flight: Flight) -> bool:
        """Wait for a frame's answer.

        Returns:
            Whether the answer, or a fault that does not pass, is there. If not, the frame is in the spool.

        Raises:
            Overloaded: there is no answer, and the spool has no room.
            Unavailable: there is no answer, and the spool is closed.
        """
        answer, pause_s = flight.sent.answer, _HOLD_S
        self._busy += 1
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=pause_s)
                if answer.done() or flight.over:
                    break
                if flight.seq is None:
                    flight.seq = self._put(flight.session, flight.encoding, held=True)
                link = flight.session.link
                if not link.up or link.silent_s > flight.session.silence_s:
                    flight.over = True
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
            flight.over = True
            if flight.seq is not None:
                self._spool.done([flight.seq])
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
            if not flight.sent.answer.done() or _passes(flight.session, flight.sent.answer):
                self._leave(flight)
        for _ in range(100):
            if not self._busy:
                return
            await asyncio.sleep(0.01)

    def _leave(self, flight: Flight) -> None:
        """Leave a frame without an answer to the spool."""
        flight.over = True
        self._flights.discard(flight)
        if flight.lost is not None:
            return
        try:
            if flight.seq is None:
                flight.seq = self._put_or_lose(flight.session, flight.encoding)
            else:
                self._spool.release(flight.seq)
                self._on_change()
        except BitneckError as exc:
            flight.lost = exc
            _LOG.warning("%s: %s", flight.encoding.capture.name, exc)

    def _answered(self, flight: Flight, answer: "asyncio.Future[Received]") -> None:
        """The session has settled a frame; if nobody watches it any more, hand its answer out."""
        passes = _passes(flight.session, answer)
        if not flight.over:  # whoever watches it goes on
            if not passes:
                self._flights.discard(flight)
            return
        self._flights.discard(flight)
        if passes:
            self._leave(flight)
            return
        if flight.seq is None:
            return
        name = flight.encoding.capture.name
        try:
            found: Answer | Failure = replace(
                flight.session.answer_of(flight.encoding, flight.sent, answer.result()),
                seq=flight.seq, spool=self._spool.spool_id, captured_unix_us=_captured_us(flight.encoding),
            )  # fmt: skip
        except BitneckError as exc:
            found = Failure(name, exc)
        self._hand_out(found)
        self._spool.done([flight.seq])

    def _put_or_lose(self, session: EdgeSession, encoding: Encoding) -> int:
        seq = self._put(session, encoding, held=False)
        if seq is None:
            raise Overloaded(
                "the spool has no room, the frame is lost: make room, or let the spool have more (--spool-mb)"
            )
        return seq

    def _put(self, session: EdgeSession, encoding: Encoding, *, held: bool) -> int | None:
        photo = encoding.photo.result()
        try:
            self._spool.known.keep(session.bundle)
        except OSError as exc:
            _LOG.warning("the manifest of the bundle cannot be kept in the spool: %s", exc)
        seq = self._spool.put(
            Kept(
                seq=0,
                bundle_id=session.bundle.bundle_id,
                point=photo.point,
                payload=photo.encoded.payload,
                captured_unix_us=_captured_us(encoding),
                name=encoding.capture.name,
            ),
            held=held,
        )
        if not held:
            self._on_change()
        return seq


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
