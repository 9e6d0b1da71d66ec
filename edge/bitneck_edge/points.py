"""Which operating point the next frame gets. Pure: times come in as arguments.

The point is fixed, by the settings, the program or the cloud; or it is automatic, and a `RateController` chooses it for
each frame.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from bitneck.ladder import Ladder, most_accurate
from bitneck_edge.answers.results import Switch
from bitneck_edge.ratecontrol import Decision, RateController
from bitneck_edge.settings import AUTO

__all__ = ["MeanInterval", "PointChoice", "Wish"]

_LOG = logging.getLogger(__name__)
_WEIGHT = 0.1
"""Of a new interval in the mean."""


def nearest_ready(ladder: Ladder, wanted: str, ready: Callable[[str], bool]) -> str | None:
    """The operating point to use while the files of another one are not here.

    Args:
        ladder: of the bundle.
        wanted: the point whose files are not here.
        ready: whether those of a point are.

    Returns:
        The most accurate point that sends no more than the wanted one; if there is none, the one that sends least. None
        if no point is ready.
    """
    points = [point for point in ladder if ready(point.id)]
    cheaper = [point for point in points if 0 < point.payload_bytes <= ladder[wanted].payload_bytes]
    if cheaper:
        return most_accurate(cheaper).id
    return min(points, key=lambda point: (point.payload_bytes, point.id)).id if points else None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a session begins with.

    Attributes:
        auto: whether the points are chosen by what link and device can do.
        point: the operating point so far; empty for none.
        named: the user or the program named it, so that no other one may stand in for it.
        own: where the cloud asked for the point: the wish of the user or the program, which counts again when the cloud
            asks for nothing; else None.
    """

    auto: bool
    point: str
    named: bool = field(default=False, compare=False)
    own: "Wish | None" = field(default=None, compare=False)

    @classmethod
    def of(cls, point: str) -> Self:
        """The wish of a setting: a point, ``auto``, or empty."""
        named = point not in ("", AUTO)
        return cls(auto=point == AUTO, point=point if named else "", named=named)


