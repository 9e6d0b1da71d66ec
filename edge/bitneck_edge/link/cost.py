"""What a message of frames costs on the link, as automatic rate weighs it. Pure."""

from dataclasses import dataclass

__all__ = ["OVERHEAD_BYTES", "LinkCost"]

OVERHEAD_BYTES = 180.0
"""Link bytes of a frame beside its payload, until the link has shown its own; `benchmarks/wire.py` counts them."""

_SEGMENT, _HEADERS = 1448, 66
"""Of a full packet: its data, and the headers that one more packet has."""


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Link bytes of one message, in the busier direction.

    Attributes:
        beside: bytes up for each frame beside its payload.
        down: bytes down for each frame.
        frames: in a message.
    """

    beside: float = OVERHEAD_BYTES
    down: float = 0.0
    frames: int = 1

    def bytes(self, payload_bytes: float) -> float:
        """A message's link bytes.

        Args:
            payload_bytes: of each of its frames.
        """
        data = payload_bytes * self.frames
        up = data + self.beside * self.frames + data // _SEGMENT * _HEADERS
        return max(up, self.down * self.frames)
