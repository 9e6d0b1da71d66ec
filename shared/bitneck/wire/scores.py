"""Scores of 16 bits: enough to tell two classes apart, in half the bytes. Pure."""

import math
import struct
from collections.abc import Sequence

__all__ = ["packed_scores", "unpacked_scores"]

_LEVELS = 65535


def packed_scores(scores: Sequence[float]) -> bytes:
    """Scores from 0 to 1 as 16-bit integers, little-endian. What is no number becomes 0."""
    levels = [0 if math.isnan(score) else round(min(max(score, 0.0), 1.0) * _LEVELS) for score in scores]
    return struct.pack(f"<{len(levels)}H", *levels)


def unpacked_scores(data: bytes) -> list[float]:
    """The opposite of `packed_scores`, within 1 / 131070. A byte that is left over at the end is ignored."""
    return [level / _LEVELS for level in struct.unpack_from(f"<{len(data) // 2}H", data)]
