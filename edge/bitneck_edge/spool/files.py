"""Frames on the device's disk, in the order of their numbers, within bounds of bytes and age.

    <folder>/lock                    locked by the process that uses the spool
    <folder>/00000001.frames ...     see `bitneck_edge.spool.segment`
    <folder>/bundles/<SHA-256>.*     manifests and names of classes of the bundles that coded the frames

Files are only appended to, and removed when all of their frames are done, or fall out. What is written survives the end
of the process at any moment. `sync` brings it to the disk; whoever calls it each half second loses no more than that
when power fails. All methods may be called from any thread.
"""

import logging
import os
import secrets
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Self

from bitneck.errors import InvalidConfig, Overloaded, Unavailable
from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck_edge.spool.bounds import Limits, SpoolCounts
from bitneck_edge.spool.disk import FULL, Complaints, locked, numbers_in
from bitneck_edge.spool.format import LEAST_FRAME
from bitneck_edge.spool.known import KnownBundles
from bitneck_edge.spool.segment import GONE, Kept, Segment, sync_names

__all__ = ["Spool"]

_LOG = logging.getLogger(__name__)
_TIDY_BYTES = 4096
_MOST_WAIT_S = 0.05  # of whoever asks for counts
_MOST_LOST = 1 << 16  # a file that has lost more bytes is not appended to


