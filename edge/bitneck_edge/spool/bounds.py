"""The bounds of a spool, and what is counted of it. Pure."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Limits", "SpoolCounts"]

_LEAST_SEGMENT, _MOST_SEGMENT = 16 << 10, 1 << 20
_SEGMENTS = 64
"""What falls out is a whole file: one of so many."""
_CLOCK_SET_US = 1_735_689_600_000_000
"""Times before 2025 are those of a clock that nobody has set: they say nothing about a frame's age."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a spool.

    Attributes:
        most_bytes: of its files.
        most_age_s: of its frames, since they were captured.
        first: which frames fall out when it is full.
    """

    most_bytes: int
    most_age_s: float
    first: Literal["oldest", "newest"] = "oldest"

    @property
    def segment_bytes(self) -> int:
        """After so many bytes another file begins."""
        return max(_LEAST_SEGMENT, min(_MOST_SEGMENT, self.most_bytes // _SEGMENTS))

    def too_old(self, now_s: float, captured_unix_us: int) -> bool:
        """Whether a frame falls out for its age.

        Args:
            now_s: seconds since 1970.
            captured_unix_us: when its picture was taken, microseconds since 1970.
        """
        return captured_unix_us >= _CLOCK_SET_US and now_s - captured_unix_us / 1e6 > self.most_age_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolCounts:
    """What became of the frames of a spool, since the client was opened.

    Attributes:
        spooled: frames that were written into it.
        sent: frames of it that were answered, also with a fault that does not pass.
        kept: frames that are in it now.
        unknown: those of them whose bundle the server does not have.
        dropped: frames that fell out, because they were too many or too old, or could not be written.
        damaged: places at which its files were damaged or cut off when it was opened.
        bytes: of its files now.
        waiting: frames that wait in memory until the disk takes them. They count in `spooled` and `kept` then.
        opened: whether its files were opened. If not, its disk has not answered since the start, or has refused.
    """

    spooled: int = 0
    sent: int = 0
    kept: int = 0
    unknown: int = 0
    dropped: int = 0
    damaged: int = 0
    bytes: int = 0
    waiting: int = 0
    opened: bool = True
