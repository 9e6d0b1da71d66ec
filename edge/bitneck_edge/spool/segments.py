"""The files of a spool in the order of their numbers, and what they have together."""

import logging
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Self

from bitneck_edge.spool.disk import numbers_in
from bitneck_edge.spool.segment import GONE, Kept, Segment

__all__ = ["Segments"]

_LOG = logging.getLogger(__name__)
_MOST_LOST = 1 << 16
"""A file that has lost more bytes is not appended to."""


class Segments:
    """The files of a spool. The last one is written; frames fall out at the first one.

    Attributes:
        spool_id: the name under which the cloud knows the spool; empty if there are no files.
        damaged: places at which they were damaged or cut off when they were read; a file that cannot be read is one.

    Args:
        segments: in the order of their numbers.
        spool_id: see above.
        damaged: likewise.
    """

    def __init__(self, segments: Iterable[Segment] = (), spool_id: str = "", damaged: int = 0) -> None:
        self.spool_id = spool_id
        self.damaged = damaged
        self._all = list(segments)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the files of a folder, whatever they look like. A record that was cut off in the writing is removed.

        Raises:
            OSError: the folder cannot be read.
        """
        segments, damaged = list[Segment](), 0
        for number in numbers_in(folder):
            try:
                segments.append(Segment.load(folder, number))
            except OSError as exc:
                _LOG.error("%s/%08d.frames cannot be read (%s); it is left out", folder, number, exc)
                damaged += 1
        damaged += sum(segment.damaged for segment in segments)
        if damaged:
            _LOG.warning("%s: %d places were damaged or cut off", folder, damaged)
        segments.sort(key=lambda segment: (segment.first, segment.number))
        named = Counter(segment.spool for segment in segments if segment.spool)
        return cls(segments, named.most_common(1)[0][0] if named else f"spool-{secrets.token_hex(8)}", damaged)

    def __iter__(self) -> Iterator[Segment]:
        """A copy's: files may be removed meanwhile."""
        return iter(tuple(self._all))

    def __len__(self) -> int:
        """How many files there are."""
        return len(self._all)

    @property
    def oldest(self) -> Segment:
        """The first one."""
        return self._all[0]

    @property
    def active(self) -> Segment:
        """The one that is written."""
        return self._all[-1]

    @property
    def goes_on(self) -> bool:
        """Whether the next frame may go into the last file, as the files were read."""
        if not self._all:
            return False
        last = self.active
        return last.spool == self.spool_id and last.next_seq == self.next_seq and last.lost_bytes <= _MOST_LOST

    @property
    def next_seq(self) -> int:
        """A number above those of all frames."""
        return max((segment.next_seq for segment in self._all), default=1)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(segment.size + segment.done_size for segment in self._all)

    @property
    def kept(self) -> int:
        """Frames that are not done."""
        return sum(segment.waiting + segment.held for segment in self._all)

    @property
    def named_bundles(self) -> set[str]:
        """The bundles that coded their frames, those that are done included."""
        return {bundle for segment in self._all for bundle in segment.named_bundles}

    def kept_of(self, bundles: Collection[str]) -> int:
        """Frames of some bundles that are not done."""
        named = [segment for segment in self._all if not segment.named_bundles.isdisjoint(bundles)]
        return sum(segment.bundles[bundle] for segment in named for bundle in bundles)

    def has_waiting(self, without: Collection[str]) -> bool:
        """Whether a frame is to be sent, those of some bundles left out."""
        return any(segment.has_waiting(without) for segment in self._all)

    def of(self, seq: int) -> Segment | None:
        """The file that has a frame which is not done; None if there is none."""
        place = bisect_right(self._all, seq, key=lambda segment: segment.first) - 1
        return self._all[place] if place >= 0 and self._all[place].state(seq) != GONE else None

    def take(
        self,
        most: int,
        most_bytes: int,
        without: Collection[str],
        too_old: Callable[[int], bool],
        fall_out: Callable[[Segment, Collection[int]], None],
    ) -> list[Kept]:
        """The next frames to send, in order, all of one bundle.

        Args:
            most: frames, at least 1.
            most_bytes: of their payloads; one frame may have more.
            without: bundles whose frames are passed over.
            too_old: whether a frame falls out, by the time of its capture, microseconds since 1970.
            fall_out: called with such frames of a file.
        """
        taken: list[Kept] = []
        for segment in self:
            if not segment.has_waiting(without):
                continue
            old, full = list[int](), False
            size = sum(len(one.payload) for one in taken)
            for frame in segment.waiting_frames():
                if too_old(frame.captured_unix_us):
                    old.append(frame.seq)
                elif frame.bundle_id not in without:
                    size += len(frame.payload)
                    another = bool(taken) and (size > most_bytes or frame.bundle_id != taken[0].bundle_id)
                    if full := another or len(taken) >= most:
                        break
                    taken.append(frame)
            if old:
                fall_out(segment, old)
            if full:
                break
            if not taken and segment is not self.active:
                segment.forget_read()
        return taken

    def append(self, segment: Segment) -> None:
        """From now on, this one is written."""
        self._all.append(segment)

    def remove(self, segment: Segment) -> None:
        """Take a file out of the list, and off the disk."""
        self._all.remove(segment)
        segment.remove()

    def close(self) -> None:
        """Close the files."""
        for segment in self._all:
            segment.close()
