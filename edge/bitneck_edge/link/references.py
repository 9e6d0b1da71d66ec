"""Which answered frame the next one may be coded against. Pure: no socket, no clock.

A reference is always a frame whose answer is here: a frame that was lost is never one, so no loss spreads. Each
operating point has its own; a frame at a point that has none yet is coded by itself, a key frame.
"""

from dataclasses import dataclass

from bitneck.coding.conditional_codec import Reference

__all__ = ["Candidate", "Coded", "References"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a frame may be coded against, as things stand: it is asked again when the frame is sent.

    Attributes:
        seq: of the answered frame.
        reference: its symbols.
        session: counts the times that everything was forgotten.
    """

    seq: int
    reference: Reference
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A frame of a stream of similar ones, coded.

    Attributes:
        symbols: its own, for frames that follow.
        candidate: what it was also coded against; None where it is coded by itself only.
        payload: so coded.
    """

    symbols: Reference
    candidate: Candidate | None = None
    payload: bytes | None = None


class References:
    """The newest answered frame of each operating point.

    Args:
        key_every: of so many frames at a point at least one is coded by itself.
    """

    def __init__(self, key_every: int) -> None:
        self.reach = 0
        self._key_every = key_every
        self._session = 0
        self._unanswered: dict[int, Reference] = {}
        self._answered: dict[str, tuple[int, Reference]] = {}
        self._run: dict[str, int] = {}

    def opened(self, reach: int) -> None:
        """A session is open; `reach` is how far back in seq it takes references, 0 for none."""
        self.reach = reach

    def forget(self) -> None:
        """The cloud does not have the frames that were answered so far."""
        self._session += 1
        self._answered.clear()

    def candidate(self, point: str, next_seq: int) -> Candidate | None:
        """What a frame at `point` may be coded against; None where it has to be coded by itself."""
        seq, reference = self._answered.get(point, (0, None))
        if reference is None or next_seq - seq > self.reach or self._run.get(point, 0) + 1 >= self._key_every:
            return None
        return Candidate(seq, reference, self._session)

    def distance(self, candidate: Candidate | None, seq: int) -> int:
        """How far back the reference of frame `seq` lies, now that it is sent; 0 where it cannot be used any more."""
        if candidate is None or candidate.session != self._session or seq - candidate.seq > self.reach:
            return 0
        return 0 if self._run.get(candidate.reference.point, 0) + 1 >= self._key_every else seq - candidate.seq

    def sent(self, seq: int, symbols: Reference, *, alone: bool) -> None:
        """A frame is on its way, coded by itself or against another."""
        if self.reach:
            self._unanswered[seq] = symbols
        self._run[symbols.point] = 0 if alone else self._run.get(symbols.point, 0) + 1

    def settled(self, seq: int, *, answered: bool) -> None:
        """A frame's end; once it is answered others may refer to it."""
        symbols = self._unanswered.pop(seq, None)
        if symbols is None or not answered:
            return
        if seq > self._answered.get(symbols.point, (0, None))[0]:
            self._answered[symbols.point] = seq, symbols