class PointChoice:
    """The operating points of one session's frames.

    Attributes:
        auto: whether each frame's point is chosen by what the link and the device can do.
        last_seq: number of the last frame that was sent.

    Args:
        ladder: of the bundle.
        rate: chooses the point while `auto` holds.
        on_switch: called when the point changes.
        ready: whether a point's files are on the device. Until those of the wanted one are, another one stands in for
            it, unless the user or the program named it.
        want: called with a point whose files are not here.
    """

    def __init__(
        self,
        ladder: Ladder,
        rate: RateController,
        on_switch: Callable[[Switch], None],
        ready: Callable[[str], bool] = lambda _point: True,
        want: Callable[[str], None] = lambda _point: None,
    ) -> None:
        self.auto = False
        self.last_seq = 0
        self._wanted = ""
        self._named = False
        self._own = Wish.of("")
        self._asked = False  # by the cloud, for the point in use
        self._taken_over = ""  # why the next automatic choice may differ from what was used
        self._used = ""
        self._reason = ""
        self._ladder = ladder
        self._rate = rate
        self._on_switch = on_switch
        self._ready = ready
        self._want = want

    @property
    def point(self) -> str:
        """Operating point of the next frame; empty before `begin`."""
        return self._used

    @property
    def wish(self) -> Wish:
        """What a session that follows this one begins with."""
        return Wish(self.auto, self._wanted, self._named, self._own if self._asked else None)

    def begin(self, wish: Wish, asked: str, now: float) -> None:
        """The session is open: choose the first point.

        A point that was named by the user stands against the cloud's; automatic choice does not, unless it has been in
        use already. Nor does a point that the cloud had asked for.

        Args:
            wish: of the user, or of the session before.
            asked: point that the cloud asks of new sessions; empty for none.
            now: when.
        """
        if self._wanted:
            return  # the cloud has asked for it since
        self._own = wish.own or wish
        if wish.own is not None:
            wish = self._own if not asked else Wish(auto=False, point=asked)
            self._asked = bool(asked)
        self.auto = self.auto or wish.auto
        if self.auto and asked and not wish.point:
            _LOG.warning(
                "the cloud asks new sessions for %s: this device does not choose until the control API hands that back",
                asked,
            )
            self.auto = False
        if self.auto:
            self._wanted = self._rate.choose(now).point
        else:
            self._named = wish.named and wish.point in self._ladder
            self._asked = self._asked or (bool(asked) and wish.point not in self._ladder)
            self._wanted = (wish.point if wish.point in self._ladder else asked) or self._ladder.best.id
        self._used = self._at_hand(self._wanted)

    def choose(self, now: float, interval_s: float) -> Decision:
        """The point of a frame that is captured now.

        Args:
            now: when.
            interval_s: between pictures; 0 if unknown.
        """
        decision = self._rate.choose(now, interval_s) if self.auto else Decision(self._wanted, "")
        if self.auto and self._taken_over:
            decision = replace(decision, reason=f"{self._taken_over}; {decision.reason}")
            self._taken_over = ""
        point = self._at_hand(decision.point)
        if point != decision.point:
            self._use(point, f"the files of {decision.point} are not on this device yet")
            return Decision(point, decision.reason)
        if not decision.probe:
            if self.auto:
                self._wanted = decision.point
            self._use(point, decision.reason or self._reason or f"the files of {point} have come")
        return decision

    def set(self, point_id: str) -> None:
        """The program wants a point, or ``auto``.

        Raises:
            UnknownPoint: the bundle has no such point.
        """
        if point_id == AUTO:
            self.auto, self._named, self._taken_over = True, False, "chosen for each frame from here on"
            self._asked = False
            return
        point = self._ladder[point_id]
        self.auto, self._named, self._asked = False, True, False
        self._change(point.id, "set by the program")

    def ask(self, point_id: str, reason: str) -> None:
        """The cloud asks for a point; with an empty one it leaves the choice to us."""
        if not point_id:
            _LOG.info("%s: the point is chosen here from now on", reason)
            self.auto, self._named, self._taken_over = True, False, "chosen for each frame from here on"
            self._asked = False
        elif point_id in self._ladder:
            if self.auto or self._named:
                self._own = Wish(self.auto, "" if self.auto else self._wanted, self._named)
            self.auto, self._named, self._asked = False, False, True
            self._change(point_id, reason)
        else:
            _LOG.warning("the cloud asks for %r, which this bundle does not have; staying at %s", point_id, self.point)

    def _at_hand(self, wanted: str) -> str:
        """The wanted point, or one that stands in for it until its files are here."""
        if self._named or self._ready(wanted):
            return wanted
        self._want(wanted)
        return nearest_ready(self._ladder, wanted, self._ready) or wanted

    def _change(self, point_id: str, reason: str) -> None:
        self._wanted, self._reason = point_id, reason
        point = self._at_hand(point_id)
        if point == point_id:
            self._use(point, reason)
        else:
            _LOG.info("%s: %s follows when its files are here; staying at %s", reason, point_id, self.point)

    def _use(self, point_id: str, reason: str) -> None:
        before, self._used = self._used, point_id
        if before in ("", point_id):
            return
        switch = Switch(self.last_seq, before, point_id, reason)
        _LOG.info("after frame %d: %s -> %s: %s", switch.after_seq, switch.old, switch.new, reason)
        self._on_switch(switch)


class MeanInterval:
    """The mean time between pictures, where the newer ones count more.

    Attributes:
        seconds: the mean; 0 before two pictures were added.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: float | None = None

    def add(self, at: float) -> None:
        """A picture was taken at this time."""
        if self._last is not None:
            interval = max(1e-4, at - self._last)
            self.seconds += (interval - self.seconds) * (_WEIGHT if self.seconds else 1.0)
        self._last = at
