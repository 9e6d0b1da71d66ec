"""Which frames of a stream have been answered before, as a few runs of numbers. Pure."""

import json
from bisect import bisect_left
from dataclasses import dataclass

from bitneck.errors import MalformedFrame

__all__ = ["Seen"]

_ENCODER = json.JSONEncoder(separators=(",", ":"))

MOST_RUNS = 512
"""Runs that are kept. Beyond them the lowest numbers are forgotten: an answer may then come twice, but none is lost."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Numbers of one session or spool.

    Attributes:
        runs: first and last number of each run, in order, with gaps between them.
    """

    runs: tuple[tuple[int, int], ...] = ()

    def __contains__(self, seq: int) -> bool:
        at = bisect_left(self.runs, (seq + 1,)) - 1
        return at >= 0 and self.runs[at][0] <= seq <= self.runs[at][1]

    def with_(self, seq: int) -> "Seen":
        """These, and one more."""
        if self.runs and seq == self.runs[-1][1] + 1:  # as nearly all of them do
            return Seen((*self.runs[:-1], (self.runs[-1][0], seq)))
        if seq in self:
            return self
        at = bisect_left(self.runs, (seq,))
        before, after, first, last = list(self.runs[:at]), list(self.runs[at:]), seq, seq
        if before and before[-1][1] == seq - 1:
            first = before.pop()[0]
        if after and after[0][0] == seq + 1:
            last = after.pop(0)[1]
        return Seen((*before, (first, last), *after)[-MOST_RUNS:])

    def dump(self) -> str:
        """As a text for the disk."""
        return _ENCODER.encode(self.runs)

    @classmethod
    def load(cls, text: str) -> "Seen":
        """From what `dump` gave.

        Raises:
            MalformedFrame: anything else.
        """
        try:
            runs = tuple((int(first), int(last)) for first, last in json.loads(text))
        except (ValueError, TypeError) as exc:
            raise MalformedFrame(f"no runs of numbers: {text[:80]!r}") from exc
        return cls(runs)
