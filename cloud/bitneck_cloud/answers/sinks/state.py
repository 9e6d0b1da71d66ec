"""What queue, senders and sinks tell one another, and what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "BATCH",
    "BATCH_BYTES",
    "DROPPED",
    "MOST_CLIENTS",
    "TRIES",
    "Attempt",
    "Bounds",
    "ClientState",
    "Document",
    "Entry",
    "Held",
    "Queued",
    "Sink",
    "SinkState",
    "tries",
]

DROPPED = ("bytes", "age", "size", "disk", "connection")
"""Why an answer falls out."""

TRIES = 3
"""Failures in a row at one message, at least, before it is set aside."""
_MOST_DOUBLINGS = 12
BATCH, BATCH_BYTES = 100, 1 << 20
"""Answers of one batch, and their bytes, where no setting says it."""
MOST_CLIENTS = 10_000
"""Clients whose newest states a sink keeps."""

Document = Mapping[str, Any]
"""What is said of one answer, as JSON can hold it."""


def tries(set_aside: int) -> int:
    """Failures in a row at one message before it is set aside; twice as many for each one before it.

    Else a fault that does not lie in the messages would cost all of them.

    Args:
        set_aside: messages since the last one that passed.
    """
    return TRIES << min(set_aside, _MOST_DOUBLINGS)


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer to commit.

    Attributes:
        stream: its session or spool.
        seq: of its frame there.
        number: of the answer, of this server.
        bodies: its documents, JSON in ASCII, each with the names of the sinks that get it: with a map, or without.
    """

    stream: str
    seq: int
    number: int
    bodies: tuple[tuple[tuple[str, ...], bytes], ...]

    @property
    def sinks(self) -> list[str]:
        """All that want it."""
        return [sink for names, _ in self.bodies for sink in names]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait for one sink."""

    most_bytes: int
    age_s: float


@dataclass(slots=True)
class Held:
    """What waits for one sink, and what has fallen out.

    Attributes:
        queued: answers.
        bytes: of their documents.
        oldest_at: when the first of them was committed, seconds since 1970.
        taken: id up to which a sender has them now; these do not fall out.
        dropped: by reason.
    """

    queued: int = 0
    bytes: int = 0
    oldest_at: float = 0.0
    taken: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))


@dataclass(frozen=True, slots=True)
class Queued:
    """An answer in a sink's queue.

    Attributes:
        id: place in the order of answering.
        at: when it was committed, seconds since 1970.
        body: its document, JSON in ASCII.
    """

    id: int
    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of a batch.

    Attributes:
        settled: one text for each answer from the batch's front: empty if it was delivered, else why it never will be.
        error: why the others were not delivered; empty if there are none, or if they only wait for their turn.
        retry_after_s: seconds that the other side asks to wait; None if it does not say.
        cut: whether the last one of the settled is given up because the connection ends, or is silent, at it.
    """

    settled: tuple[str, ...] = ()
    error: str = ""
    retry_after_s: float | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientState:
    """A client as it is now, for topics that retain it.

    Attributes:
        client: its name.
        model: that it uses.
        online: whether it has a stream.
        point: operating point of its newest frame; None before the first.
        rate: what was asked for, as the control API shows it; None if nothing was.
        at: when that began, RFC 3339.
    """

    client: str
    model: str
    online: bool
    point: str | None = None
    rate: Mapping[str, Any] | None = None
    at: str = ""


class Sink(Protocol):
    """One sink's way to deliver. All calls come from its sender's thread."""

    @property
    def most(self) -> int:
        """Answers that a batch may have now."""
        ...

    @property
    def most_bytes(self) -> int:
        """Bytes that a batch may have; one answer may have more."""
        ...

    def restless(self) -> bool:
        """Whether it has something to do without answers, such as to connect again."""
        ...

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Deliver a batch in order, or some of it from its front. It takes a bounded time and raises nothing foreign.

        Raises:
            InvalidConfig: a file of a secret or a certificate cannot be read now.
        """
        ...

    def tell(self, state: ClientState) -> None:
        """Keep the newest state of a client to be published; called from any thread."""
        ...

    def close(self) -> None:
        """Say goodbye."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkState:
    """A sink as it is now. Counts begin with the server's start.

    Attributes:
        name: of the sink.
        kind: ``mqtt``, ``webhook`` or ``jsonl``.
        queued: answers that wait.
        queue_bytes: of them.
        behind_s: seconds that the oldest of them has waited.
        delivered: answers.
        failed: attempts that delivered nothing, or not all.
        refused: answers that the other side will never take.
        dropped: answers that fell out, by reason: too many ``bytes``, too great an ``age``, a single one of too great a
            ``size``, a ``disk`` that did not take them, or a ``connection`` that ended each time when one was sent.
        failing: whether the last attempt failed.
        last_error: text of the last failure; empty if there was none.
        last_error_at: when, seconds since 1970; None if there was none.
        last_delivered_at: when something was delivered last, likewise.
    """

    name: str
    kind: str
    queued: int = 0
    queue_bytes: int = 0
    behind_s: float = 0.0
    delivered: int = 0
    failed: int = 0
    refused: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    failing: bool = False
    last_error: str = ""
    last_error_at: float | None = None
    last_delivered_at: float | None = None