class Spool:
    """A spool that this process uses. `open` makes it.

    Attributes:
        spool_id: the name under which the cloud knows it; it stays the same as long as the folder does.
        known: manifests of the bundles that coded the frames.
        folder: of its files.
    """

    def __init__(self, folder: Path, limits: Limits, lock: int) -> None:
        self.spool_id = ""
        self.known = KnownBundles(folder / "bundles")
        self.folder = folder
        self._limits = limits
        self._lock_descriptor = lock
        self._mutex = threading.RLock()
        self._syncing = threading.Lock()
        self._segments: list[Segment] = []
        self._unsynced: set[Segment] = set()
        self._ready: Segment | None = None  # begun ahead of time
        self._reserved = 0
        self._closed = False
        self._spooled = self._sent = self._dropped = self._damaged = 0
        self._counts = SpoolCounts()
        self._complaints = Complaints(folder)

    @classmethod
    def open(cls, folder: Path, limits: Limits) -> Self:
        """Open a spool, or begin one. Whatever the files look like, this succeeds if they can be read and written.

        Raises:
            InvalidConfig: another process uses it, or the folder cannot be written.
        """
        spool = cls(folder, limits, locked(folder))
        try:
            spool._load()
        except OSError as exc:
            spool.close()
            raise InvalidConfig(
                f"the spool {folder} cannot be written ({exc.strerror or exc}); make room or choose another folder"
            ) from exc
        return spool

    def _load(self) -> None:
        for number in numbers_in(self.folder):
            try:
                self._segments.append(Segment.load(self.folder, number))
            except OSError as exc:
                _LOG.error("%s/%08d.frames cannot be read (%s); it is left out", self.folder, number, exc)
                self._damaged += 1
        self._damaged += sum(segment.damaged for segment in self._segments)
        if self._damaged:
            _LOG.warning("%s: %d places were damaged or cut off", self.folder, self._damaged)
        self._segments.sort(key=lambda segment: (segment.first, segment.number))
        named = Counter(segment.spool for segment in self._segments if segment.spool)
        self.spool_id = named.most_common(1)[0][0] if named else f"spool-{secrets.token_hex(8)}"
        last = self._segments[-1] if self._segments else None
        behind = last is not None and last.next_seq < max(segment.next_seq for segment in self._segments)
        if last is None or behind or last.spool != self.spool_id or last.lost_bytes > _MOST_LOST:
            try:
                self._begin_segment()
            except OSError:  # a full disk: go on in the last file, if there is one
                if last is None:
                    raise
        for segment in self._segments[:-1]:
            if not segment.waiting:
                self._remove(segment)
        self.known.forget_others({bundle for segment in self._segments for bundle in segment.named_bundles})
        for path in self.folder.glob("*.done"):
            if not path.with_suffix(".frames").exists():
                path.unlink(missing_ok=True)

    def _next_number(self) -> int:
        self._reserved = max([self._reserved, *numbers_in(self.folder)]) + 1
        return self._reserved

    def prepare(self) -> None:
        """Begin the next file ahead of time, so that `put` need not wait until its beginning is on the disk.

        Its first number is above all that the one before may still get; the numbers between are never given.

        Raises:
            OSError: it cannot be written.
        """
        with self._syncing:
            with self._mutex:
                active, full = self._segments[-1], self._limits.segment_bytes
                if self._closed or self._ready is not None or active.size < full * 3 // 4:
                    return
                number = self._next_number()
                first = active.next_seq + max(0, full - active.size) // LEAST_FRAME + 2
            ready = Segment.create(self.folder, number, self.spool_id, first)
            with self._mutex:
                if self._segments[-1] is active:
                    self._ready = ready
                else:  # it was full meanwhile, and the numbers of another one may reach this one's
                    ready.remove()

    def _begin_segment(self) -> None:
        """Begin another file, without waiting for the disk: `sync` brings it there."""
        first = max([1, *(segment.next_seq for segment in self._segments)])
        ready, self._ready = self._ready, None
        if ready is not None and ready.first >= first:
            self._segments.append(ready)
            return
        if ready is not None:
            ready.remove()
        number = self._next_number()
        while True:
            try:
                segment = Segment.create(self.folder, number, self.spool_id, first, synced=False)
                break
            except OSError as exc:
                if exc.errno not in FULL or self._limits.first == "newest" or not self._drop_oldest():
                    raise
        self._segments.append(segment)
        self._unsynced.add(segment)

    def counts(self, unknown: Collection[str] = ()) -> SpoolCounts:
        """What became of the frames, with those of some bundles as `unknown`.

        While another thread waits for the disk, this is what was known before that.
        """
        if self._mutex.acquire(timeout=_MOST_WAIT_S):
            try:
                self._counts = SpoolCounts(
                    spooled=self._spooled, sent=self._sent, dropped=self._dropped, damaged=self._damaged,
                    kept=sum(each.waiting + each.held for each in self._segments),
                    unknown=self.kept_of(unknown), bytes=self._bytes,
                )  # fmt: skip
            finally:
                self._mutex.release()
        return self._counts

    def kept_of(self, bundles: Collection[str]) -> int:
        """Frames of some bundles that are in the spool."""
        with self._mutex:
            named = [each for each in self._segments if not each.named_bundles.isdisjoint(bundles)]
            return sum(each.bundles[bundle] for each in named for bundle in bundles)

    def put(self, frame: Kept, *, held: bool = False) -> int | None:
        """Write a frame.

        Args:
            frame: its number is not looked at.
            held: another session may still answer it: it is not given out until `release`.

        Returns:
            Its number in the spool; None if there is no room for it. Unless it is held, it counts as dropped then.

        Raises:
            Overloaded: it is larger than any server takes. Unless it is held, it counts as dropped.
            Unavailable: the spool is closed.
        """
        with self._mutex:
            if self._closed:
                raise Unavailable("the spool is closed")
            if len(frame.payload) > MAX_MESSAGE_BYTES:
                self._refuse("it is larger than any server takes", held=held)
                raise Overloaded(
                    f"a frame of {len(frame.payload)} bytes at {frame.point}, the limit is {MAX_MESSAGE_BYTES}; "
                    "it is not kept: choose an operating point of a lower rate"
                )
            active = self._segments[-1]
            data = active.record_of(active.next_seq, frame)
            try:
                if active.frames and active.size + len(data) > self._limits.segment_bytes:
                    self._begin_segment()
                    active = self._segments[-1]
                    data = active.record_of(active.next_seq, frame)
                seq = active.next_seq
                if not self._make_room(len(data)):
                    self._refuse("it is full", held=held)
                    return None
                self._write(active, data, held=held)
            except OSError as exc:
                self._refuse(exc.strerror or str(exc), held=held)
                return None
            self._spooled += 1
            self._unsynced.add(active)
            return seq

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, once the oldest frames have fallen out if they may."""
        while self._bytes + size > self._limits.most_bytes:
            if self._limits.first == "newest" or not self._drop_oldest():
                return False
        return True

    def _write(self, active: Segment, data: bytes, *, held: bool) -> None:
        while True:
            try:
                active.append(data, held=held)
                return
            except OSError as exc:
                if exc.errno not in FULL or self._limits.first == "newest" or not self._drop_oldest():
                    raise

    def _drop_oldest(self) -> bool:
        """Let the oldest file fall out; never the one that is written."""
        if len(self._segments) < 2:
            return False
        oldest = self._segments[0]
        self._dropped += oldest.waiting + oldest.held
        self._complaints.say(f"{oldest.waiting + oldest.held} of the oldest frames fall out, to make room")
        self._remove(oldest)
        return True

    def _refuse(self, why: str, *, held: bool) -> None:
        self._dropped += not held
        self._complaints.say(f"a frame cannot be kept: {why}; {self._dropped} are lost so far")

    def release(self, seq: int) -> None:
        """A frame that was held is to be sent from here on."""
        with self._mutex:
            if (segment := self._of(seq)) is not None:
                segment.release(seq)

    def take(self, most: int, most_bytes: int, without: Collection[str] = ()) -> list[Kept]:
        """The next frames to send, in order, all of one bundle. They stay in the spool until `done`.

        Args:
            most: frames, at least 1.
            most_bytes: of their payloads; one frame may have more.
            without: bundles whose frames are passed over.
        """
        with self._mutex:
            self._drop_old()
            taken: list[Kept] = []
            passed_over = frozenset(without)
            for segment in list(self._segments):
                if not segment.has_waiting(passed_over):
                    continue
                if self._take_from(segment, taken, most, most_bytes, passed_over):
                    break
                if not taken and segment is not self._segments[-1]:
                    segment.forget_read()
            return taken

    def _take_from(
        self, segment: Segment, taken: list[Kept], most: int, most_bytes: int, without: Collection[str]
    ) -> bool:
        """Add the next frames of a file to those that are taken; whether there is an end of taking."""
        old, full = [], False
        size = sum(len(one.payload) for one in taken)
        for frame in segment.waiting_frames():
            if self._limits.too_old(time.time(), frame.captured_unix_us):
                old.append(frame.seq)
            elif frame.bundle_id not in without:
                size += len(frame.payload)
                full = len(taken) >= most or (
                    bool(taken) and (size > most_bytes or frame.bundle_id != taken[0].bundle_id)
                )
                if full:
                    break
                taken.append(frame)
        if old:
            self._dropped += segment.done(old)
            self._unsynced.add(segment)
        return full

    def done(self, seqs: Iterable[int]) -> None:
        """These frames were answered, and the answers were handed out."""
        with self._mutex:
            for seq in seqs:
                if not self._closed and (segment := self._of(seq)) is not None:
                    self._sent += segment.done([seq])
                    self._unsynced.add(segment)
                    if not segment.waiting and not segment.held and segment is not self._segments[-1]:
                        self._remove(segment)

    def has_waiting(self, without: Collection[str] = ()) -> bool:
        """Whether a frame is to be sent, bundles to be passed over left out."""
        with self._mutex:
            return any(segment.has_waiting(without) for segment in self._segments)

    @property
    def dirty(self) -> bool:
        """Whether something was written that no `sync` has brought to the disk."""
        return bool(self._unsynced)

    def sync(self) -> bool:
        """Bring to the disk what was written before.

        Returns:
            Whether it is there. If not, the next call tries it again.
        """
        with self._syncing:  # a second caller must not return before what the first one brings is there
            descriptors, segments = list[int](), set[Segment]()
            try:
                with self._mutex:
                    if self._closed:
                        return not self._unsynced
                    for segment in self._segments:
                        segment.note_done()
                    segments, self._unsynced = self._unsynced, set()
                    for segment in segments:
                        descriptors += segment.descriptors()
                for descriptor in descriptors:
                    _SYNC(descriptor)
                sync_names(self.folder, segments)
            except OSError as exc:
                with self._mutex:
                    self._unsynced |= segments.intersection(self._segments)
                self._complaints.say(f"it cannot be brought to the disk: {exc.strerror}")
                return False
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            return True

    def tidy(self) -> None:
        """Remove what is too old, and the file that is written if none of its frames is needed."""
        with self._mutex:
            if self._closed:
                return
            self._drop_old()
            active = self._segments[-1]
            if active.waiting or active.held or active.size <= _TIDY_BYTES:
                return
            try:
                self._begin_segment()
            except OSError:
                return  # no room: it stays until there is some
        synced = self.sync()  # whoever puts a frame meanwhile must not wait for the disk
        with self._mutex:
            if synced and not self._closed and active in self._segments:
                self._remove(active)

    def close(self) -> None:
        """Bring everything to the disk, and let others use the spool."""
        self.sync()
        with self._syncing, self._mutex:
            if self._closed:
                return
            self._closed = True
            if self._ready is not None:
                self._ready.remove()
            for segment in self._segments:
                segment.close()
            os.close(self._lock_descriptor)

    @property
    def _bytes(self) -> int:
        return sum(segment.size + segment.done_size for segment in self._segments)

    def _of(self, seq: int) -> Segment | None:
        place = bisect_right(self._segments, seq, key=lambda segment: segment.first) - 1
        return self._segments[place] if place >= 0 and self._segments[place].state(seq) != GONE else None

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._unsynced.discard(segment)
        segment.remove()

    def _drop_old(self) -> None:
        while len(self._segments) > 1 and self._limits.too_old(time.time(), self._segments[0].newest_us):
            self._drop_oldest()


_SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has the latter only
