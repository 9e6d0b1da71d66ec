"""What a client has done so far, counted as it happens, and how it is at a moment. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from bitneck.errors import BitneckError
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import Device
from bitneck_edge.answers.results import Answer
from bitneck_edge.observe.buckets import SCRAPED_S, Buckets
from bitneck_edge.spool.bounds import SpoolCounts

__all__ = ["ClientState", "Report", "Tally"]


class Tally:
    """Counts of a client, over all its sessions.

    Attributes:
        pictures: that came from its sources, or from `infer`.
        failures: pictures without an answer, by the name of their error's class.
        head: seconds of the network's head, of answered frames.
        encode: seconds of encoder and range coder, likewise.
        answer: seconds from picture to answer, likewise.
    """

    def __init__(self) -> None:
        self.pictures = 0
        self.failures: Counter[str] = Counter()
        self.head, self.encode, self.answer = (Buckets(SCRAPED_S) for _ in range(3))

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        self.head.add(answer.ms.head / 1e3)
        self.encode.add(answer.ms.encode / 1e3)
        self.answer.add(answer.ms.total / 1e3)

    def failed(self, error: BitneckError) -> None:
        """Count a picture that has no answer."""
        self.failures[type(error).__name__] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientState:
    """A client at a moment.

    Attributes:
        tally: what it has done.
        dropped: pictures that newer ones overtook.
        unanswered: frames that wait for their answer.
        reconnects: how often the link was opened again.
        switches: changes of the operating point.
        link: bytes that crossed the link, those of the spool's frames included.
        point: operating point of the next frame; empty before the session is open.
        connected: whether a connection to the server is up.
        temperatures_c: degrees Celsius, by the name of the sensor.
        spool: what became of the frames of the spool; None without one.
    """

    tally: Tally
    dropped: int
    unanswered: int
    reconnects: int
    switches: int
    link: LinkBytes
    point: str
    connected: bool
    temperatures_c: Mapping[str, float]
    spool: SpoolCounts | None = None


class Report:
    """Makes the messages in which a device says how it is: counts since its beginning, means since the last message."""

    def __init__(self) -> None:
        self._before = 0, (0.0, 0.0, 0.0)

    def device(self, state: ClientState) -> Device:
        """The next message."""
        tally = state.tally
        times = tally.head, tally.encode, tally.answer
        count, sums = self._before
        frames = tally.answer.count - count
        head, encode, answer = (
            round(1e6 * (time.sum - before) / frames) if frames else 0 for time, before in zip(times, sums, strict=True)
        )
        self._before = tally.answer.count, (tally.head.sum, tally.encode.sum, tally.answer.sum)
        return Device(
            pictures=tally.pictures,
            answered=tally.answer.count,
            failed=tally.failures.total(),
            dropped=state.dropped,
            reconnects=state.reconnects,
            unanswered=state.unanswered,
            head_us=head,
            encode_us=encode,
            answer_us=answer,
            temperature_c=max(state.temperatures_c.values(), default=None),
        )
