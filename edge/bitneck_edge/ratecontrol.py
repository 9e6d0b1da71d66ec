"""Automatic rate: the operating point of the next frame. Pure: times come in as arguments.

Frames of a few hundred bytes leave a link idle most of the time, so their answers give only a lower bound of its
bandwidth. But the network delay of a frame (round trip less the cloud's own time) bounds the time of a larger frame: if
the whole delay were transfer and none of it distance, a frame of twice the bytes would take twice the time. Five rules
follow:

- *Select* the most accurate point whose predicted time, by that pessimistic bound, is well within the target.
- *Probe* if the bound forbids what the link may allow, as over a satellite: now and then, send one frame at the next
  point. The wait before the next probe grows by half with each failure (as in LiveKit's probes).
- *Step down at once* when the current point is predicted to be late. An unanswered frame that is older than the usual
  delay is such a prediction, before any answer comes (delay-based, as in WebRTC).
- *Wait before climbing again* after that; the wait grows if it happens again soon.
- *Send no more than the link carries.* If frames arrive further apart than they were sent, or closer together, there is
  a queue. The time between their arrivals is then what the link needs for one frame: the link's rate, and no bound. A
  point whose frames take longer than the time between pictures fills queues; it is left before a frame is late. At the
  lowest rate, pictures are left out instead of queued (`RateController.room`).

Dimensions: link bytes of a message in its busier direction, seconds.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import InvalidConfig
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.moved import names_of
from bitneck_edge.link.cost import LinkCost

__all__ = ["Decision", "RateController", "rungs"]

__getattr__ = names_of(__name__)

_LARGE = 1.2
"""A photograph may take this many times the mean bytes of its point."""
_UP, _DOWN = 0.7, 0.87
"""Shares of the time that depends on the rate: climb to a point that needs at most `_UP`, leave one above `_DOWN`."""
_BASE_WINDOW_S = 20.0
_LATE = 1.25
_NOISE_S = 0.02
"""An unanswered frame is slow when it is older than `_LATE` times the usual delay plus `_NOISE_S`."""
_FIRST_PROBE_S, _PROBE_GROWTH, _MAX_PROBE_S = 3.0, 1.5, 60.0
_FIRST_HOLD_S, _HOLD_GROWTH, _MAX_HOLD_S, _FORGIVE_S = 0.6, 2.0, 20.0, 15.0
_RATE_SAMPLES, _RATE_FRESH_S = 3, 10.0
"""The link's rate is the mean over this many frames that were queued; it is forgotten after `_RATE_FRESH_S`."""
_SUSTAINED, _OVERLOAD = 0.93, 1.05
"""Shares of the time between two pictures: choose a point whose frames take at most `_SUSTAINED`, leave one above
`_OVERLOAD`."""
_EDGE_WEIGHT = 0.2
_OUT_OF_BUDGET, _INTO_BUDGET = 1.0, 0.9
"""Shares of the budget: leave a split point whose time is above the first, take it again at or below the second."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The operating point of the next frame, and why."""

    point: str
    reason: str
    probe: bool = False


@dataclass(slots=True)
class _Flight:
    size: float
    sent: float
    rung: int
    probe: bool


def rungs(ladder: Ladder, splits: Sequence[str] | None = None) -> tuple[OperatingPoint, ...]:
    """The points that are worth choosing, in order of rate: each is more accurate than all cheaper ones.

    Args:
        ladder: a bundle's.
        splits: split points that may be used; None for all.
    """
    kept: list[OperatingPoint] = []
    for point in ladder.measured:
        if (splits is None or point.split in splits) and (not kept or point.accuracy > kept[-1].accuracy):
            kept.append(point)
    return tuple(kept)


