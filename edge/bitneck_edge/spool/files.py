"""Frames on the device's disk, in the order of their numbers, within bounds of bytes and age.

    <folder>/lock                    locked by the process that uses the spool
    <folder>/00000001.frames ...     see `bitneck_edge.spool.segment`
    <folder>/bundles/<SHA-256>.*     manifests and names of classes of the bundles that coded the frames

Files are only appended to, and removed when all of their frames are done, or fall out. What is written survives the end
of the process at any moment. `sync` brings it to the disk; whoever calls it each half second loses no more than that
when power fails. All methods may be called from any thread.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from bitneck.errors import InvalidConfig, Overloaded, Unavailable
from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck_edge.spool.bounds import Limits, SpoolCounts
from bitneck_edge.spool.disk import FULL, Complaints, locked, numbers_in
from bitneck_edge.spool.format import LEAST_FRAME
from bitneck_edge.spool.known import KnownBundles
from bitneck_edge.spool.segment import Kept, Segment, sync_names
from bitneck_edge.spool.segments import Segments

__all__ = ["Spool"]

T = TypeVar("T")

_TIDY_BYTES = 4096


class Spool:
    """A spool of this process. `begin` opens its files; before that it takes no frames.

    Attributes:
        known: manifests of the bundles that coded the frames.
        folder: of its files.

    Args:
        folder: of its files.
        limits: bounds of bytes and age.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.known = KnownBundles(folder / "bundles")
        self.folder = folder
        self._limits = limits
        self._lock_descriptor = -1
        self._mutex = threading.RLock()
        self._syncing = threading.Lock()
        self._segments = Segments()
        self._unsynced: set[Segment] = set()
        self._ready: Segment | None = None  # begun ahead of time
        self._reserved = 0
        self._opened = self._closed = False
        self._why_not = f"the spool {folder} is not open"
        self._spooled = self._sent = self._dropped = 0
        self._counts = SpoolCounts(opened=False)  # as of the last change
        self._unknown = 0
        self._complaints = Complaints(folder)

    @classmethod
    def open(cls, folder: Path, limits: Limits) -> Self:
        """A spool with open files; see `begin`."""
        spool = cls(folder, limits)
        spool.begin()
        return spool

    def begin(self) -> None:
        """Open the files, or begin new ones. Whatever they look like, this succeeds if they can be read and written.

        Raises:
            InvalidConfig: another process uses the folder, or it cannot be written. It may be tried again.
        """
        try:
            with self._changing(), contextlib.ExitStack() as unless_opened:
                unless_opened.callback(os.close, lock := locked(self.folder))
                unless_opened.callback(self._forget)
                self._load()
                unless_opened.pop_all()
                self._lock_descriptor, self._opened = lock, True
        except OSError as exc:
            self._why_not = f"the spool {self.folder} cannot be written ({exc.strerror or exc})"
            raise InvalidConfig(f"{self._why_not}; make room or choose another folder") from exc
        except InvalidConfig as exc:
            self._why_not = str(exc)
            raise

    def _forget(self) -> None:
        self._segments.close()
        self._segments = Segments()
        self._unsynced.clear()

    def _load(self) -> None:
        self._segments = Segments.load(self.folder)
        if not self._segments.goes_on:
            try:
                self._begin_segment()
            except OSError:  # a full disk: go on in the last file, if there is one
                if not self._segments:
                    raise
        for segment in self._segments:
            if not segment.waiting and segment is not self._segments.active:
                self._remove(segment)
        self.known.forget_others(self._segments.named_bundles)
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
                if not self._usable:
                    return
                active, full = self._segments.active, self._limits.segment_bytes
                if self._ready is not None or active.size < full * 3 // 4:
                    return
                number = self._next_number()
                first = active.next_seq + max(0, full - active.size) // LEAST_FRAME + 2
            ready = Segment.create(self.folder, number, self.spool_id, first)
            with self._mutex:
                if self._segments.active is active:
                    self._ready = ready
                else:  # it was full meanwhile, and the numbers of another one may reach this one's
                    ready.remove()

    def _begin_segment(self) -> None:
        """Begin another file, without waiting for the disk: `sync` brings it there."""
        first = self._segments.next_seq
        ready, self._ready = self._ready, None
        if ready is not None and ready.first >= first:
            self._segments.append(ready)
            return
        if ready is not None:
            ready.remove()
        create = partial(Segment.create, self.folder, self._next_number(), self.spool_id, first, synced=False)
        segment = self._with_room(create)
        self._segments.append(segment)
        self._unsynced.add(segment)

    @property
    def spool_id(self) -> str:
        """The name under which the cloud knows it; it stays as long as the folder does. Empty before it is open."""
        return self._segments.spool_id

    @property
    def opened(self) -> bool:
        """Whether its files were opened; also after `close`."""
        return self._opened

    @property
    def _usable(self) -> bool:
        return self._opened and not self._closed

    def counts(self, unknown: Collection[str] = ()) -> SpoolCounts:
        """What became of the frames, with those of some bundles as `unknown`. It never waits.

        While another thread waits for the disk, this is what was known before that.
        """
        if not unknown:
            return self._counts
        if self._mutex.acquire(blocking=False):
            try:
                self._unknown = self.kept_of(unknown)
            finally:
                self._mutex.release()
        return replace(self._counts, unknown=self._unknown)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody else changes it meanwhile; whoever asks for counts then sees those of now."""
        with self._mutex:
            try:
                yield
            finally:
                self._counts = SpoolCounts(
                    spooled=self._spooled, sent=self._sent, dropped=self._dropped, damaged=self._segments.damaged,
                    kept=self._segments.kept, bytes=self._segments.bytes, opened=self._opened,
                )  # fmt: skip

    def kept_of(self, bundles: Collection[str]) -> int:
        """Frames of some bundles that are in the spool."""
        with self._mutex:
            return self._segments.kept_of(bundles)

    def put(self, frame: Kept, *, held: bool = False) -> int | None:
        """Write a frame.

        Args:
            frame: its number is not looked at.
            held: another session may still answer it: it is not given out until `release`.

        Returns:
            Its number in the spool; None if there is no room for it. Unless it is held, it counts as dropped then.

        Raises:
            Overloaded: it is larger than any server takes. Unless it is held, it counts as dropped.
            Unavailable: the spool is closed; or not open, then it counts as dropped, unless it is held.
        """
        with self._changing():
            if self._closed:
                raise Unavailable("the spool is closed")
            if not self._opened:
                self._refuse(self._why_not, held=held)
                raise Unavailable(f"the frame is lost: {self._why_not}")
            if len(frame.payload) > MAX_MESSAGE_BYTES:
                self._refuse("it is larger than any server takes", held=held)
                raise Overloaded(
                    f"a frame of {len(frame.payload)} bytes at {frame.point}, the limit is {MAX_MESSAGE_BYTES}; "
                    "it is not kept: choose an operating point of a lower rate"
                )
            active = self._segments.active
            data = active.record_of(active.next_seq, frame)
            try:
                if active.frames and active.size + len(data) > self._limits.segment_bytes:
                    self._begin_segment()
                    active = self._segments.active
                    data = active.record_of(active.next_seq, frame)
                seq = active.next_seq
                if not self._make_room(len(data)):
                    self._refuse("it is full", held=held)
                    return None
                self._with_room(partial(active.append, data, held=held))
            except OSError as exc:
                self._refuse(exc.strerror or str(exc), held=held)
                return None
            self._spooled += 1
            self._unsynced.add(active)
            return seq

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, once the oldest frames have fallen out if they may."""
        while self._segments.bytes + size > self._limits.most_bytes:
            if self._limits.first == "newest" or not self._drop_oldest():
                return False
        return True

    def _with_room(self, write: Callable[[], T]) -> T:
        """What a call gives that writes. On a full disk the oldest frames make room, if they may.

        Raises:
            OSError: it cannot be written.
        """
        while True:
            try:
                return write()
            except OSError as exc:
                if exc.errno not in FULL or self._limits.first == "newest" or not self._drop_oldest():
                    raise

    def _drop_oldest(self) -> bool:
        """Let the oldest file fall out; never the one that is written."""
        if len(self._segments) < 2:
            return False
        oldest = self._segments.oldest
        self._dropped += oldest.waiting + oldest.held
        self._complaints.say(f"{oldest.waiting + oldest.held} of the oldest frames fall out, to make room")
        self._remove(oldest)
        return True

    def _refuse(self, why: str, *, held: bool) -> None:
        self._dropped += not held
        self._complaints.say(f"a frame cannot be kept: {why}; {self._dropped} are lost so far")

    def release(self, seq: int) -> None:
        """A frame that was held is to be sent from here on."""
        with self._changing():
            if (segment := self._segments.of(seq)) is not None:
                segment.release(seq)

    def take(self, most: int, most_bytes: int, without: Collection[str] = ()) -> list[Kept]:
        """The next frames to send, in order, all of one bundle. They stay in the spool until `done`.

        Args:
            most: frames, at least 1.
            most_bytes: of their payloads; one frame may have more.
            without: bundles whose frames are passed over.
        """
        with self._changing():
            self._drop_old()
            now_s = time.time()
            return self._segments.take(
                most, most_bytes, frozenset(without),
                too_old=lambda captured_us: self._limits.too_old(now_s, captured_us), fall_out=self._fall_out,
            )  # fmt: skip

    def _fall_out(self, segment: Segment, seqs: Collection[int]) -> None:
        self._dropped += segment.done(seqs)
        self._unsynced.add(segment)

    def done(self, seqs: Iterable[int]) -> None:
        """These frames were answered, and the answers were handed out."""
        with self._changing():
            for seq in seqs:
                if self._usable and (segment := self._segments.of(seq)) is not None:
                    self._sent += segment.done([seq])
                    self._unsynced.add(segment)
                    if not segment.waiting and not segment.held and segment is not self._segments.active:
                        self._remove(segment)

    def has_waiting(self, without: Collection[str] = ()) -> bool:
        """Whether a frame is to be sent, bundles to be passed over left out."""
        with self._mutex:
            return self._segments.has_waiting(without)

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
                with self._changing():
                    if not self._usable:
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
        with self._changing():
            if not self._usable:
                return
            self._drop_old()
            active = self._segments.active
            if active.waiting or active.held or active.size <= _TIDY_BYTES:
                return
            try:
                self._begin_segment()
            except OSError:
                return  # no room: it stays until there is some
        synced = self.sync()  # whoever puts a frame meanwhile must not wait for the disk
        with self._changing():
            if synced and self._usable and active in self._segments:
                self._remove(active)

    def close(self) -> None:
        """Bring everything to the disk, and let others use the spool."""
        self.sync()
        with self._syncing, self._changing():
            was_usable, self._closed = self._usable, True
            if not was_usable:
                return
            if self._ready is not None:
                self._ready.remove()
            self._segments.close()
            os.close(self._lock_descriptor)

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._unsynced.discard(segment)

    def _drop_old(self) -> None:
        while len(self._segments) > 1 and self._limits.too_old(time.time(), self._segments.oldest.newest_us):
            self._drop_oldest()


_SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has the latter only
