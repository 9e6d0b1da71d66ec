"""What a stream's client gets for each frame: as much of the answer as it asked for, a message or many at once. Pure.

Result --answer_for--> less of it --Answering--> Result | Results | Ack
"""

from collections.abc import Sequence
from dataclasses import replace

from bitneck.wire.messages import (
    Ack,
    Answers,
    Classification,
    ClassShare,
    CodedMap,
    Fault,
    Frame,
    Label,
    Output,
    Result,
    Results,
    Shares,
)
from bitneck_cloud.sessions.acknowledging import Acknowledging

__all__ = ["Answering", "answer_for"]

_MOST_BYTES = 1 << 16
"""Of coded maps in one message."""

Message = Result | Results | Ack | Fault


class _Pack:
    """The frames of one pack that are not settled yet, and the answers to the others."""

    def __init__(self, frames: int) -> None:
        self.left = frames
        self.results: list[Result] = []


class Answering:
    """The answers of one stream.

    Args:
        answers: what its client asked for.
        brief: whether the client has the bundle's manifest and labels.
    """

    def __init__(self, answers: Answers, *, brief: bool) -> None:
        self._answers = answers
        self._brief = brief
        self._acknowledging = Acknowledging()
        self._packs: dict[int, _Pack] = {}

    @property
    def answers(self) -> Answers:
        """What the client asked for."""
        return self._answers

    def expect(self, frames: Sequence[Frame]) -> tuple[Message, ...]:
        """The frames of one message were received. What to send now: packs that no frame is left of."""
        if self._answers is Answers.NONE:
            self._acknowledging.expect(frame.seq for frame in frames if frame.acknowledge)
            return ()
        sent: tuple[Message, ...] = ()
        for frame in frames:  # whatever it was in before, it is answered with this message
            sent += self._leaves(frame.seq)
        if len(frames) > 1:
            pack = _Pack(len(frames))
            self._packs.update((frame.seq, pack) for frame in frames)
        return sent

    def _leaves(self, seq: int, result: Result | None = None) -> tuple[Message, ...]:
        """A frame leaves its pack, with its answer or without. What to send then."""
        pack = self._packs.pop(seq, None)
        if pack is None:
            return (result,) if result is not None else ()
        pack.left -= 1
        if result is not None:
            pack.results.append(result)
        return () if pack.left else _together(pack.results)

    def acknowledge(self, in_flight: Sequence[int], now: float) -> tuple[Message, ...]:
        """The client waits for everything. What to send now.

        Args:
            in_flight: numbers of the frames that are not settled.
            now: seconds, on the clock of `settled`.
        """
        if self._answers is not Answers.NONE:
            return ()
        self._acknowledging.expect(in_flight)
        return self._acknowledging.flush(now)

    def settled(self, message: Result | Fault, received: float, now: float) -> tuple[Message, ...]:
        """A frame is settled.

        Args:
            message: its whole answer, or its fault.
            received: when it came, seconds.
            now: seconds, on the same clock.

        Returns:
            What to send now.
        """
        if self._answers is Answers.NONE:
            if isinstance(message, Fault):
                return message, *self._acknowledging.failed(message.seq, now)
            return self._acknowledging.computed(message.seq, received, now)
        if isinstance(message, Fault):
            return message, *self._leaves(message.seq)
        return self._leaves(message.seq, answer_for(message, self._answers, brief=self._brief, cloud_s=now - received))

    def flush(self, now: float) -> tuple[Message, ...]:
        """The stream ends: what has been held back."""
        packs = {id(pack): pack for pack in self._packs.values()}
        self._packs.clear()
        held = tuple(message for pack in packs.values() for message in _together(pack.results))
        return *self._acknowledging.flush(now), *held


def answer_for(result: Result, answers: Answers, *, brief: bool, cloud_s: float) -> Result:
    """As much of an answer as a client asked for.

    Args:
        result: the whole answer; its class map has the pixels that were asked for already.
        answers: what was asked for; not `Answers.NONE`.
        brief: whether the client has the bundle's manifest and labels. Then the answer has no names, no size of a map,
            no shares that can be counted in the map, and no time of receipt.
        cloud_s: seconds from receipt to now.
    """
    output = _output_for(result.output, answers, brief=brief)
    timings = result.timings
    if answers is not Answers.ALL:
        return Result(result.seq, output, None, min(max(0, round(cloud_s * 1e6)), 2**32 - 1))
    if brief and timings is not None:
        timings = replace(timings, received_unix_us=0)
    return Result(result.seq, output, timings)


def _output_for(output: Output | None, answers: Answers, *, brief: bool) -> Output | None:
    if answers is Answers.SHARES and isinstance(output, CodedMap):
        output = Shares(output.classes)
    if not brief:
        return output
    match output:
        case Classification(labels):
            return Classification(tuple(Label(label.index, "", label.score) for label in labels))
        case CodedMap():
            return replace(output, height=0, width=0, classes=())
        case Shares(classes):
            return Shares(tuple(ClassShare(share.index, "", share.share) for share in classes))
        case None:
            return None


def _together(results: Sequence[Result]) -> tuple[Result | Results, ...]:
    """Answers in as few messages as their size allows."""
    groups: list[list[Result]] = []
    size = 0
    for result in results:
        map_bytes = len(result.output.map) if isinstance(result.output, CodedMap) else 0
        if not groups or size + map_bytes > _MOST_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(result)
        size += map_bytes
    return tuple(group[0] if len(group) == 1 else Results(tuple(group)) for group in groups)
