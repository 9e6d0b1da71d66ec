"""A session's state: legal events, unanswered frames, and the requested rate.

Pure: times come in as arguments, messages go in and out as values. A session outlives its connection. The client
reconnects with its token and sends unanswered frames again. Every seq is computed once.

    seq unknown, above the floor  -> NEW       compute it
    seq in flight                 -> ATTACHED  its answer will come, on the newest stream
    seq answered lately           -> ANSWERED  the kept answer is sent again
    seq that had a fault          -> NEW       also below the floor: it was never answered
"""

from collections import Counter, deque
from enum import Enum, auto

from bitneck.coding.conditional_codec import Reference
from bitneck.errors import Overloaded, ProtocolError, RateUnreachable, ReferenceUnknown, UnknownPoint
from bitneck.ladder import Ladder
from bitneck.wire.link_bytes import LinkBytes, LinkMeter
from bitneck.wire.messages import Device, Result
from bitneck_cloud.access.limits import TokenBucket
from bitneck_cloud.sessions.rates import MaxKbps, RatePolicy, choose, fits
from bitneck_cloud.sessions.settled import Settled

__all__ = ["Event", "Phase", "Session", "StreamState", "Verdict"]

_RATE_SAMPLES = 32
_MIN_RATE_SAMPLES = 4
_WAITING = 8
"""Number of frames that a client may have coded before its window has room for them."""
_WEIGH_EVERY = 4
_HYSTERESIS = 0.15
"""`MaxKbps` is weighed again when the link's load by its smallest frames has moved by this share."""


class Phase(Enum):
    """Where a stream stands."""

    IDLE = auto()
    READY = auto()
    CLOSED = auto()


class Event(Enum):
    """What can happen to a stream."""

    OPEN = auto()
    FRAME = auto()
    CLOSE = auto()


TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    Phase.IDLE: {Event.OPEN: Phase.READY, Event.CLOSE: Phase.CLOSED},
    Phase.READY: {Event.FRAME: Phase.READY, Event.CLOSE: Phase.CLOSED},
    Phase.CLOSED: {Event.CLOSE: Phase.CLOSED},
}
"""Every legal event. Any other event is the peer's error."""

_REMEDY = {Event.OPEN: "Open is sent once, first", Event.FRAME: "send Open first", Event.CLOSE: ""}


class StreamState:
    """The conversation on one stream."""

    def __init__(self) -> None:
        self.phase = Phase.IDLE

    def on(self, event: Event) -> None:
        """Take an event.

        Raises:
            ProtocolError: it is illegal in this phase.
        """
        following = TRANSITIONS[self.phase].get(event)
        if following is None:
            raise ProtocolError(f"{event.name} is illegal while the stream is {self.phase.name}: {_REMEDY[event]}")
        self.phase = following


class Verdict(Enum):
    """What to do with a frame, by its seq."""

    NEW = auto()
    ATTACHED = auto()
    ANSWERED = auto()


