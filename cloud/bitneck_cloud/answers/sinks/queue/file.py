"""The queue of all sinks: a log of answers in one SQLite file. One thread at a time uses it.

A commit appends rows, and touches nothing else; see `bitneck_cloud.answers.sinks.queue.opening` for the tables. A sink
reads on from its cursor, which moves when it has delivered. Housekeeping writes what the newest rows say of repeats and
numbers into tables of their own, and then deletes the rows that no sink wants any more.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from bitneck_cloud.answers.sinks.queue import beside
from bitneck_cloud.answers.sinks.queue.opening import Opening, transaction
from bitneck_cloud.answers.sinks.queue.readers import Reader, load_readers
from bitneck_cloud.answers.sinks.queue.repeats import Repeats
from bitneck_cloud.answers.sinks.queue.seen import Seen
from bitneck_cloud.answers.sinks.queue.sweeping import Unswept, sweep
from bitneck_cloud.answers.sinks.queue.tail import Row, Tail
from bitneck_cloud.answers.sinks.state import Bounds, Entry, Held, Queued

__all__ = ["QueueFile"]

_AT_ONCE = 16
"""Rows that one statement inserts: as fast as one row alone, and no other thread comes between."""
_INSERT = tuple(
    "INSERT INTO answers VALUES "  # noqa: S608  no text from elsewhere
    + ",".join(["(?, ?, ?, ?, ?, ?, ?, ?)"] * rows)
    for rows in range(_AT_ONCE + 1)
)
_MOVE = "UPDATE sinks SET cursor = ? WHERE slot = ?"
_WAITING = "id > ? AND id <= ? AND block = ? AND wants & ? ORDER BY id LIMIT ?"
_NEAR = 1024
"""Rows that are looked at in search of those of one sink, while others wait."""
_CHUNK = 256
_SPARE_PAGES = 2048
"""Free pages that the file keeps for what comes; more go back to the file system."""
_COUNT_S = 60.0


class QueueFile:
    """The file, opened; every method may raise `sqlite3.Error`, and then has changed nothing.

    Args:
        path: of the file.
        bounds: by sink.
        sync: whether each commit is forced to the disk. Without it, a commit outlives this process, not a power cut.

    Attributes:
        held: what waits, by sink.
    """

    def __init__(self, path: Path, bounds: Mapping[str, Bounds], *, sync: bool) -> None:
        self._bounds = bounds
        self.held = {sink: Held() for sink in bounds}
        self._opening = Opening(path, sync=sync)
        self._readers: dict[str, Reader] = {}
        self._wants: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # blocks and their bits, by names of sinks
        self._repeats, self._tail, self._unswept = Repeats(path), Tail(), Unswept()
        self._last = self._number = 0
        self._streams_counted = 0.0
        self._freed = 0

    def open(self, now: float) -> dict[str, int]:
        """Open or make the file, and count what waits.

        Args:
            now: seconds since 1970.

        Returns:
            How many answers wait for sinks that are not set up any more.

        Raises:
            StateUnusable: it is damaged, another program's, a newer version's, in use, or cannot be written.
        """
        try:
            self._db = self._opening.open()
            with transaction(self._db):  # takes the lock, and shows whether the file can be written
                self._load(now)
            self._opening.keep_others_out()
            for name, reader in self._readers.items():
                while name not in self._bounds and self._is_old(reader, now) and self._drop(reader, "age", now):
                    pass
        except (sqlite3.Error, OSError) as exc:
            raise self._opening.unusable(exc) from exc
        others = {name: reader.held.queued for name, reader in self._readers.items() if name not in self._bounds}
        return {name: queued for name, queued in others.items() if queued}

    def close(self) -> None:
        """Close the file; the log beside it goes into it."""
        self._opening.close()

    @property
    def writes(self) -> int:
        """Changes so far."""
        return self._db.total_changes + self._freed

    def begin_log_anew(self) -> None:
        """Copy what is left of SQLite's log into the file, and empty it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def last_number(self) -> int:
        """The largest number of an answer that was ever committed, or saved; 0 if none was."""
        return self._number

    def add(self, entries: Sequence[Entry], now: float) -> frozenset[str]:
        """Commit answers. Repeats are left out; what is over a sink's bounds falls out, the oldest first.

        Args:
            entries: in the order of answering.
            now: seconds since 1970.

        Returns:
            The sinks that got something.
        """
        streams: dict[str, Seen] = {}
        rows: list[Row] = []
        kept: list[Entry] = []
        last, number = self._last, max(entry.number for entry in entries)
        for entry in entries:
            stream, seq = entry.stream, entry.seq
            seen = streams.get(stream) or self._repeats.of(self._db, stream)
            if seq in seen:
                continue
            streams[stream] = seen.with_(seq)
            for sinks, body in entry.bodies:
                for block, wants in self._wants_of(sinks):
                    last += 1
                    rows.append((last, now, block, wants, stream, seq, number, body))
            kept.append(entry)
        if not rows:
            return frozenset()
        if len(rows) <= _AT_ONCE:
            self._insert(rows)
        else:
            with transaction(self._db):
                for first in range(0, len(rows), _AT_ONCE):
                    self._insert(rows[first : first + _AT_ONCE])
        self._last, self._number = last, max(self._number, number)
        self._repeats.put(streams)
        self._tail.add(rows)
        told: set[str] = set()
        for entry in kept:
            for sinks, body in entry.bodies:
                told.update(sinks)
                for sink in sinks:
                    held = self.held[sink]
                    if not held.queued:
                        held.oldest_at = now
                    held.queued += 1
                    held.bytes += len(body)
        for sink in told:
            if self.held[sink].bytes > self._bounds[sink].most_bytes:
                self._make_room(self._readers[sink], now)
        return frozenset(told)

    def save(self, reached: int, now: float) -> bool:
        """Write what the log says of repeats and numbers into their tables, a bounded part at a time.

        Rows may be deleted after it. After a kill, what was not saved is read from the rows.

        Args:
            reached: the largest number of an answer, also of those that no sink wanted.
            now: seconds since 1970.

        Returns:
            Whether there is more.
        """
        self._number = max(self._number, reached)
        more = self._repeats.save(self._db, self._last, self._number, now)
        for reader in self._readers.values():
            if reader.cursor > reader.stored + _NEAR:  # else a start would look at all these rows again
                self._db.execute(_MOVE, (reader.cursor, reader.slot))
                reader.stored = reader.cursor
        return more

    def expire(self, now: float) -> bool:
        """Delete what nobody wants, and let fall out what is too old; a bounded part at a time.

        Args:
            now: seconds since 1970.

        Returns:
            Whether there may be more.
        """
        more = [self._drop(reader, "age", now) for reader in self._readers.values() if self._is_old(reader, now)]
        more.append(sweep(self._db, self._readers.values(), self._unswept, self._repeats.saved))
        if self._db.execute("PRAGMA freelist_count").fetchone()[0] > _SPARE_PAGES:
            self._db.executescript(f"PRAGMA incremental_vacuum({_CHUNK})")  # `execute` would free one page
            self._freed += 1
            more.append(True)
        if now - self._streams_counted > _COUNT_S:
            self._streams_counted = now
            self._repeats.forget(self._db)
        return any(more)

    def take(self, sink: str, most: int, most_bytes: int) -> list[Queued]:
        """The oldest answers of a sink. They stay in the file until `settle`.

        Args:
            sink: name.
            most: answers.
            most_bytes: of their documents; one answer may have more.

        Returns:
            In order. There may be none though some wait, where many rows before them are of other sinks: the next call
            looks further.
        """
        reader, size = self._readers[sink], 0
        batch: list[Queued] = []
        held = reader.held
        held.taken = reader.ahead = 0
        if not held.queued:
            reader.cursor = self._last
            return []
        in_tail = self._tail.has(reader)
        for each in self._tail.read(reader) if in_tail else self._read(reader, most):
            size += len(each.body)
            if len(batch) == most or (batch and size > most_bytes):
                break
            batch.append(each)
        if batch:
            held.taken, held.oldest_at = batch[-1].id, batch[0].at
            return batch
        reader.cursor = self._last if in_tail else self._near(reader, reader.cursor)
        if reader.cursor >= self._last:
            held.queued = held.bytes = 0
        return []

    def settle(self, sink: str, batch: Sequence[Queued], settled: Sequence[str], now: float, cut: bool = False) -> None:
        """An attempt is over: forget what is settled, and set aside what was refused.

        Args:
            sink: name.
            batch: what `take` gave.
            settled: one text for each answer from its front: empty if it was delivered, else the reason.
            now: seconds since 1970.
            cut: whether the connection ends at the last one of them: it counts as dropped.
        """
        done, reader = batch[: len(settled)], self._readers[sink]
        held = reader.held
        try:
            if not done:
                return
            if any(settled):
                with transaction(self._db):
                    refused = [(each, why) for each, why in zip(done, settled, strict=True) if why]
                    beside.set_aside(self._db, sink, refused, now)
                    self._db.execute(_MOVE, (done[-1].id, reader.slot))
            else:
                self._db.execute(_MOVE, (done[-1].id, reader.slot))
            held.dropped["connection"] += cut
            self._passed(reader, done[-1].id, len(done), sum(len(each.body) for each in done))
        finally:
            held.taken = reader.ahead = 0

    def lost(self, counts: Mapping[str, int], reason: str) -> None:
        """Count answers that fell out before they had a place in the file.

        Args:
            counts: how many, by sink.
            reason: one of `DROPPED`.
        """
        for sink, count in counts.items():
            self.held[sink].dropped[reason] += count

    def keep_client(self, client: str, state: str, now: float) -> None:
        """Remember a client's newest state, for a week.

        Args:
            client: its name.
            state: JSON.
            now: seconds since 1970.
        """
        beside.keep_client(self._db, client, state, now)

    def clients(self) -> list[str]:
        """The newest states of clients, the newest first, as `keep_client` got them."""
        return beside.client_states(self._db)

    def _load(self, now: float) -> None:
        self._repeats.load(self._db, now)
        saved = self._repeats.saved
        last, number = self._db.execute("SELECT max(id), max(number) FROM answers WHERE id > ?", (saved,)).fetchone()
        self._last, self._number = last or saved, max(self._repeats.number, number or 0)
        beside.forget_clients(self._db, now)
        self._readers = load_readers(self._db, self._bounds, self.held, self._last)
        self._tail.begin(self._last)
        for reader in self._readers.values():
            while not self._look_at_oldest(reader):
                pass
        for (block,) in self._db.execute("SELECT DISTINCT block FROM answers"):
            self._unswept.add(block, 0, self._last)  # what was passed when the server before this one ended

    def _wants_of(self, sinks: tuple[str, ...]) -> list[tuple[int, int]]:
        """Blocks, and the bits of sinks in each."""
        if (found := self._wants.get(sinks)) is None:
            blocks: dict[int, int] = {}
            for reader in map(self._readers.__getitem__, sinks):
                blocks[reader.block] = blocks.get(reader.block, 0) | reader.bit
            if len(self._wants) >= _CHUNK:
                self._wants.clear()
            found = self._wants[sinks] = list(blocks.items())
        return found

    def _insert(self, rows: Sequence[Row]) -> None:
        self._db.execute(_INSERT[len(rows)], list(chain.from_iterable(rows)))

    def _read(self, reader: Reader, most: int) -> Iterator[Queued]:
        """What waits for a sink in the file, up to `near`."""
        query = f"SELECT id, at, body FROM answers WHERE {_WAITING}"  # noqa: S608  no text from elsewhere
        bound = self._near(reader, reader.cursor)
        for row in self._db.execute(query, (reader.cursor, bound, reader.block, reader.bit, most)):
            yield Queued(*row)

    def _near(self, reader: Reader, after: int) -> int:
        """Id of a row up to which rows of a sink can be searched for while others wait: some thousand are too many."""
        if reader.near <= after:
            query = "SELECT id FROM answers WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?"
            row = self._db.execute(query, (after, _NEAR - 1)).fetchone()
            reader.near = row[0] if row else self._last + _NEAR  # those that come have ids without gaps
        return min(reader.near, self._last)

    def _passed(self, reader: Reader, last: int, count: int, size: int) -> None:
        """A sink's cursor has moved, in the file too."""
        self._unswept.add(reader.block, reader.cursor, last)
        reader.cursor = reader.stored = last
        reader.held.queued, reader.held.bytes = reader.held.queued - count, reader.held.bytes - size
        if not self._look_at_oldest(reader):
            self._look_at_oldest(reader)  # where that is not enough, it stays what it was until the next batch

    def _look_at_oldest(self, reader: Reader) -> bool:
        """Note when the oldest that waits was committed; False where it has to be looked for further on."""
        held = reader.held
        query = f"SELECT at FROM answers WHERE {_WAITING}"  # noqa: S608  no text from elsewhere
        if not held.queued:
            held.oldest_at = 0.0
        elif self._tail.has(reader):
            held.oldest_at = next((each.at for each in self._tail.read(reader)), 0.0)
        else:
            near = self._near(reader, reader.cursor)
            row = self._db.execute(query, (reader.cursor, near, reader.block, reader.bit, 1)).fetchone()
            if row is None:
                reader.cursor = near
                return False
            held.oldest_at = float(row[0])
        return True

    @staticmethod
    def _is_old(reader: Reader, now: float) -> bool:
        return bool(reader.held.queued) and reader.held.oldest_at < now - reader.bounds.age_s

    def _make_room(self, reader: Reader, now: float) -> None:
        with contextlib.suppress(sqlite3.Error):  # they are committed; the next ones try again to make room
            while reader.held.bytes > reader.bounds.most_bytes and self._drop(reader, "bytes", now):
                pass

    def _drop(self, reader: Reader, reason: str, now: float) -> bool:
        """Let a sink's oldest answers fall out that no sender has, or look for them; whether there may be more."""
        held, bounds = reader.held, reader.bounds
        after = max(reader.cursor, held.taken, reader.ahead)
        bound = self._near(reader, after)
        query = f"SELECT id, at, length(body) FROM answers WHERE {_WAITING}"  # noqa: S608  likewise
        last, count, size, found = bound, 0, 0, False
        for identity, at, length in self._db.execute(query, (after, bound, reader.block, reader.bit, _CHUNK)):
            found = True
            over = held.bytes - size > bounds.most_bytes if reason == "bytes" else at < now - bounds.age_s
            if not over:
                break
            last, count, size = identity, count + 1, size + length
        if not count and (found or bound >= self._last):
            return False
        if held.taken:
            if count:  # what the sender has stays between the cursor and these
                clear = "UPDATE answers SET wants = wants & ~? WHERE id > ? AND id <= ? AND block = ? AND wants & ?"
                self._db.execute(clear, (reader.bit, after, last, reader.block, reader.bit))
                self._tail.begin(self._last)
                self._unswept.add(reader.block, after, last)
                held.queued, held.bytes = held.queued - count, held.bytes - size
            reader.ahead = last
        elif count:
            self._db.execute(_MOVE, (last, reader.slot))
            self._passed(reader, last, count, size)
        else:
            reader.cursor = last
        held.dropped[reason] += count
        return True
