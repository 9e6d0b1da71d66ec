"""Acknowledgements of a stream without answers: many frames in one message. Pure: times come in as arguments."""

from collections.abc import Iterable

from bitneck.wire.messages import Ack

__all__ = ["Acknowledging"]

_MOST = 12
"""Frames that wait for an acknowledgement."""


class Acknowledging:
    """The computed frames of one stream that are not acknowledged yet, and those whose client waits."""

    def __init__(self) -> None:
        self._computed: dict[int, float] = {}  # when each was received
        self._awaited: set[int] = set()

    def expect(self, seqs: Iterable[int]) -> None:
        """The client waits for these frames: the next one of them that is settled is acknowledged at once."""
        self._awaited.update(seqs)

    def computed(self, seq: int, received: float, now: float) -> tuple[Ack, ...]:
        """A frame is computed.

        Args:
            seq: its number.
            received: when it came, seconds.
            now: seconds, on the same clock.

        Returns:
            What to send now.
        """
        self._computed[seq] = received
        return self.flush(now) if self._is_awaited(seq) or len(self._computed) >= _MOST else ()

    def failed(self, seq: int, now: float) -> tuple[Ack, ...]:
        """A frame has got a fault. What to send after that."""
        return self.flush(now) if self._is_awaited(seq) else ()

    def flush(self, now: float) -> tuple[Ack, ...]:
        """Acknowledgements of all computed frames, one for each run of numbers."""
        acks: list[Ack] = []
        for seq in sorted(self._computed):
            cloud_us = min(max(0, round((now - self._computed[seq]) * 1e6)), 2**32 - 1)
            if acks and acks[-1].seq == seq - 1:
                acks[-1] = Ack(seq, acks[-1].before + 1, cloud_us)
            else:
                acks.append(Ack(seq, 0, cloud_us))
        self._computed.clear()
        return tuple(acks)

    def _is_awaited(self, seq: int) -> bool:
        awaited = seq in self._awaited
        self._awaited.discard(seq)
        return awaited
