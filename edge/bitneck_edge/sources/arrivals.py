"""Which photographs of a watched folder are complete, and were not sent yet. It takes stamps and times, and no files.

closed after writing, renamed into place --> `closed` --> send it
found by looking, the same for a while   --> `looked` --> send it
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Arrivals", "Stamp"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one file from another of its name, and from itself before it was written to again."""

    inode: int
    size: int
    mtime_ns: int

    @property
    def written(self) -> tuple[int, int]:
        """Without the time, which a program may set on a complete file."""
        return self.inode, self.size


class Arrivals:
    """The photographs of a folder that have been sent, and those that wait to be complete.

    A photograph that is written again counts as another one. An empty file counts as none.

    Args:
        settle_s: a file that is found by looking counts as complete if it stays as it is for this long.
        by_events: `closed` is called for what is complete. Looking then finds only what it was not called for, and
            another time of a file alone is no reason to send it again.
    """

    def __init__(self, *, settle_s: float, by_events: bool) -> None:
        self._settle_s = settle_s
        self._by_events = by_events
        self._sent: dict[Path, Stamp] = {}
        self._settling: dict[Path, tuple[Stamp, float]] = {}

    def begin(self, listing: Mapping[Path, Stamp]) -> None:
        """These were there before: do not send them."""
        self._sent.update(listing)

    def closed(self, path: Path, stamp: Stamp) -> bool:
        """A file was closed by who wrote it, or renamed into place. Returns whether to send it."""
        self._settling.pop(path, None)
        if not stamp.size or self._sent.get(path) == stamp:
            return False
        self._sent[path] = stamp
        return True

    def looked(self, listing: Mapping[Path, Stamp], now: float, most: int) -> list[Path]:
        """The folder was listed.

        Args:
            listing: its photographs.
            now: seconds.
            most: photographs to send; the others wait for another look.

        Returns:
            The photographs to send, the oldest first.
        """
        for gone in self._sent.keys() - listing.keys():
            del self._sent[gone]
        self._settling = {
            path: self._settling[path] if self._settling.get(path, (None,))[0] == stamp else (stamp, now)
            for path, stamp in listing.items()
            if stamp.size and not self._was_sent(path, stamp)
        }
        settled = [path for path, (_, since) in self._settling.items() if now - since >= self._settle_s]
        chosen = sorted(settled, key=lambda path: (listing[path].mtime_ns, path))[:most]
        self._mark(chosen, listing)
        return chosen

    @property
    def sent(self) -> Mapping[Path, Stamp]:
        """What need not be sent, as far as it is still there."""
        return self._sent

    @property
    def settling(self) -> bool:
        """Whether a look at the end of `settle_s` may find something."""
        return bool(self._settling)

    def _was_sent(self, path: Path, stamp: Stamp) -> bool:
        sent = self._sent.get(path)
        if sent is None or sent == stamp:
            return sent is not None
        return self._by_events and sent.written == stamp.written

    def _mark(self, paths: Iterable[Path], listing: Mapping[Path, Stamp]) -> None:
        for path in paths:
            self._sent[path] = listing[path]
            del self._settling[path]