class Session:
    """One client's session.

    Args:
        session_id: public name, for the control API.
        model: name of the served model.
        client: the client's own name.
        ladder: of the model.
        window: frames that may be unanswered.
        assumed_fps: frame rate until the session has shown its own.
        now: seconds, any monotonic clock.
        bundle_id: of the model's bundle when the session was opened.
        max_bytes_per_s: payload bytes a second that are accepted in the long run; 0 for no limit.
        caller: name of who opened it.
        spool: id of the device's spool that its frames come from; empty for none.

    Attributes:
        last_heard: when a stream of it began, or a frame came; `now`'s clock.
        told: whether the client knows the rate that was asked for last.
        token_number: of the resume token that was issued last.
        oldest_token: number of the oldest resume token that is still good.
        reach: how far back in seq a reference may be; 0 if no symbols are kept.
        meter: of the newest stream's link.
        device: what the client's device said of itself last, and when; None if it has said nothing.
    """

    def __init__(
        self,
        *,
        session_id: str,
        model: str,
        client: str,
        ladder: Ladder,
        window: int,
        assumed_fps: float,
        now: float,
        bundle_id: str = "",
        max_bytes_per_s: float = 0.0,
        caller: str = "",
        spool: str = "",
    ) -> None:
        self.caller = caller
        self.spool = spool
        self.session_id = session_id
        self.model = model
        self.bundle_id = bundle_id
        self.client = client
        self.window = window
        self.created = self.last_heard = now
        self.disconnected_at: float | None = None
        self.policy: RatePolicy | None = None
        self.asked_point: str | None = None
        self.last_point: str | None = None
        self.answered = 0
        self.resent = 0
        self.dropped = 0
        self.payload_bytes = 0
        self.faults: Counter[int] = Counter()
        self.told = True
        self.token_number = 0
        self.oldest_token = 0
        self.reach = 0
        self.meter = LinkMeter()
        self.device: tuple[Device, float] | None = None
        self._earlier = LinkBytes(), LinkBytes()  # on earlier streams' links, and their messages
        self._reported = LinkBytes(), LinkBytes()
        self._seen = LinkBytes()
        self._kept: dict[int, Reference] = {}
        self._ladder = ladder
        self._assumed_fps = assumed_fps
        self._taken = 0
        self._weighed = 0.0
        self._in_flight: set[int] = set()
        self._settled = Settled(window)
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)  # of messages; frames before each
        self._max_bytes_per_s = max_bytes_per_s
        self._bytes = TokenBucket.of_bytes(max_bytes_per_s, now) if max_bytes_per_s else None

    def move(self, ladder: Ladder, bundle_id: str) -> None:
        """The client came back with another bundle: its rate is chosen anew from that ladder."""
        self._ladder, self.bundle_id = ladder, bundle_id
        self._kept.clear()  # of other tables, perhaps
        if self.policy is not None:
            try:
                self.set_policy(self.policy)
            except (RateUnreachable, UnknownPoint):
                self.policy, self.asked_point = None, None

    def attach(self, meter: LinkMeter, now: float) -> None:
        """A new stream begins.

        Args:
            meter: of its link.
            now: seconds, on the meters' clock.
        """
        self._earlier = self.link_bytes(now), self.message_bytes
        self.meter, self.last_heard = meter, now

    def link_bytes(self, now: float) -> LinkBytes:
        """What has crossed the client's link for this session's messages."""
        return self._earlier[0] + self.meter.total(now)

    @property
    def message_bytes(self) -> LinkBytes:
        """What gRPC was given of that."""
        return self._earlier[1] + self.meter.message_bytes

    def unreported(self, now: float) -> tuple[LinkBytes, LinkBytes]:
        """Link bytes and message bytes since the last call."""
        before, self._reported = self._reported, (self.link_bytes(now), self.message_bytes)
        return self._reported[0] - before[0], self._reported[1] - before[1]

    def link_bytes_since_last(self, now: float) -> float:
        """What has crossed the link since the last call, in both directions together."""
        before, self._seen = self._seen, self.link_bytes(now)
        since = self._seen - before
        return since.up + since.down

    @property
    def seqs_in_flight(self) -> tuple[int, ...]:
        """Numbers of the frames that are accepted and not answered."""
        return tuple(self._in_flight)

    @property
    def in_flight(self) -> int:
        """Frames that are accepted and not answered."""
        return len(self._in_flight)

    def accept(self, seq: int, point: str, payload_bytes: int, now: float) -> Verdict:
        """Take a frame whose contents were checked.

        Args:
            seq: its number.
            point: its operating point.
            payload_bytes: its coded size.
            now: when its message came; frames of one message have one time.

        Raises:
            Overloaded: the window is full, or more bytes came than the session may send.
            MalformedFrame: a seq that was answered too long ago.
        """
        if seq in self._in_flight:
            self.resent += 1
            return Verdict.ATTACHED
        if seq in self._settled:
            self.resent += 1
            return Verdict.ANSWERED
        self._settled.check(seq)
        if len(self._in_flight) >= self.window:
            raise Overloaded(f"frame {seq}: {self.window} frames are unanswered already, the window is full; wait")
        self._spend(seq, payload_bytes, now)
        if not self._arrivals or self._arrivals[-1][0] != now:
            self._arrivals.append((now, self._taken))
        self._taken += 1
        self._in_flight.add(seq)
        self.last_point, self.last_heard = point, now
        self.payload_bytes += payload_bytes
        return Verdict.NEW

    def _spend(self, seq: int, payload_bytes: int, now: float) -> None:
        """A token bucket: `max_bytes_per_s` in the long run, a burst of a second or 64 KiB."""
        if self._bytes is not None and not self._bytes.take(payload_bytes, now):
            raise Overloaded(
                f"frame {seq}: this session may send {self._max_bytes_per_s:.0f} payload bytes a second; "
                "send fewer frames, or choose an operating point of a lower rate"
            )

    def kept_answer(self, seq: int) -> Result:
        """The answer of a seq that `accept` called ANSWERED."""
        return self._settled[seq]

    def keep(self, most: int) -> None:
        """Keep symbols of answered frames, so that later ones may refer to them, as the client asks at the opening.

        The session keeps as many as the window and a few more. They include the newest frame whose answer the client
        has, and the one that was newest while the client coded a frame that then had to wait for its turn.

        Args:
            most: frames that may be kept; 0 for none.
        """
        self.reach = max(0, min(self.window + _WAITING, most - 1))
        while len(self._kept) > (self.reach + 1 if self.reach else 0):
            del self._kept[min(self._kept)]

    def reference(self, seq: int, distance: int, point: str) -> Reference | None:
        """The reference of a frame; None for a frame without one.

        Args:
            seq: the frame's.
            distance: back to its reference, as the frame says; 0 for none.
            point: the frame's.

        Raises:
            ReferenceUnknown: that frame is not kept, or has another operating point.
        """
        if not distance:
            return None
        kept = self._kept.get(seq - distance)
        if kept is None or kept.point != point:
            what = "is not kept here" if kept is None else f"is of {kept.point}"
            raise ReferenceUnknown(
                f"frame {seq} at {point[:80]} refers {distance} back, to a frame that {what}; "
                "send it again, coded by itself"
            )
        return kept

    def complete(self, result: Result, kept: Reference | None = None) -> None:
        """Store a frame's result. It is kept for resends until twice the window has passed.

        Args:
            result: the frame's answer.
            kept: its symbols, for frames that refer to it.
        """
        if kept is not None and self.reach:
            self._kept[result.seq] = kept
            if len(self._kept) > self.reach + 1:
                del self._kept[min(self._kept)]
        self._in_flight.discard(result.seq)
        self._settled.answered(result)
        self.answered += 1

    def fail(self, seq: int, code: int) -> None:
        """A frame ended in a fault; its seq may be sent again."""
        self._end(seq)
        self.faults[code] += 1

    def refused(self, seq: int, code: int) -> None:
        """A frame was not accepted, or a message made no sense (0); a frame's seq may be sent again."""
        self.faults[code] += 1
        if seq not in self._in_flight and seq not in self._settled:
            self._settled.failed(seq, accepted=False)

    def _end(self, seq: int) -> None:
        if seq in self._in_flight:
            self._in_flight.discard(seq)
            self._settled.failed(seq)

    def drop(self, seq: int) -> None:
        """A frame was dropped because its client went away; it may be sent again."""
        self._end(seq)
        self.dropped += 1

    @property
    def accepted(self) -> int:
        """Frames that were accepted so far, resends not counted."""
        return self.answered + self.dropped + self.in_flight

    @property
    def measured_frames_per_s(self) -> float | None:
        """Frame rate over the last messages; None until there are enough."""
        if len(self._arrivals) < _MIN_RATE_SAMPLES:
            return None
        (first, before), (last, accepted) = self._arrivals[0], self._arrivals[-1]
        return (accepted - before) / (last - first) if last > first else None

    @property
    def frames_per_s(self) -> float:
        """The measured frame rate; the assumed one until there is one."""
        return self.measured_frames_per_s or self._assumed_fps

    def set_policy(self, policy: RatePolicy) -> str | None:
        """Ask for a rate.

        Returns:
            The chosen operating point; None if the client chooses.

        Raises:
            UnknownPoint, RateUnreachable, InvalidConfig: see `bitneck_cloud.sessions.rates.choose`; the session is
                unchanged.
        """
        fps = self.frames_per_s
        chosen = choose(self._ladder, policy, frames_per_s=fps, link=self._link_bytes_of)
        point = chosen.id if chosen is not None else None
        self.policy, self.asked_point, self._weighed = policy, point, self._load(fps)
        return point

    def fits(self, policy: RatePolicy) -> bool:
        """Whether `set_policy` would take it."""
        return fits(self._ladder, policy, frames_per_s=self.frames_per_s, link=self._link_bytes_of)

    def _link_bytes_of(self, payload_bytes: float, interval_s: float) -> LinkBytes:
        """What a frame of so many bytes costs on this session's link, as it has been used so far."""
        return self.meter.expected(payload_bytes, interval_s)

    def _load(self, fps: float) -> float:
        """Link bytes a second of frames without a payload: when this has changed, `MaxKbps` is weighed again."""
        return self._link_bytes_of(0.0, 1.0 / fps).busier * fps

    def weigh_again(self) -> str | None:
        """Choose again for `MaxKbps` if the load of the link is another one than when it was weighed.

        If even the lowest point is above the limit, the lowest is chosen, so the session goes on.

        Returns:
            The new point, or None if nothing changes.
        """
        if not isinstance(self.policy, MaxKbps) or len(self._arrivals) < _MIN_RATE_SAMPLES:
            return None
        if self._taken % _WEIGH_EVERY:
            return None
        fps = self.frames_per_s
        load = self._load(fps)
        if abs(load - self._weighed) <= _HYSTERESIS * self._weighed:
            return None
        self._weighed = load
        try:
            chosen = choose(self._ladder, self.policy, frames_per_s=fps, link=self._link_bytes_of)
        except RateUnreachable:
            chosen = None
        point = chosen.id if chosen is not None else self._ladder.measured[0].id
        if point == self.asked_point:
            return None
        self.asked_point = point
        return point