class RateController:
    """Chooses an operating point for each frame.

    Args:
        ladder: of the bundle.
        target_s: from a frame's capture to its answer, at most.
        max_edge_s: limit for head and encoder; None for no limit. If no split point keeps it, the fastest is used.
        edge_s: seconds of head and encoder in a trial, by split point; `encoded` corrects them.
        cost: what a message costs on the link.

    Attributes:
        cost: the same; may be replaced when the link has shown more.

    Raises:
        InvalidConfig: an empty ladder, or a time that is not positive.
    """

    def __init__(
        self,
        ladder: Ladder,
        *,
        target_s: float,
        max_edge_s: float | None = None,
        edge_s: Mapping[str, float] | None = None,
        cost: LinkCost = LinkCost(),  # noqa: B008  it is frozen
    ) -> None:
        if not len(ladder) or target_s <= 0 or (max_edge_s is not None and max_edge_s <= 0):
            raise InvalidConfig("automatic rate needs operating points and times above zero")
        self.cost = cost
        self._ladder = ladder
        self._target = target_s
        self._budget = max_edge_s
        self._edge = dict(edge_s or {})
        self._other = 0.0  # from capture to sending, beside head and encoder
        self._server = 0.0
        self._flights: OrderedDict[int, _Flight] = OrderedDict()
        self._delay: float | None = None  # network delay of a frame of `_size` bytes
        self._size = 0.0
        self._samples: deque[tuple[float, float, float]] = deque()  # (when, delay, delay per byte)
        self._last = 0.0, 0.0  # the last answered frame: when sent; when its answer came, less the cloud's time
        self._waited: deque[tuple[float, float]] = deque(maxlen=_RATE_SAMPLES)  # (bytes, seconds) of queued frames
        self._rate: float | None = None
        self._rate_at = 0.0
        self._hold_until = 0.0
        self._hold = _FIRST_HOLD_S
        self._fell_at = -_FORGIVE_S
        self._probe_at = 0.0
        self._probe_wait = _FIRST_PROBE_S
        self._news = ""  # why the next decision is another one, if not by the link
        self._splits: tuple[str, ...] = ()
        self._points: tuple[OperatingPoint, ...] = ()
        self._rung = 0
        self._weigh_splits()

    @property
    def points(self) -> tuple[OperatingPoint, ...]:
        """The points to choose from now, in order of rate."""
        return self._points

    @property
    def delay_s(self) -> float | None:
        """The usual network delay, seconds; None before the first answer."""
        return self._delay

    @property
    def base_s(self) -> float:
        """The least network delay of the last 20 seconds; 0 before the first answer."""
        return min((delay for _, delay, _ in self._samples), default=0.0)

    def bytes_per_s(self, now: float) -> float | None:
        """The link's rate; None unless a queue has shown it lately."""
        return self._rate if now - self._rate_at <= _RATE_FRESH_S else None

    def room(self, now: float, interval_s: float, *, fixed: bool = False) -> int:
        """Frames that may be unanswered if fresh pictures matter: those that travel at once, and one that waits.

        No frame may wait if even the lowest rate would be late now: so a queue drains. Nor may one if pictures come
        faster than the link carries the lowest rate, and the second of two in a row would be late.

        Args:
            now: when.
            interval_s: between pictures; 0 if unknown.
            fixed: the rate is not chosen here; the last frame's size stands for the lowest rate.
        """
        rate, size = self.bytes_per_s(now), self._size if fixed else self._mean_bytes(0)
        transfer_s = size / rate if rate is not None else 0.0
        distance_s = max(0.0, self.base_s - transfer_s)
        on_their_way = max(1, math.ceil(distance_s / interval_s)) if interval_s > 0 else 1
        if rate is not None and self._delay is not None:
            rest = self._edge_of(self._rung) + self._server
            late = (rest + self._delay if fixed else self._total(0, self._delay)) > self._target * _DOWN
            if late or (transfer_s > interval_s and rest + distance_s + 2 * transfer_s > self._target):
                return on_their_way
        return on_their_way + 1

    def choose(self, now: float, interval_s: float = 0.0) -> Decision:
        """The operating point of a frame that is captured now.

        Args:
            now: when.
            interval_s: between pictures of a camera; 0 for pictures that wait for the link.
        """
        waiting = self._waiting(now)
        if self._delay is None and waiting is None:
            return self._decision("nothing is known of the link yet")
        delay = max(self._delay or 0.0, waiting or 0.0)
        if waiting is not None and self._total(self._rung, waiting) > self._limit(self._rung, _DOWN):
            return self._fall(now, delay, f"a frame has waited {waiting * 1e3:.0f} ms")
        if self._total(self._rung, delay) > self._limit(self._rung, _DOWN):
            return self._fall(now, delay, f"answers take {delay * 1e3:.0f} ms on the link")
        above, rate = self._rung + 1, self.bytes_per_s(now)
        if rate is not None and interval_s > 0:
            if self._rung and self._size > rate * interval_s * _OVERLOAD:
                reason = f"frames wait for each other: the link carries {rate * 8e-3:.1f} kbit/s"
                return self._fall(now, delay, reason, limit_bytes=rate * interval_s * _SUSTAINED)
            if above < len(self._points) and self._mean_bytes(above) > rate * interval_s * _SUSTAINED:
                return self._decision(f"the link carries {rate * 8e-3:.1f} kbit/s, which is enough for this")
        if above >= len(self._points) or waiting is not None or now < self._hold_until:
            return self._decision("the link carries it")
        if self._total(above, delay) <= self._limit(above, _UP):
            self._rung = above
            return self._decision(f"answers take {delay * 1e3:.0f} ms on the link: room for better")
        if not self._flights and now >= self._probe_at and self._promising(above, delay):
            self._probe_at = now + self._probe_wait  # even if this one is never sent
            return Decision(self._points[above].id, "does the link carry more?", probe=True)
        return self._decision("the link carries it")

    def sent(self, seq: int, decision: Decision, payload_bytes: float, now: float, frames: int = 0) -> None:
        """A message was sent whose answer, or acknowledgement, follows at once.

        Args:
            seq: number of its last frame.
            decision: what `choose` said for that.
            payload_bytes: coded size of each of its frames.
            now: when.
            frames: in it; 0 for a full one.
        """
        rung = next((k for k, point in enumerate(self._points) if point.id == decision.point), self._rung)
        self._flights[seq] = _Flight(self.cost.bytes(payload_bytes, frames), now, rung, decision.probe)

    def encoded(self, decision: Decision, *, edge_s: float, other_s: float = 0.0) -> None:
        """A frame was encoded.

        Args:
            decision: what `choose` said for it.
            edge_s: seconds of head and encoder.
            other_s: the rest of the time between capture and sending.
        """
        self._other += (other_s - self._other) * _EDGE_WEIGHT
        if decision.point in self._ladder:
            split = self._ladder[decision.point].split
            before = self._edge.get(split, edge_s)
            after = before + (edge_s - before) * _EDGE_WEIGHT
            ratio = after / before if before > 0 else 1.0  # a busy or hot device is slower at every split point
            self._edge = {name: seconds * ratio for name, seconds in self._edge.items()} | {split: after}
            if self._budget is not None:
                self._weigh_splits()

    def answered(self, seq: int, now: float, *, server_s: float) -> None:
        """An answer came.

        Args:
            seq: of its frame.
            now: when.
            server_s: the cloud's own time, as it reports it.
        """
        flight = self._flights.pop(seq, None)
        if flight is None:
            return
        self._server += (server_s - self._server) * (0.3 if self._server else 1.0)
        delay = max(1e-4, now - flight.sent - server_s)
        self._learn_rate(flight, now - server_s, delay, now)
        self._samples.append((now, delay, delay / flight.size))
        while now - self._samples[0][0] > _BASE_WINDOW_S:
            self._samples.popleft()
        if flight.probe and not self._probed(flight, delay, now):
            return  # the delay of a larger frame says nothing new about the usual ones
        if self._delay is None or delay > self._delay:  # a longer delay counts at once, a shorter one by half
            self._delay, self._size = delay, flight.size
        else:
            self._size += (flight.size - self._size) * 0.5
            self._delay += (delay - self._delay) * 0.5

    def _learn_rate(self, flight: _Flight, arrived: float, delay: float, now: float) -> None:
        """Learn the link's rate from frames that were queued."""
        sent, before = self._last
        gap = arrived - before
        if flight.sent < before < arrived and abs(gap - (flight.sent - sent)) > _NOISE_S:
            self._waited.append((flight.size, gap))  # the queue grew or shrank, so the link was busy all the time
            if len(self._waited) > 1:
                self._rate = sum(size for size, _ in self._waited) / sum(seconds for _, seconds in self._waited)
                self._rate_at = now
        else:
            self._waited.clear()
        if self._rate is not None and flight.size / delay > self._rate:
            self._rate = None  # this frame was faster than that rate allows
        self._last = flight.sent, arrived

    def _probed(self, flight: _Flight, delay: float, now: float) -> bool:
        """Whether a probe came back in time; then its point is used from now on."""
        rung = min(flight.rung, len(self._points) - 1)
        if self._edge_of(rung) + self._server + delay > self._limit(rung, _UP):
            self._probe_failed(now)
            return False
        self._rung = max(self._rung, rung)
        self._probe_wait, self._probe_at = _FIRST_PROBE_S, now
        self._delay, self._size = delay, flight.size
        return True

    def lost(self, seq: int, now: float) -> None:
        """A frame was given up."""
        flight = self._flights.pop(seq, None)
        if flight is not None and flight.probe:
            self._probe_failed(now)

    def reconnected(self, now: float) -> None:
        """The link is a new one: forget the old one; unanswered frames are sent again now."""
        self._delay, self._rung = None, 0
        self._samples.clear()
        self._waited.clear()
        self._rate = None
        for flight in self._flights.values():
            flight.sent, flight.probe = now, False

    def _decision(self, reason: str) -> Decision:
        reason, self._news = self._news or reason, ""
        return Decision(self._points[self._rung].id, reason)

    def _fall(self, now: float, delay: float, reason: str, limit_bytes: float = math.inf) -> Decision:
        """Step down, one rung at least, to a point that is predicted in time or, with a limit, has no more bytes."""
        if self._rung == 0:
            return self._decision(f"{reason}; this is the lowest rate")
        rung = self._rung - 1
        while rung > 0 and (
            self._total(rung, delay) > self._limit(rung, _UP)
            if limit_bytes == math.inf
            else self._mean_bytes(rung) > limit_bytes
        ):
            rung -= 1
        self._rung = rung
        self._hold = _FIRST_HOLD_S if now - self._fell_at > _FORGIVE_S else min(_MAX_HOLD_S, self._hold * _HOLD_GROWTH)
        self._fell_at, self._hold_until = now, now + self._hold
        self._probe_failed(now)
        return self._decision(f"{reason}: down")

    def _waiting(self, now: float) -> float | None:
        """The network delay that the oldest unanswered frame has reached; None if that is not unusual."""
        if not self._flights:
            return None
        oldest = next(iter(self._flights.values()))
        waited = now - oldest.sent - self._server
        usual = self._delay if self._delay is not None else self._target / 2
        return waited if waited > usual * _LATE + _NOISE_S else None

    def _mean_bytes(self, rung: int) -> float:
        return self.cost.bytes(self._points[rung].payload_bytes)

    def _bytes(self, rung: int) -> float:
        return self.cost.bytes(self._points[rung].payload_bytes * _LARGE)

    def _edge_of(self, rung: int) -> float:
        return self._edge.get(self._points[rung].split, 0.0) + self._other

    def _total(self, rung: int, delay: float) -> float:
        """Upper bound of the time from capture to answer at a rung.

        A larger frame's delay follows from the bound in the module's docstring. For a smaller frame, only the delay
        above the least recent one shrinks: that part is transfer, or waiting for other transfers.
        """
        size, known = self._bytes(rung), max(self._size, 1.0)
        if size > known:
            per_byte = min((bound for _, _, bound in self._samples), default=delay / known)
            network = delay + (size - known) * max(per_byte, (delay - self.base_s) / known)
        else:
            network = delay - (delay - self.base_s) * (1.0 - size / known)
        return self._edge_of(rung) + self._server + network

    def _promising(self, rung: int, delay: float) -> bool:
        """Whether a probe can succeed at all."""
        return self._edge_of(rung) + self._server + delay < self._limit(rung, _UP)

    def _limit(self, rung: int, share: float) -> float:
        """The longest prediction to accept: the time that no rate can change, and a share of the rest of the target."""
        fixed = self._edge_of(rung) + self._server + self.base_s
        return fixed + max(0.0, self._target - fixed) * share

    def _probe_failed(self, now: float) -> None:
        self._probe_at = now + self._probe_wait
        self._probe_wait = min(_MAX_PROBE_S, self._probe_wait * _PROBE_GROWTH)

    def _weigh_splits(self) -> None:
        """Choose the split points within the budget; in a new set, go on at the next less accurate point."""
        names = tuple(dict.fromkeys(point.split for point in self._ladder))
        splits = names
        if self._budget is not None and self._edge:
            splits = tuple(
                name
                for name in names
                if self._edge.get(name, 0.0)
                <= self._budget * (_OUT_OF_BUDGET if name in self._splits or not self._splits else _INTO_BUDGET)
            )
            if not splits:
                splits = (min(names, key=lambda name: self._edge.get(name, float("inf"))),)
        if splits == self._splits:
            return
        if self._splits:
            self._news = f"by the time of head and encoder, the split points are now {', '.join(splits)}"
        accuracy = self._points[self._rung].accuracy if self._points else 0.0
        self._splits, self._points = splits, rungs(self._ladder, splits)
        below = [k for k, point in enumerate(self._points) if point.accuracy <= accuracy]
        self._rung = max(below, default=0)
