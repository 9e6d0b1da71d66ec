"""What a message of frames costs on the link, as automatic rate weighs it. Pure."""

from dataclasses import dataclass

from bitneck.wire.link_bytes import HEADERS, SEGMENT

__all__ = ["OVERHEAD_BYTES", "LinkCost"]

OVERHEAD_BYTES = 180.0
"""Link bytes of a frame beside its payload, until the link has shown its own; `benchmarks/wire.py` counts them."""


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Link bytes of one message, in the busier direction.

    Attributes:
        beside: bytes up for each frame beside its payload.
        down: bytes down for each frame.
        frames: in a message, if it is full.
    """

    beside: float = OVERHEAD_BYTES
    down: float = 0.0
    frames: int = 1

    def bytes(self, payload_bytes: float, frames: int = 0) -> float:
        """A message's link bytes.

        Args:
            payload_bytes: of each of its frames.
            frames: in this one; 0 for a full one.
        """
        count = frames or self.frames
        data = payload_bytes * count
        up = data + self.beside * count + data // SEGMENT * HEADERS
        return max(up, self.down * count)
