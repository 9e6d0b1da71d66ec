"""The newest answers with their numbers, for those who read behind one another. Pure.

    keep --> [oldest ... newest] --read(position)--> what is there from the position on, and how many are gone

The buffer is shared: a reader is no more than a position in it. One that is slow loses its place when the buffer has
moved past it, and is told how many answers that were. An id of an answer is ``EPOCH-NUMBER``. The epoch is another one
in each run of the server, so a position of an earlier run is recognized.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitneck.errors import InvalidConfig
from bitneck_cloud.answers.document import Published

__all__ = ["Hub", "Missed", "Reading"]

_EPOCH = re.compile(r"[0-9a-f]{8}\Z")
_ID = re.compile(r"([0-9a-f]{8})-([0-9]{1,18})\Z")
_ANOTHER_RUN = "these answers are of another run of the server: what came between is not known here"
_BEHIND = "the server keeps no more answers than these"


@dataclass(frozen=True, slots=True)
class Missed:
    """Answers that a reader can get no more.

    Attributes:
        count: how many, of all clients and models; None if that is unknown.
        reason: for people.
        before: number of the first answer that is there.
    """

    count: int | None
    reason: str
    before: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader gets.

    Attributes:
        answers: in order.
        position: number of the answer to go on with.
        missed: what is gone; None for nothing.
    """

    answers: tuple[Published, ...]
    position: int
    missed: Missed | None = None


class Hub:
    """Keeps the newest answers, within two bounds. The newest one is kept whatever its size.

    Args:
        epoch: of this run of the server, eight hexadecimal digits.
        most: answers that are kept.
        most_bytes: of them, with the documents made so far.
        first: number of the first answer.
    """

    def __init__(self, epoch: str, *, most: int, most_bytes: int, first: int = 1) -> None:
        if not _EPOCH.match(epoch):
            raise InvalidConfig(f"epoch {epoch!r}: give eight hexadecimal digits")
        self.epoch = epoch
        self._most = most
        self._most_bytes = most_bytes
        self._kept: dict[int, Published] = {}
        self._oldest = self._next = first
        self._bytes = 0

    @property
    def end(self) -> int:
        """The number that comes after the newest answer."""
        return self._next

    @property
    def bytes(self) -> int:
        """Of what is kept, as counted."""
        return self._bytes

    def __len__(self) -> int:
        """Answers that are kept."""
        return len(self._kept)

    def keep(self, answers: Sequence[Published]) -> None:
        """Take the next answers. Their numbers follow on."""
        for published in answers:
            if published.number != self._next:
                raise AssertionError(f"answer {published.number} in place of {self._next}")
            self._kept[published.number] = published
            self._next += 1
            self.count(published)

    def count(self, published: Published) -> None:
        """Count an answer anew, because a document of it was made, and drop the oldest ones beyond the bounds."""
        if self._kept.get(published.number) is not published:
            return
        size = published.size
        self._bytes += size - published.accounted
        published.accounted = size
        while len(self._kept) > self._most or (self._bytes > self._most_bytes and len(self._kept) > 1):
            gone = self._kept.pop(self._oldest)
            self._bytes -= gone.accounted
            self._oldest += 1

    def id_of(self, number: int) -> str:
        """The id of an answer."""
        return f"{self.epoch}-{number}"

    def begin(self, after: str) -> tuple[int, Missed | None]:
        """Where a reader begins.

        Args:
            after: id of the last answer that it has; empty to begin with the next one, ``0`` for all that is kept.

        Returns:
            The position, and what it has missed if the id is of another run.

        Raises:
            InvalidConfig: no id, or of an answer that is still to come.
        """
        if not after:
            return self._next, None
        if after == "0":
            return self._oldest, None
        match = _ID.match(after)
        if match is None:
            raise InvalidConfig(f"{after[:80]!r} is no id of an answer; give one that this server sent, or 0 for all")
        if match[1] != self.epoch:
            return self._oldest, Missed(None, _ANOTHER_RUN, self._oldest)
        if (number := int(match[2])) >= self._next:
            raise InvalidConfig(f"the answer {after} is still to come; the newest one is {self.id_of(self._next - 1)}")
        return number + 1, None

    def read(self, position: int, wanted: Callable[[Published], bool], *, most: int, look_at: int) -> Reading:
        """What is there for a reader.

        Args:
            position: its own.
            wanted: says of an answer whether it gets it.
            most: answers that it takes now.
            look_at: answers that are looked at now, wanted or not.
        """
        missed = None
        if position < self._oldest:
            missed = Missed(self._oldest - position, _BEHIND, self._oldest)
            position = self._oldest
        found: list[Published] = []
        end = min(self._next, position + look_at)
        while position < end and len(found) < most:
            published = self._kept[position]
            position += 1
            if wanted(published):
                found.append(published)
        return Reading(tuple(found), position, missed)
