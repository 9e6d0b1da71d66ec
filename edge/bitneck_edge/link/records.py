"""The frames of one session, from their first sending to their answer. Pure: no socket, no clock.

    add --> unanswered --> settle       each frame is settled once
             ^      |
             +------+  resend: over a new connection;  retry: after a fault that may pass

One `Record` holds everything about an unanswered frame. An answered frame whose symbols were kept may be the reference
of later ones: they are coded against it where that takes fewer bytes. A reference is always an answered frame, so a
lost frame harms no other one. Each operating point has its own reference; a frame without one is a key frame. A frame
that is sent again is sent as a key frame: the cloud may have lost the reference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from bitneck.coding.conditional_codec import Reference
from bitneck.errors import Overloaded
from bitneck.wire.frames import MAX_MESSAGE_BYTES, seal_frame, wire_bytes
from bitneck.wire.messages import Ack, Frame, Result

__all__ = ["Candidate", "Coded", "Record", "Records"]

A = TypeVar("A")
"""Where the answer goes, such as a future: the table only keeps it."""

_MAX_ATTEMPTS = 4
_MAX_ATTEMPTS_BUSY = 9
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A frame that the next one may be coded against. `Records.add` checks again whether it still holds.

    Attributes:
        seq: of the answered frame.
        reference: its symbols.
        generation: how often the references had been forgotten before it.
    """

    seq: int
    reference: Reference
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """What a frame of similar pictures carries beside its own payload.

    Attributes:
        symbols: of the frame, for frames that follow.
        candidate: what `payload` is coded against; None where there was no candidate.
        payload: the symbols coded against the candidate.
    """

    symbols: Reference
    candidate: Candidate | None = None
    payload: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Generic[A]):
    """An unanswered frame.

    Attributes:
        frame: as it was first sent.
        alone: the same frame coded by itself; `frame` itself if that has no reference.
        answer: where its answer goes.
        sent_s: when it was last sent; infinite while it waits for others of its message.
        attempts: how often the session was asked for its answer.
        symbols: of the frame, if later frames may refer to it.
        message_bytes: of the message that it was first sent in, or its share of a pack.
    """

    frame: Frame
    alone: Frame
    answer: A
    sent_s: float
    attempts: int = 1
    symbols: Reference | None = None
    message_bytes: float = 0.0

    @property
    def refers(self) -> bool:
        """Whether it was first sent coded against another frame."""
        return self.frame is not self.alone


