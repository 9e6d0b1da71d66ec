"""Which frames are unanswered: numbering, window, resends. Pure: no socket, no clock.

next_seq -> sent -> unanswered -> answered (once)
             ^          |
             +--resend--+   after a reconnect, in order
"""

from bitneck.errors import Overloaded
from bitneck.messages import Frame

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
        self._unanswered: dict[int, Frame] = {}
        self._alone: dict[int, Frame] = {}
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

    def add(self, frame: Frame, alone: Frame | None = None) -> None:
        """A frame is about to be sent for the first time.

        Args:
            frame: it.
            alone: where it is coded against another one, the same coded by itself: so it is sent again.

        Raises:
            Overloaded: the window is full, or the frame does not carry `next_seq`.
        """
        if not self.has_room or frame.seq != self._next:
            raise Overloaded(f"frame {frame.seq} cannot be sent: {self.unanswered} unanswered, next is {self._next}")
        self._next += 1
        self._unanswered[frame.seq] = frame
        self._attempts[frame.seq] = 1
        if alone is not None:
            self._alone[frame.seq] = alone

    def answered(self, seq: int) -> bool:
        """An answer arrived; False, and counted, if this seq waits for none: each is answered once."""
        if self._unanswered.pop(seq, None) is None:
            self.duplicates += 1
            return False
        del self._attempts[seq]
        self._alone.pop(seq, None)
        return True

    def retry(self, seq: int) -> Frame | None:
        """The frame to send again after a fault that may pass; None once it has been tried often enough."""
        frame = self._unanswered.get(seq)
        if frame is None or self._attempts[seq] >= _MAX_ATTEMPTS:
            return None
        self._attempts[seq] += 1
        return self._alone.get(seq, frame)

    def refers(self, seq: int) -> bool:
        """Whether an unanswered frame was coded against another one when it was first sent."""
        return seq in self._alone

    def to_resend(self) -> list[Frame]:
        """Every unanswered frame, in order and coded by itself, for a new connection."""
        return [self._alone.get(seq, self._unanswered[seq]) for seq in sorted(self._unanswered)]

    def restart(self) -> None:
        """The server has forgotten the session: the frames that remain are resent to a new one, numbers unchanged."""
        self._attempts = dict.fromkeys(self._unanswered, 1)
