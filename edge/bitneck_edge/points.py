"""Which operating point the next frame gets. Pure: times come in as arguments.

The point is fixed, by the settings, the program or the cloud; or it is automatic, and a `RateController` chooses it for
each frame.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from bitneck.ladder import Ladder
from bitneck_edge.answers.results import Switch
from bitneck_edge.ratecontrol import Decision, RateController
from bitneck_edge.settings import AUTO

__all__ = ["MeanInterval", "PointChoice", "Wish"]

_LOG = logging.getLogger(__name__)
_WEIGHT = 0.1
"""Of a new interval in the mean."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a session begins with: `auto`, and the operating point so far; empty for none."""

    auto: bool
    point: str

    @classmethod
    def of(cls, point: str) -> Self:
        """The wish of a setting: a point, ``auto``, or empty."""
        return cls(auto=point == AUTO, point="" if point == AUTO else point)


class PointChoice:
    """The operating points of one session's frames.

    Attributes:
        auto: whether each frame's point is chosen by what the link and the device can do.
        point: operating point of the next frame; empty before `begin`.
        last_seq: number of the last frame that was sent.

    Args:
        ladder: of the bundle.
        rate: chooses the point while `auto` holds.
        on_switch: called when the point changes.
    """

    def __init__(self, ladder: Ladder, rate: RateController, on_switch: Callable[[Switch], None]) -> None:
        self.auto = False
        self.point = ""
        self.last_seq = 0
        self._ladder = ladder
        self._rate = rate
        self._on_switch = on_switch

    @property
    def wish(self) -> Wish:
        """What a session that follows this one begins with."""
        return Wish(self.auto, self.point)

    def begin(self, wish: Wish, asked: str, now: float) -> None:
        """The session is open: choose the first point.

        A point that was named by the user stands against the cloud's; automatic choice does not, unless it has been in
        use already.

        Args:
            wish: of the user, or of the session before.
            asked: point that the cloud asks of new sessions; empty for none.
            now: when.
        """
        if self.point:
            return  # the cloud has asked for it since
        self.auto = self.auto or wish.auto
        if self.auto and asked and not wish.point:
            _LOG.warning(
                "the cloud asks new sessions for %s: this device does not choose until the control API hands that back",
                asked,
            )
            self.auto = False
        if self.auto:
            self.point = self._rate.choose(now).point
        else:
            self.point = (wish.point if wish.point in self._ladder else asked) or self._ladder.best.id

    def choose(self, now: float, interval_s: float) -> Decision:
        """The point of a frame that is captured now.

        Args:
            now: when.
            interval_s: between pictures; 0 if unknown.
        """
        if not self.auto:
            return Decision(self.point, "")
        decision = self._rate.choose(now, interval_s)
        if not decision.probe:
            self._change(decision.point, decision.reason)
        return decision

    def set(self, point_id: str) -> None:
        """The program wants a point, or ``auto``.

        Raises:
            UnknownPoint: the bundle has no such point.
        """
        if point_id == AUTO:
            self.auto = True
            return
        point = self._ladder[point_id]
        self.auto = False
        self._change(point.id, "set by the program")

    def ask(self, point_id: str, reason: str) -> None:
        """The cloud asks for a point; with an empty one it leaves the choice to us."""
        if not point_id:
            _LOG.info("%s: the point is chosen here from now on", reason)
            self.auto = True
        elif point_id in self._ladder:
            self.auto = False
            self._change(point_id, reason)
        else:
            _LOG.warning("the cloud asks for %r, which this bundle does not have; staying at %s", point_id, self.point)

    def _change(self, point_id: str, reason: str) -> None:
        before, self.point = self.point, point_id
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
