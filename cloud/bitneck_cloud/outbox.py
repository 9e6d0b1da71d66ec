"""What waits to be written to one stream: bounded, with control messages first."""

import asyncio
from collections import deque

from bitneck.v1 import inference_pb2 as pb

__all__ = ["Outbox"]


class Outbox:
    """Answers in order, at most `limit` of them; of SetPoint and GoAway only the newest counts, and goes first.

    A reader that stalls fills it, and `put` then waits: the stream's frames are no longer read, and nothing grows.

    Args:
        limit: answers that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._answers: deque[pb.ServerMessage] = deque()
        self._control: dict[str, pb.ServerMessage] = {}
        self._changed = asyncio.Condition()
        self._closing = False

    async def put(self, message: pb.ServerMessage) -> None:
        """Queue an answer; waits while the outbox is full."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._answers) < self._limit or self._closing)
            if not self._closing:
                self._answers.append(message)
                self._changed.notify_all()

    async def control(self, message: pb.ServerMessage) -> None:
        """Queue a control message in place of an older one of its kind; never waits for room."""
        async with self._changed:
            self._control[message.WhichOneof("message") or ""] = message
            self._changed.notify_all()

    async def get(self) -> pb.ServerMessage | None:
        """The next message; None once the outbox is closed and empty."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._control or self._answers or self._closing)
            if self._control:
                message = self._control.pop(next(iter(self._control)))
            elif self._answers:
                message = self._answers.popleft()
            else:
                return None
            self._changed.notify_all()
            return message

    async def close(self) -> None:
        """No more answers; what waits is still handed out."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()
