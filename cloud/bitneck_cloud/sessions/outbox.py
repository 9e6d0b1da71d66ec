"""Messages that wait to be written to one stream: bounded, control messages first."""

import asyncio
from collections import deque

from bitneck.wire.messages import ServerMessage

__all__ = ["Outbox"]


class Outbox:
    """Answers in order, and before them the newest SetPoint and the newest GoAway.

    If the client does not read, the outbox fills up. The conversation waits for `room` before the next frame,
    so nothing grows. There is one writer, and one waiter for room.

    Args:
        limit: number of waiting answers at which there is no room.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._answers: deque[ServerMessage] = deque()
        self._control: dict[type[ServerMessage], ServerMessage] = {}
        self._closing = False
        self._writer: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def put(self, message: ServerMessage) -> None:
        """Queue an answer."""
        if not self._closing:
            self._answers.append(message)
            _wake(self._writer)

    def control(self, message: ServerMessage) -> None:
        """Queue a control message in place of an older one of its kind."""
        self._control[type(message)] = message
        _wake(self._writer)

    def waits(self, kind: type[ServerMessage]) -> bool:
        """Whether a control message of a kind waits to be written."""
        return kind in self._control

    async def room(self) -> None:
        """Wait until fewer answers than the limit wait, or the outbox is closed."""
        while len(self._answers) >= self._limit and not self._closing:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def get(self) -> ServerMessage | None:
        """The next message; None once the outbox is closed and empty."""
        while not self._control and not self._answers:
            if self._closing:
                return None
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        if self._control:
            return self._control.pop(next(iter(self._control)))
        message = self._answers.popleft()
        if len(self._answers) < self._limit:
            _wake(self._room)
        return message

    def close(self) -> None:
        """Take no more answers. Waiting ones are still handed out."""
        self._closing = True
        _wake(self._writer)
        _wake(self._room)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
