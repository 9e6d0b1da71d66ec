"""One file of a spool, with the file beside it that says which of its frames are done.

00000007.frames    a header, tables and frames; only ever appended to
00000007.done      numbers of frames that need not be sent any more
"""

import contextlib
import logging
import os
from array import array
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bitneck_edge.spool.disk import Complaints, open_again, sync_folder, whole, write
from bitneck_edge.spool.format import Damage, Done, FrameEntry, Header, Table, pack, read

__all__ = ["Kept", "Segment", "sync_names"]

_LOG = logging.getLogger(__name__)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_MOST_GAP = 1 << 20
"""A number that lies further from the first one of its file is damage that has a right CRC by chance."""
_NO_TABLE = 0xFFFF
_MOST_PREFIX = 120
WAITING, GONE, HELD = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A frame of a spool.

    Attributes:
        seq: its number in the spool.
        bundle_id: of the bundle that coded it.
        point: its operating point.
        payload: the coded bytes, coded by themselves.
        captured_unix_us: when its picture was taken, microseconds since 1970.
        name: of the picture.
    """

    seq: int
    bundle_id: str
    point: str
    payload: bytes
    captured_unix_us: int
    name: str


class Segment:
    """A file of frames whose numbers count up from the first one.

    Attributes:
        number: of the file.
        first: number of its first frame.
        spool: id of its spool; empty if its header is damaged.
        size: bytes of the file of frames.
        done_size: bytes of the other one.
        newest_us: latest time of capture of a frame.
        waiting: frames that are to be sent.
        held: frames that another session may still answer.
        damaged: places at which something was no record.
        lost_bytes: bytes there.
        named: whether its name is on the disk.
        torn: whether the file ended in the middle of a record, which was cut off.

    Args:
        folder: of the spool.
        number: of the file.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.path = folder / f"{number:08d}.frames"
        self.done_path = self.path.with_suffix(".done")
        self.first = 1
        self.spool = ""
        self.size = self.done_size = 0
        self.newest_us = 0
        self.waiting = self.held = 0
        self.damaged = self.lost_bytes = 0
        self.torn = False
        self.named = True
        self._tables: dict[int, Table] = {}
        self._indices: dict[tuple[str, str, str], int] = {}
        self._states = bytearray()
        self._of_table = array("H")
        self._descriptor = self._done_descriptor = -1
        self._unread: deque[Kept] | None = None
        self._read_to = 0
        self._unnoted: list[int] = []
        self._next = 1
        self._complaints = Complaints(folder)

    @classmethod
    def create(cls, folder: Path, number: int, spool: str, first: int, *, synced: bool = True) -> Self:
        """A new file.

        Args:
            folder: of the spool.
            number: of the file.
            spool: id of the spool.
            first: number of its first frame.
            synced: it is on the disk when this returns; else a sync of the file and its folder brings it there.

        Raises:
            OSError: it cannot be written.
        """
        segment = cls(folder, number)
        segment.first = segment._next = first
        segment.spool = spool
        segment._descriptor = os.open(segment.path, _FLAGS | os.O_TRUNC, 0o600)
        try:
            segment._append(pack(Header(first, spool)))
            if synced:
                os.fsync(segment._descriptor)
                sync_folder(folder)
            segment.named = synced
        except OSError:
            segment.close()
            with contextlib.suppress(OSError):
                segment.path.unlink()
            raise
        return segment

    @classmethod
    def load(cls, folder: Path, number: int) -> Self:
        """A file that is there. A record that was being written when the device stopped is cut off.

        Raises:
            OSError: it cannot be read, or is no file of a spool.
        """
        segment = cls(folder, number)
        try:
            data = whole(segment._open(), segment.path)
            segment.size = len(data)
            segment._load(data)
            if segment.done_path.exists():
                segment._load_done()
        finally:
            segment.close()
        return segment

    def _load(self, data: bytes) -> None:
        known = False
        for entry, _ in read(data):
            match entry:
                case Header():
                    self.first, self.spool, known = entry.first, entry.spool, True
                case Table():
                    self._learn(entry)
                case FrameEntry():
                    if not known:
                        self.first, known = entry.seq, True
                    if not self._note(entry):
                        self._damage(0)
                case Damage(begin, end):
                    self._damage(end - begin)
                    if end == len(data):
                        self.torn, self.size = True, begin
                        os.ftruncate(self._open(), begin)
        self._next = max(self._next, self.first + len(self._states)) + self.lost_bytes

    def _load_done(self) -> None:
        descriptor = self._open_done()
        data = whole(descriptor, self.done_path)
        self.done_size = len(data)
        for entry, _ in read(data):
            if isinstance(entry, Done):
                for seq in entry.seqs:
                    self._set(seq, GONE)
            elif isinstance(entry, Damage) and entry.end == len(data):
                self.done_size = entry.begin
                os.ftruncate(descriptor, entry.begin)

    def _damage(self, size: int) -> None:
        self.damaged += 1
        self.lost_bytes += size

    def _learn(self, table: Table) -> None:
        self._tables[table.index] = table
        self._indices[(table.bundle_id, table.point, table.prefix)] = table.index

    def _note(self, entry: FrameEntry) -> bool:
        """Note a frame of the file; False if it cannot be one."""
        place = entry.seq - self.first
        if not len(self._states) <= place < len(self._states) + _MOST_GAP or entry.table not in self._tables:
            return False
        gap = place - len(self._states)
        self._states += bytes([GONE]) * gap + bytes([WAITING])
        self._of_table.extend([_NO_TABLE] * gap + [entry.table])
        self.waiting += 1
        self.newest_us = max(self.newest_us, entry.captured_unix_us)
        self._next = max(self._next, entry.seq + 1)
        return True

    @property
    def next_seq(self) -> int:
        """A number above those of all its frames, also of those that damage may have destroyed."""
        return self._next

    @property
    def frames(self) -> int:
        """Frames that it has had, gaps included."""
        return len(self._states)

    @property
    def bundles(self) -> Counter[str]:
        """Frames that are to be sent, by the bundle that coded them."""
        pairs = zip(self._states, self._of_table, strict=True)
        found = Counter(table for state, table in pairs if state != GONE)
        counts: Counter[str] = Counter()
        for table, count in found.items():
            counts[self._tables[table].bundle_id] += count
        return counts

    @property
    def named_bundles(self) -> frozenset[str]:
        """The bundles that coded its frames, those that are done included."""
        return frozenset(table.bundle_id for table in self._tables.values())

    def has_waiting(self, without: Collection[str] = ()) -> bool:
        """Whether a frame is to be sent, those of some bundles left out."""
        named = self.named_bundles
        if not self.waiting or named.isdisjoint(without):
            return self.waiting > 0
        others = {index for index, table in self._tables.items() if table.bundle_id not in without}
        pairs = zip(self._states, self._of_table, strict=True)
        return bool(others) and any(state == WAITING and table in others for state, table in pairs)

    def record_of(self, seq: int, frame: Kept) -> bytes:
        """The bytes that `append` writes for a frame."""
        prefix = _prefix_of(frame.name)
        key = frame.bundle_id, frame.point, prefix
        index = self._indices.get(key)
        table = b""
        if index is None:
            index = max(self._tables, default=-1) + 1
            table = pack(Table(index, *key))
        name = frame.name.removeprefix(prefix)
        return table + pack(FrameEntry(seq, frame.captured_unix_us, index, name, frame.payload))

    def append(self, data: bytes, *, held: bool) -> None:
        """Append a frame, from `record_of`.

        Raises:
            OSError: it cannot be written. Nothing of it is left then.
        """
        self._append(data)
        for entry, _ in read(data):
            if isinstance(entry, Table):
                self._learn(entry)
            elif isinstance(entry, FrameEntry):
                self._note(entry)
                if held:
                    self._set(entry.seq, HELD)

    def _append(self, data: bytes) -> None:
        write(self._open(), data, self.size)
        self.size += len(data)

    def state(self, seq: int) -> int:
        """Whether a frame is WAITING, HELD or GONE."""
        place = seq - self.first
        return self._states[place] if 0 <= place < len(self._states) else GONE

    def release(self, seq: int) -> None:
        """A frame that was held is to be sent."""
        if self.state(seq) == HELD:
            self._set(seq, WAITING)
            self._unread = None

    def done(self, seqs: Iterable[int]) -> int:
        """Frames need not be sent any more.

        Returns:
            How many of them were to be sent until now.
        """
        new = [seq for seq in seqs if self.state(seq) != GONE]
        for seq in new:
            self._set(seq, GONE)
        self._unnoted += new
        self.note_done()
        return len(new)

    def note_done(self) -> None:
        """Write down what is done, and was not written; if that fails, it is tried again at the next call."""
        if not self._unnoted:
            return
        data = pack(Done(tuple(self._unnoted)))
        try:
            write(self._open_done(), data, self.done_size)
        except OSError as exc:
            self._complaints.say(
                f"{self.done_path.name} cannot be written ({exc.strerror}): after a restart, answers may come twice"
            )
            return
        self.done_size += len(data)
        self._unnoted.clear()

    def _set(self, seq: int, state: int) -> None:
        before, place = self.state(seq), seq - self.first
        if not 0 <= place < len(self._states) or before == state:
            return
        self._states[place] = state
        self.waiting += (state == WAITING) - (before == WAITING)
        self.held += (state == HELD) - (before == HELD)

    def waiting_frames(self) -> Iterator[Kept]:
        """The frames that are to be sent, in order, read from the file.

        Raises:
            OSError: it cannot be read.
        """
        if self._unread is None:
            self._unread, self._read_to = deque(), 0
        if self._read_to < self.size:
            data = os.pread(self._open(), self.size - self._read_to, self._read_to)
            for entry, _ in read(data):
                if isinstance(entry, FrameEntry) and self.state(entry.seq) == WAITING and entry.table in self._tables:
                    table = self._tables[entry.table]
                    self._unread.append(
                        Kept(
                            seq=entry.seq,
                            bundle_id=table.bundle_id,
                            point=table.point,
                            payload=entry.payload,
                            captured_unix_us=entry.captured_unix_us,
                            name=table.prefix + entry.name,
                        )
                    )
            self._read_to = self.size
        while self._unread and self.state(self._unread[0].seq) != WAITING:
            self._unread.popleft()
        return (frame for frame in self._unread if self.state(frame.seq) == WAITING)

    def forget_read(self) -> None:
        """Free the memory of `waiting_frames`."""
        self._unread = None
        self.close()

    def descriptors(self) -> list[int]:
        """The files, opened once more for a sync; the caller closes them.

        Raises:
            OSError: they cannot be opened.
        """
        return open_again([self.path, self.done_path] if self.done_size else [self.path])

    def close(self) -> None:
        """Close the files; they are opened again when they are needed."""
        for descriptor in (self._descriptor, self._done_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._done_descriptor = -1

    def remove(self) -> None:
        """Close and remove the files: the frames first, so that no frame comes back."""
        self.close()
        for path in (self.path, self.done_path):
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                _LOG.warning("%s cannot be removed (%s)", path, exc)

    def _open(self) -> int:
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, _FLAGS & ~os.O_CREAT)
        return self._descriptor

    def _open_done(self) -> int:
        if self._done_descriptor < 0:
            self._done_descriptor = os.open(self.done_path, _FLAGS, 0o600)
        return self._done_descriptor


def sync_names(folder: Path, segments: Iterable[Segment]) -> None:
    """The names of new files are on the disk when this returns.

    Raises:
        OSError: they cannot be brought there.
    """
    new = [segment for segment in segments if not segment.named]
    if new:
        sync_folder(folder)
    for segment in new:
        segment.named = True


def _prefix_of(name: str) -> str:
    """What the names of other pictures of the same source begin with, too."""
    return name[: max(name.rfind("/"), name.rfind("#")) + 1][:_MOST_PREFIX]
