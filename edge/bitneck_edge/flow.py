"""Which frames are unanswered: numbering, window, resends. Pure: no socket, no clock.

next_seq -> sent -> unanswered -> answered (once)
             ^          |
             +--resend--+   after a reconnect, in order
"""

from bitneck.errors import Overloaded
from bitneck.v1 import inference_pb2 as pb

__all__ = ["Flow"]

_MAX_ATTEMPTS = 4


class Flow:
    """The frames of one session between first sending and answer.

    Args:
        window: frames that may be unanswered.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.duplicates = 0
        self._next = 1
        self._unanswered: dict[int, pb.Frame] = {}
        self._attempts: dict[int, int] = {}

    @property
    def unanswered(self) -> int:
        """Frames that wait for their answer."""
        return len(self._unanswered)

    @property
    def has_room(self) -> bool:
        """Whether another frame may be sent."""
        return len(self._unanswered) < self.window

    def next_seq(self) -> int:
        """The number of the next frame."""
        return self._next

    def add(self, frame: pb.Frame) -> None:
        """A frame is about to be sent for the first time.

        Raises:
            Overloaded: the window is full, or the frame does not carry `next_seq`.
        """
        if not self.has_room or frame.seq != self._next:
            raise Overloaded(f"frame {frame.seq} cannot be sent: {self.unanswered} unanswered, next is {self._next}")
        self._next += 1
        self._unanswered[frame.seq] = frame
        self._attempts[frame.seq] = 1

    def answered(self, seq: int) -> bool:
        """An answer arrived; False, and counted, if this seq waits for none: each is answered once."""
        if self._unanswered.pop(seq, None) is None:
            self.duplicates += 1
            return False
        del self._attempts[seq]
        return True

    def retry(self, seq: int) -> pb.Frame | None:
        """The frame to send again after a fault that may pass; None once it has been tried often enough."""
        frame = self._unanswered.get(seq)
        if frame is None or self._attempts[seq] >= _MAX_ATTEMPTS:
            return None
        self._attempts[seq] += 1
        return frame

    def to_resend(self) -> list[pb.Frame]:
        """Every unanswered frame, in order, for a new connection."""
        return [self._unanswered[seq] for seq in sorted(self._unanswered)]

    def restart(self) -> None:
        """The server has forgotten the session: the frames that remain are resent to a new one, numbers unchanged."""
        self._attempts = dict.fromkeys(self._unanswered, 1)
