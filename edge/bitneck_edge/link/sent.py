"""What becomes of a frame on the link: sent, written with others, answered."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from bitneck.errors import BitneckError
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import Result

__all__ = ["MessageSent", "Received", "Sent", "Waiting"]


@dataclass(frozen=True, slots=True)
class Received:
    """A result, and what its frame cost.

    Attributes:
        result: without an output where frames have no answers.
        at: when it came, on `time.perf_counter`'s clock.
        sent_at: when its frame was last sent, on the same clock.
        message_bytes: of the frame's message, or its share of a pack.
        link: bytes on the link since the answer before.
    """

    result: Result
    at: float
    sent_at: float
    message_bytes: float
    link: LinkBytes


@dataclass(frozen=True, slots=True)
class Sent:
    """A frame on its way, as it was first sent.

    Attributes:
        seq: its number.
        payload: its coded bytes.
        reference: how far back in seq the frame lies that the payload is coded against; 0 for none.
        at: when it was sent, or began to wait for others of its pack, on `time.perf_counter`'s clock.
        answer: await it.
    """

    seq: int
    payload: bytes
    reference: int
    at: float
    answer: asyncio.Future[Received]


@dataclass(frozen=True, slots=True)
class MessageSent:
    """A message with frames was sent, or waits for the next connection.

    Attributes:
        seq: of its last frame.
        frames: in it.
        payload_bytes: of its frames, mean.
        awaited: whether an answer or acknowledgement follows at once.
        at: when, on `time.perf_counter`'s clock.
        answer: of its last frame.
    """

    seq: int
    frames: int
    payload_bytes: float
    awaited: bool
    at: float
    answer: asyncio.Future[Received]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a frame's answer goes, and who is told that it was sent."""

    answer: asyncio.Future[Received]
    on_sent: Callable[[MessageSent], None]

    def fail(self, error: BitneckError) -> None:
        """There will be no answer."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # marks it as seen: asyncio need not warn if nobody awaits it any more
