"""The queue of all sinks in one SQLite file. One thread at a time uses it.

answers(id, sink, at, body)    what waits, in the order of answering
streams(stream, seqs, at)      which frames were answered before: a repeat is not queued again
refused(id, sink, at, reason, body)   the newest answers that a sink's other side will never take
clients(client, state, at)     the newest states of clients, so that none stays online after this server ended
numbers(name, value)           the largest number of an answer
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitneck.errors import MalformedFrame, StateUnusable
from bitneck.text import clean_text
from bitneck_cloud.answers.sinks.seen import Seen
from bitneck_cloud.answers.sinks.sole_owner import SoleOwner
from bitneck_cloud.answers.sinks.state import Bounds, Entry, Held, Queued

__all__ = ["QueueFile"]

_LOG = logging.getLogger(__name__)

_APPLICATION = 0x626E5351
"""``PRAGMA application_id`` of our files."""
_VERSION = 1
_SCHEMA = """
CREATE TABLE answers(id INTEGER PRIMARY KEY AUTOINCREMENT, sink TEXT NOT NULL, at REAL NOT NULL, body BLOB NOT NULL);
CREATE INDEX answers_of_sink ON answers(sink);
CREATE TABLE streams(stream TEXT PRIMARY KEY, seqs TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX streams_by_age ON streams(at);
CREATE TABLE refused(id INTEGER PRIMARY KEY, sink TEXT NOT NULL, at REAL NOT NULL, reason TEXT NOT NULL, body BLOB);
CREATE TABLE clients(client TEXT PRIMARY KEY, state TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE numbers(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
_CHUNK = 256
_SPARE_PAGES = 2048
"""Free pages that the file keeps for what comes; more go back to the file system."""
_COUNT_S = 60.0
_CACHED_STREAMS = 4096
_MOST_STREAMS, _MEMORY_S = 100_000, 7 * 86_400.0
_MOST_REFUSED = 100
_MOST_CLIENTS = 10_000
_ORPHAN_AGE_S = 7 * 86_400.0
_OPEN_S = 3.0
"""Seconds that opening waits for a lock: the server before this one may still be closing the file."""
_BUSY_MS = 100
"""Milliseconds that a commit, and with it a frame, waits for another program's lock, where none could be kept out."""


class QueueFile:
    """The file, opened; every method may raise `sqlite3.Error`, and then has changed nothing.

    Args:
        path: of the file.
        bounds: by sink.
        sync: whether each commit is forced to the disk. Without it, a commit outlives this process, not a power cut.

    Attributes:
        held: what waits, by sink.
        writes: transactions so far.
    """

    def __init__(self, path: Path, bounds: Mapping[str, Bounds], *, sync: bool) -> None:
        self._path, self._bounds, self._sync = path, bounds, sync
        self.writes = 0
        self._lock = -1
        self._owner: SoleOwner | None = None
        self._streams_counted = 0.0
        self.held = {sink: Held() for sink in bounds}
        self._seen: OrderedDict[str, Seen] = OrderedDict()

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
            return self._open(now)
        except (sqlite3.Error, OSError) as exc:
            text = " ".join(str(exc).split())
            if "locked" in text:
                text += "; another server uses it, or another program has it open: give each server its own file"
            elif "malformed" in text or "not a database" in text:
                text += "; move it away to begin with an empty queue, the answers in it are lost"
            else:
                text += "; it has to be on a local disk that this server may write to"
            raise StateUnusable(f"sinks_queue {self._path}: cannot use it ({text})") from exc

    def _open(self, now: float) -> dict[str, int]:
        self._lock = os.open(f"{self._path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise sqlite3.OperationalError("it is locked") from None
        # The answers of all clients: nobody else of this machine reads them.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._owner = SoleOwner(self._path)
        self._wait_until_alone(self._owner)
        # Transactions are begun and ended in `_transaction`.
        self._db = db = sqlite3.connect(self._path, isolation_level=None, timeout=_OPEN_S, check_same_thread=False)
        found = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        mark = db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0]
        if found and mark[0] != _APPLICATION:
            raise StateUnusable(f"sinks_queue {self._path} is another program's database; give another path")
        if found and mark[1] != _VERSION:
            raise StateUnusable(
                f"sinks_queue {self._path} has version {mark[1]}, this server reads {_VERSION}; move it away to begin "
                "with an empty queue, or run the server that wrote it"
            )
        if not found:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if self._sync else 'NORMAL'}")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # housekeeping does that, beside the commits
        if not found:
            marks = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {marks} COMMIT;")
        elif (result := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(f"malformed: {result}")
        db.execute("BEGIN IMMEDIATE")  # takes the lock, and shows whether the file can be written
        for table in ("streams", "clients"):
            db.execute(f"DELETE FROM {table} WHERE at < ?", (now - _MEMORY_S,))  # noqa: S608  one of two names
        marks_of = ",".join("?" * len(self.held))
        db.execute(
            f"DELETE FROM answers WHERE sink NOT IN ({marks_of}) AND at < ?",  # noqa: S608  only question marks
            (*self.held, now - _ORPHAN_AGE_S),
        )
        db.execute("COMMIT")
        self._owner.keep_others_out()
        db.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        others: dict[str, int] = {}
        for sink, count, size in db.execute("SELECT sink, count(*), sum(length(body)) FROM answers GROUP BY sink"):
            if sink in self.held:
                self.held[sink].queued, self.held[sink].bytes = count, size
                self._look_at_oldest(sink)
            else:
                others[sink] = count
        return others

    @staticmethod
    def _wait_until_alone(owner: SoleOwner) -> None:
        end = time.monotonic() + _OPEN_S
        while not owner.alone():
            if time.monotonic() > end:
                raise sqlite3.OperationalError("it is locked")
            time.sleep(0.05)

    def close(self) -> None:
        """Close the file; the log beside it goes into it."""
        if self._owner is not None:
            self._owner.let_others_in()
        with contextlib.suppress(AttributeError):  # not opened
            self._db.close()
        if self._owner is not None:
            self._owner.close()
        self._owner = None
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def begin_log_anew(self) -> None:
        """Copy what is left of the log into the file, and empty it."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def reach(self, number: int) -> None:
        """Remember the number of an answer that no sink wanted.

        Args:
            number: of the answer.
        """
        self._transaction(lambda: self._number(number))

    def last_number(self) -> int:
        """The largest number of an answer that was ever committed or reached; 0 if none was."""
        row = self._db.execute("SELECT value FROM numbers WHERE name = 'answer'").fetchone()
        return int(row[0]) if row else 0

    def add(self, entries: Sequence[Entry], now: float) -> frozenset[str]:
        """Commit answers. Repeats are left out; what is over a sink's bounds falls out, the oldest first.

        Args:
            entries: in the order of answering.
            now: seconds since 1970.

        Returns:
            The sinks that got something.
        """
        streams: dict[str, Seen] = {}
        rows: list[tuple[str, float, bytes]] = []
        sizes: dict[str, list[int]] = {}
        for entry in entries:
            seen = streams.get(entry.stream) or self._seen_of(entry.stream)
            if entry.seq in seen:
                continue
            streams[entry.stream] = seen.with_(entry.seq)
            for sink, body in entry.bodies.items():
                rows.append((sink, now, body))
                sizes.setdefault(sink, []).append(len(body))
        if not streams:
            return frozenset()
        number = max(entry.number for entry in entries)

        def write() -> None:
            self._db.executemany("INSERT INTO answers(sink, at, body) VALUES (?, ?, ?)", rows)
            self._db.executemany(
                "INSERT INTO streams VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET seqs = excluded.seqs, at = excluded.at",
                [(stream, seen.dump(), now) for stream, seen in streams.items()],
            )
            self._number(number)

        self._transaction(write)
        for stream, seen in streams.items():
            self._seen[stream] = seen
            self._seen.move_to_end(stream)
        while len(self._seen) > _CACHED_STREAMS:
            self._seen.popitem(last=False)
        for sink, lengths in sizes.items():
            held = self.held[sink]
            if not held.queued:
                held.oldest_at = now
            held.queued, held.bytes = held.queued + len(lengths), held.bytes + sum(lengths)
            with contextlib.suppress(sqlite3.Error):  # they are committed; the next ones try again to make room
                while held.bytes > self._bounds[sink].most_bytes and self._drop(sink, "bytes", now):
                    pass
        return frozenset(sizes)

    def expire(self, now: float) -> bool:
        """Let fall out what is too old, a bounded part at a time.

        Args:
            now: seconds since 1970.

        Returns:
            Whether there may be more.
        """
        more = [
            self._drop(sink, "age", now)
            for sink, held in self.held.items()
            if held.queued and held.oldest_at < now - self._bounds[sink].age_s
        ]
        if self._db.execute("PRAGMA freelist_count").fetchone()[0] > _SPARE_PAGES:
            self._db.executescript(f"PRAGMA incremental_vacuum({_CHUNK})")  # `execute` would free one page
            self.writes += 1
            more.append(True)
        if now - self._streams_counted > _COUNT_S:
            self._streams_counted = now
            over = self._db.execute("SELECT count(*) FROM streams").fetchone()[0] - _MOST_STREAMS
            if over > 0:
                query = "DELETE FROM streams WHERE stream IN (SELECT stream FROM streams ORDER BY at LIMIT ?)"
                self._db.execute(query, (over,))
        return any(more)

    def take(self, sink: str, most: int, most_bytes: int) -> list[Queued]:
        """The oldest answers of a sink. They stay in the file until `settle`.

        Args:
            sink: name.
            most: answers.
            most_bytes: of their documents; one answer may have more.
        """
        batch: list[Queued] = []
        size = 0
        query = "SELECT id, at, body FROM answers INDEXED BY answers_of_sink WHERE sink = ? ORDER BY id LIMIT ?"
        for row in self._db.execute(query, (sink, most)):
            size += len(row[2])
            if batch and size > most_bytes:
                break
            batch.append(Queued(*row))
        self.held[sink].taken = batch[-1].id if batch else 0
        return batch

    def settle(self, sink: str, batch: Sequence[Queued], settled: Sequence[str], now: float, cut: bool = False) -> None:
        """An attempt is over: forget what is settled, and set aside what was refused.

        Args:
            sink: name.
            batch: what `take` gave.
            settled: one text for each answer from its front: empty if it was delivered, else the reason.
            now: seconds since 1970.
            cut: whether the connection ends at the last one of them: it counts as dropped.
        """
        done = batch[: len(settled)]

        def write() -> None:
            for each, reason in zip(done, settled, strict=True):
                if reason:
                    values = (each.id, sink, now, reason, each.body)
                    self._db.execute("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?, ?)", values)
            if any(settled):
                self._db.execute(
                    "DELETE FROM refused WHERE sink = ? AND id NOT IN "
                    "(SELECT id FROM refused WHERE sink = ? ORDER BY at DESC, id DESC LIMIT ?)",
                    (sink, sink, _MOST_REFUSED),
                )
            self._db.execute("DELETE FROM answers WHERE sink = ? AND id <= ?", (sink, done[-1].id))

        held = self.held[sink]
        try:
            if done:
                self._transaction(write)
                held.dropped["connection"] += cut
                held.queued -= len(done)
                held.bytes -= sum(len(each.body) for each in done)
                self._look_at_oldest(sink)
        finally:
            held.taken = 0

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
        self._db.execute("INSERT OR REPLACE INTO clients VALUES (?, ?, ?)", (client, state, now))

    def clients(self) -> list[str]:
        """The newest states of clients, the newest first, as `keep_client` got them."""
        query = "SELECT state FROM clients ORDER BY at DESC LIMIT ?"
        return [str(row[0]) for row in self._db.execute(query, (_MOST_CLIENTS,))]

    def _seen_of(self, stream: str) -> Seen:
        if (seen := self._seen.get(stream)) is not None:
            return seen
        row = self._db.execute("SELECT seqs FROM streams WHERE stream = ?", (stream,)).fetchone()
        try:
            return Seen.load(row[0]) if row else Seen()
        except MalformedFrame as exc:
            _LOG.error("sinks_queue %s: what %s had answered is unreadable (%s); a repeat of it comes twice",
                       self._path, clean_text(stream), exc)  # fmt: skip
            return Seen()

    def _number(self, number: int) -> None:
        query = "INSERT INTO numbers VALUES ('answer', ?) ON CONFLICT DO UPDATE SET value = max(value, excluded.value)"
        self._db.execute(query, (number,))

    def _look_at_oldest(self, sink: str) -> None:
        query = "SELECT at FROM answers WHERE sink = ? ORDER BY id LIMIT 1"
        row = self._db.execute(query, (sink,)).fetchone()
        self.held[sink].oldest_at = float(row[0]) if row else 0.0

    def _drop(self, sink: str, reason: str, now: float) -> bool:
        """Let a sink's oldest answers fall out that no sender has; whether there were any."""
        held, bounds = self.held[sink], self._bounds[sink]
        query = "SELECT id, at, length(body) FROM answers WHERE sink = ? AND id > ? ORDER BY id LIMIT ?"
        last, count, size = 0, 0, 0
        for identity, at, length in self._db.execute(query, (sink, held.taken, _CHUNK)):
            over = held.bytes - size > bounds.most_bytes if reason == "bytes" else at < now - bounds.age_s
            if not over:
                break
            last, count, size = identity, count + 1, size + length
        if not count:
            return False
        self._transaction(
            lambda: self._db.execute(
                "DELETE FROM answers WHERE sink = ? AND id > ? AND id <= ?", (sink, held.taken, last)
            )
        )
        held.queued, held.bytes = held.queued - count, held.bytes - size
        held.dropped[reason] += count
        self._look_at_oldest(sink)
        return True

    def _transaction(self, write: Callable[[], object]) -> None:
        self.writes += 1
        self._db.execute("BEGIN IMMEDIATE")
        try:
            write()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
