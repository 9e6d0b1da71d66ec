"""A bounded queue that serves callers in turns, and the sessions of each caller in turns. Pure: no clock, no I/O.

A caller with many sessions, or a session with many frames, delays others by one frame a turn, not by all that it sent.
If the queue is full, a caller that has few items in it takes the place of the newest item of one that has many.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from bitneck.errors import Overloaded

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items by caller and session.

    Args:
        limit: of items.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._callers: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, item: T, caller: str, session: str) -> T | None:
        """Add an item.

        Args:
            item: what waits.
            caller: who sent it.
            session: the caller's session.

        Returns:
            The item of another that gave up its place, or None.

        Raises:
            Overloaded: the queue is full, and nobody has more in it.
        """
        displaced = self._displace(caller, session) if self._count >= self._limit else None
        self._callers.setdefault(caller, OrderedDict()).setdefault(session, deque()).append(item)
        self._count += 1
        return displaced

    def pop(self, fits: Callable[[T], bool]) -> T | None:
        """The next item that fits, in turns; None if no session's oldest item does.

        Args:
            fits: whether an item may be taken now. One that may not keeps its place, as do those behind it.
        """
        for caller, sessions in self._callers.items():
            for session, waiting in sessions.items():
                if fits(waiting[0]):
                    self._callers.move_to_end(caller)
                    sessions.move_to_end(session)
                    return self._remove(caller, session, waiting.popleft)
        return None

    def drain(self) -> Iterator[T]:
        """Take everything out."""
        while (item := self.pop(lambda _item: True)) is not None:
            yield item

    def _remove(self, caller: str, session: str, take: Callable[[], T]) -> T:
        item = take()
        self._count -= 1
        if not self._callers[caller][session]:
            del self._callers[caller][session]
            if not self._callers[caller]:
                del self._callers[caller]
        return item

    def _displace(self, caller: str, session: str) -> T:
        totals = {name: sum(map(len, sessions.values())) for name, sessions in self._callers.items()}
        greediest = max(totals, key=totals.__getitem__)
        own = self._callers.get(caller, OrderedDict())
        if totals.get(caller, 0) + 1 >= totals[greediest]:
            greediest = caller
        sessions = self._callers.get(greediest, OrderedDict())
        longest = max(sessions, key=lambda name: len(sessions[name]), default=None)
        if longest is None or (greediest == caller and len(own.get(session, ())) + 1 >= len(sessions[longest])):
            raise Overloaded(f"{self._limit} frames wait already; send more slowly, or try again later")
        return self._remove(greediest, longest, sessions[longest].pop)