class Records(Generic[A]):
    """The unanswered frames of a session, and the references that the next frame may use.

    All times are seconds on one clock of the caller's choice.

    Attributes:
        window: frames that may be unanswered.
        next_seq: number of the next frame.
        duplicates: answers that no frame waited for.
        asked_s: when the cloud was last asked for acknowledgements, or sent one.

    Args:
        window: frames that may be unanswered; `opened` sets the server's.
        key_every: at each point, at least one of this many frames of similar pictures is a key frame.
        positions: what stands for an operating point's id on the wire; see `bitneck.wire.messages.Frame`.
        ask_s: seconds after which a frame asks for its acknowledgement, if none has come; None where each frame has an
            answer.
    """

    def __init__(
        self,
        *,
        window: int = 1,
        key_every: int = 1,
        positions: Mapping[str, int] | None = None,
        ask_s: float | None = None,
    ) -> None:
        self._positions = dict(positions or {})
        self._ask_s = ask_s
        self._unasked = 0  # frames since the last one that asked for an acknowledgement
        self.asked_s = -math.inf
        self.window = window
        self.next_seq = 1
        self.duplicates = 0
        self._key_every = key_every
        self._reach = 0
        self._unanswered: dict[int, Record[A]] = {}  # in order of seq
        self._generation = 0
        self._newest: dict[str, Candidate] = {}  # by operating point
        self._since_key: dict[str, int] = {}  # frames since the last key frame, by operating point

    def __len__(self) -> int:
        """Frames that wait for their answer."""
        return len(self._unanswered)

    def __contains__(self, seq: int) -> bool:
        """Whether a frame waits for its answer."""
        return seq in self._unanswered

    @property
    def seqs(self) -> tuple[int, ...]:
        """Numbers of the unanswered frames, in order."""
        return tuple(self._unanswered)

    def get(self, seq: int) -> Record[A] | None:
        """The record of an unanswered frame."""
        return self._unanswered.get(seq)

    @property
    def oldest_sent_s(self) -> float | None:
        """The earliest time at which an unanswered frame was last sent; None if no frame is out."""
        oldest_s = min((record.sent_s for record in self._unanswered.values()), default=math.inf)
        return oldest_s if oldest_s < math.inf else None

    def opened(self, *, window: int, reach: int) -> None:
        """A session is open, new or resumed.

        Args:
            window: frames that may be unanswered.
            reach: how far back in seq a reference may lie; 0 for no references.
        """
        self.window, self._reach = window, reach

    def restart(self) -> None:
        """The server has forgotten the session: what is unanswered goes to a new one, with the same numbers."""
        self._unanswered = {seq: replace(record, attempts=1) for seq, record in self._unanswered.items()}
        self.forget_references()

    def forget_references(self) -> None:
        """The cloud no longer has the frames that were answered so far."""
        self._generation += 1
        self._newest.clear()

    def has_room(self, in_flight: int = 0) -> bool:
        """Whether another frame may be sent.

        Args:
            in_flight: frames that may be unanswered with that one, if fewer than the window; 0 for the window.
        """
        return len(self) < min(self.window, in_flight or self.window)

    def candidate(self, point: str) -> Candidate | None:
        """What the next frame at `point` may be coded against; None if it has to be a key frame."""
        newest = self._newest.get(point)
        return newest if self._distance(newest) else None

    def add(
        self,
        point: str,
        payload: bytes,
        *,
        answer: A,
        now_s: float,
        deadline_ms: int = 0,
        captured_unix_us: int = 0,
        similar: Coded | None = None,
        ask: bool = False,
        in_flight: int = 0,
        waits: bool = False,
        seq: int = 0,
    ) -> Record[A]:
        """A frame is about to be sent for the first time: number it, seal it, and note it as unanswered.

        Args:
            point: its operating point.
            payload: its coded bytes.
            answer: where its answer goes.
            now_s: the time.
            deadline_ms: from its receipt in the cloud; 0 for none.
            captured_unix_us: when the picture was taken; 0 if unknown.
            similar: of a stream of similar pictures. The frame is coded against its candidate if that is still a
                reference and takes fewer bytes.
            ask: for its acknowledgement, where frames have no answers.
            in_flight: see `has_room`.
            waits: it waits for others of its message; `departed` tells when it is sent.
            seq: its number, above those of all frames before it; 0 for the next one.

        Returns:
            The record; its `frame` is the one to send.

        Raises:
            Overloaded: the window is full, or the frame is larger than any server takes. Nothing is noted.
        """
        if not self.has_room():
            raise Overloaded(f"frame {self.next_seq} cannot be sent: {len(self)} frames are unanswered already")
        self.next_seq = max(self.next_seq, seq)
        alone = frame = seal_frame(
            seq=self.next_seq,
            point=point,
            payload=payload,
            deadline_ms=deadline_ms,
            captured_unix_us=captured_unix_us,
            position=self._positions.get(point, 0),
            acknowledge=self._ask_s is not None and (ask or self._asks(now_s, in_flight)),
        )
        if similar is not None:
            frame = self._smaller(alone, similar)
        size = wire_bytes(frame)
        if size > MAX_MESSAGE_BYTES:  # gRPC would end the call, and again at each resend
            raise Overloaded(
                f"a frame of {size} bytes at {point}, the limit is {MAX_MESSAGE_BYTES}; "
                "it is not sent: choose an operating point of a lower rate"
            )
        sent_s = math.inf if waits else now_s
        symbols = similar.symbols if similar is not None and self._reach else None
        record = Record(frame=frame, alone=alone, answer=answer, sent_s=sent_s, symbols=symbols, message_bytes=size)
        self._unanswered[frame.seq] = record
        self.next_seq += 1
        self._unasked += 1
        if frame.acknowledge:
            self.asked(now_s)
        if similar is not None:
            self._since_key[point] = self._since_key.get(point, 0) + 1 if record.refers else 0
        return record

    def departed(self, frames: Sequence[Frame], message_bytes: int, now_s: float) -> None:
        """Frames that waited for others are sent, in one message: note when, and each one's share of its bytes."""
        for frame in frames:
            if (record := self._unanswered.get(frame.seq)) is not None:
                share = message_bytes / len(frames)
                self._unanswered[frame.seq] = replace(record, sent_s=now_s, message_bytes=share)

    def asked(self, now_s: float) -> None:
        """The cloud was asked for acknowledgements, or has sent one."""
        self._unasked, self.asked_s = 0, now_s

    def _asks(self, now_s: float, in_flight: int) -> bool:
        """Whether the next frame has to ask for its acknowledgement.

        Else the window might fill up before the cloud sends one of its own accord, or the link count as dead.
        """
        assert self._ask_s is not None
        limit = min(self.window, in_flight or self.window)
        return self._unasked + 1 >= max(1, limit // 2) or now_s - self.asked_s > self._ask_s

    def resend(self, seq: int, now_s: float) -> Frame | None:
        """The frame to send over a new connection, as a key frame; None if it was answered meanwhile."""
        record = self._unanswered.get(seq)
        if record is None:
            return None
        self._unanswered[seq] = replace(record, sent_s=now_s)
        return record.alone

    def retry(self, seq: int, now_s: float, *, busy: bool = False, spread: float = 0.5) -> tuple[Frame, float] | None:
        """The frame to send again after a fault that may pass, as a key frame, and when.

        Args:
            seq: its number.
            now_s: the time.
            busy: whether the server has too much to do. Then pauses grow from one attempt to the next, and there are
                more attempts.
            spread: random, from 0 to 1: clients that were refused together do not come back together.

        Returns:
            The frame, and the pause in seconds before it is sent; None after too many attempts.
        """
        record = self._unanswered.get(seq)
        if record is None or record.attempts >= (_MAX_ATTEMPTS_BUSY if busy else _MAX_ATTEMPTS):
            return None
        pause_s = min(_FIRST_PAUSE_S * 2 ** (record.attempts - 1), _MOST_PAUSE_S) * (0.5 + spread) if busy else 0.0
        alone = replace(record.alone, acknowledge=self._ask_s is not None)
        self._unanswered[seq] = replace(
            record, frame=record.frame if record.refers else alone, alone=alone, sent_s=now_s + pause_s,
            attempts=record.attempts + 1,
        )  # fmt: skip
        return alone, pause_s

    def reference_refused(self, seq: int) -> None:
        """The cloud cannot use the reference of a frame, if it had one: the others are doubtful too."""
        record = self._unanswered.get(seq)
        if record is not None and record.refers:
            self.forget_references()

    def settle(self, seq: int, *, answered: bool) -> Record[A] | None:
        """The end of a frame.

        Args:
            seq: its number.
            answered: with a result; then later frames may refer to it. Else it failed.

        Returns:
            Its record; None, and counted in `duplicates`, if no such frame is unanswered.
        """
        record = self._unanswered.pop(seq, None)
        if record is None:
            self.duplicates += 1
            return None
        symbols = record.symbols
        if answered and symbols is not None:
            newest = self._newest.get(symbols.point)
            if newest is None or seq > newest.seq:
                self._newest[symbols.point] = Candidate(seq, symbols, self._generation)
        return record

    def acknowledged(self, ack: Ack) -> tuple[Result, ...]:
        """Results without an output, for the unanswered frames of an acknowledgement."""
        seqs = [seq for seq in self.seqs if ack.seq - ack.before <= seq <= ack.seq]
        return tuple(Result(seq, None, None, ack.cloud_us if seq == ack.seq else 0) for seq in seqs)

    def give_up(self) -> tuple[Record[A], ...]:
        """No answer will come any more: the records of all unanswered frames, which are settled."""
        records = tuple(self._unanswered.values())
        self._unanswered.clear()
        return records

    def _distance(self, candidate: Candidate | None) -> int:
        """How far back a candidate lies from the next frame; 0 if that may not be coded against it."""
        if candidate is None or candidate.generation != self._generation:
            return 0
        distance = self.next_seq - candidate.seq
        key_due = self._since_key.get(candidate.reference.point, 0) + 1 >= self._key_every
        return 0 if distance > self._reach or key_due else distance

    def _smaller(self, alone: Frame, similar: Coded) -> Frame:
        """The next frame coded against its candidate, if that may be and takes fewer bytes; else `alone`."""
        distance = self._distance(similar.candidate)
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
            position=alone.position,
            acknowledge=alone.acknowledge,
        )
        return frame if wire_bytes(frame) < wire_bytes(alone) else alone
