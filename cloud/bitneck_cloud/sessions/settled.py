"""What a session remembers of its frames that are settled, for those that are sent again. Pure.

Answers are kept until twice the window has been answered after them. From then on a number that is not above theirs is
refused, unless its frame has never been answered: it ended in a fault, or was dropped, and may be sent again at any
time, however many others were answered meanwhile.
"""

from collections import OrderedDict

from bitneck.errors import MalformedFrame
from bitneck.wire.messages import Result

__all__ = ["Settled"]

_MOST_FAILED = 1024
"""Frames without an answer that are remembered, of each kind: as many as a client has out at once, at most."""


class Settled:
    """The answers of one session, and the frames that have none: those that failed, and those that were refused.

    Refused ones cost a client little, so they never push out one that was accepted and failed.

    Args:
        window: of the session.
    """

    def __init__(self, window: int) -> None:
        self._most = 2 * window
        self._answers: OrderedDict[int, Result] = OrderedDict()
        self._failed: OrderedDict[int, None] = OrderedDict()
        self._refused: OrderedDict[int, None] = OrderedDict()
        self._floor = 0

    def __contains__(self, seq: int) -> bool:
        """Whether the frame's answer is kept."""
        return seq in self._answers

    def __getitem__(self, seq: int) -> Result:
        """The frame's answer."""
        return self._answers[seq]

    def check(self, seq: int) -> None:
        """Refuse a number whose answer is not kept any more.

        Raises:
            MalformedFrame: it was answered too long ago.
        """
        if seq <= self._floor and seq not in self._failed and seq not in self._refused:
            raise MalformedFrame(f"seq {seq} is not above {self._floor}, which was answered long ago; count upwards")

    def answered(self, result: Result) -> None:
        """Keep the answer of a frame."""
        self._failed.pop(result.seq, None)
        self._refused.pop(result.seq, None)
        self._answers[result.seq] = result
        while len(self._answers) > self._most:
            old, _ = self._answers.popitem(last=False)
            self._floor = max(self._floor, old)

    def failed(self, seq: int, *, accepted: bool = True) -> None:
        """A frame ended without an answer: in a fault, or because its client went away. It may be sent again.

        Args:
            seq: its number.
            accepted: it was in flight. Else its number may be one that was answered long ago.
        """
        if accepted:
            _remember(self._failed, seq)
        elif seq > self._floor:
            _remember(self._refused, seq)


def _remember(kept: OrderedDict[int, None], seq: int) -> None:
    kept[seq] = None
    if len(kept) > _MOST_FAILED:
        kept.popitem(last=False)
