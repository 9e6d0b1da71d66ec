"""Several frames in one message. Pure: no socket, no clock."""

from collections.abc import Iterable

from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck.wire.messages import Frame, Pack

__all__ = ["Packer", "frames_of", "together"]

_MOST_BYTES = MAX_MESSAGE_BYTES // 2
_BESIDE = 32
"""Bytes of a frame in a pack beside its payload, at most."""


def frames_of(message: Frame | Pack) -> tuple[Frame, ...]:
    """The frames of a message."""
    return message.frames if isinstance(message, Pack) else (message,)


class Packer:
    """Frames that wait for others, to share a message with them.

    Args:
        most: frames in a message.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._frames: list[Frame] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, frame: Frame) -> list[Frame | Pack]:
        """A frame is to be sent.

        Returns:
            The messages to send now: those that are full, or that this frame cannot join.
        """
        messages: list[Frame | Pack] = []
        if not self._fits(frame):
            messages += self.take()
        self._frames.append(frame)
        self._bytes += len(frame.payload) + _BESIDE
        if len(self._frames) >= self.most or not frame.position:
            messages += self.take()
        return messages

    def take(self) -> list[Frame | Pack]:
        """The message of the frames that wait; none if no frame waits."""
        frames, self._frames, self._bytes = self._frames, [], 0
        if not frames:
            return []
        return [frames[0] if len(frames) == 1 else Pack(tuple(frames))]

    def _fits(self, frame: Frame) -> bool:
        """Whether a frame may join those that wait: a pack has one deadline, numbers in a row, and no ids of points."""
        if not self._frames:
            return True
        last = self._frames[-1]
        in_a_row = frame.seq == last.seq + 1 and frame.deadline_ms == last.deadline_ms and frame.position > 0
        return in_a_row and self._bytes + len(frame.payload) + _BESIDE <= _MOST_BYTES


def together(frames: Iterable[Frame], most: int) -> list[Frame | Pack]:
    """Frames in as few messages as `Packer` needs for them.

    Args:
        frames: in order of seq.
        most: frames in a message.
    """
    packer = Packer(most)
    messages = [message for frame in frames for message in packer.add(frame)]
    return messages + packer.take()
