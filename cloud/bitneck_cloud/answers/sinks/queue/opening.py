"""The queue's file is opened, made, or brought to this version; nobody else may use it meanwhile.

answers(id, at, block, wants, stream, seq, number, body)
                               a log of documents, in the order of answering, each until no sink wants it
sinks(slot, name, cursor)      each sink, and the row up to which it has passed the log
streams(stream, seqs, at)      which frames were answered before: a repeat is not queued again
refused(sink, id, at, reason, body)   the newest answers that a sink's other side will never take
clients(client, state, at)     the newest states of clients, so that none stays online after this server ended
numbers(name, value)           ``answer``: the largest number of an answer; ``saved``: the row up to which `streams` is

A row's ``wants`` has a bit for each sink that gets this document, by its slot. An answer has one row; two, where some
of the sinks take its map and some do not; and sinks beyond `PER_BLOCK` have rows of their own, with another ``block``.
What the rows after ``saved`` say of streams and numbers is not in their tables yet: they stay until it is.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from bitneck.errors import StateUnusable
from bitneck_cloud.answers.sinks.queue.sole_owner import SoleOwner

__all__ = ["PER_BLOCK", "Opening", "transaction"]

_LOG = logging.getLogger(__name__)

PER_BLOCK = 62
"""Sinks whose bits fit into one row: SQLite's integers have 64 bits, with a sign."""
_APPLICATION = 0x626E5351
"""``PRAGMA application_id`` of our files."""
_VERSION = 2
_TABLES = """
CREATE TABLE answers(
    id INTEGER PRIMARY KEY, at REAL NOT NULL, block INTEGER NOT NULL, wants INTEGER NOT NULL,
    stream TEXT NOT NULL, seq INTEGER NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE sinks(slot INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, cursor INTEGER NOT NULL);
CREATE TABLE refused(
    sink TEXT NOT NULL, id INTEGER NOT NULL, at REAL NOT NULL, reason TEXT NOT NULL, body BLOB, UNIQUE(sink, id));
"""
_OTHER_TABLES = """
CREATE TABLE streams(stream TEXT PRIMARY KEY, seqs TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX streams_by_age ON streams(at);
CREATE TABLE clients(client TEXT PRIMARY KEY, state TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE numbers(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""
_OPEN_S = 3.0
"""Seconds that opening waits for a lock: the server before this one may still be closing the file."""
_BUSY_MS = 100
"""Milliseconds that a commit, and with it a frame, waits for another program's lock, where none could be kept out."""


class Opening:
    """A file that is open for one server, and for nobody else.

    Args:
        path: of the file.
        sync: whether each commit is forced to the disk.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        self._path, self._sync = path, sync
        self._lock = -1
        self._owner: SoleOwner | None = None
        self._db: sqlite3.Connection | None = None

    def open(self) -> sqlite3.Connection:
        """Open or make the file, and bring it to this version.

        Returns:
            A connection for one thread at a time. Each statement is a transaction, unless one is begun.

        Raises:
            StateUnusable: it is another program's, or a newer version's.
            sqlite3.Error: it is damaged, or in use.
            OSError: it cannot be written.
        """
        self._lock = os.open(f"{self._path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise sqlite3.OperationalError("it is locked") from None
        # The answers of all clients: nobody else of this machine reads them.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._owner = SoleOwner(self._path)
        _wait_until_alone(self._owner)
        self._db = db = sqlite3.connect(self._path, isolation_level=None, timeout=_OPEN_S, check_same_thread=False)
        found = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        version = self._version(db) if found else 0
        if not found:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if self._sync else 'NORMAL'}")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # housekeeping does that, beside the commits
        if found and (result := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(f"malformed: {result}")
        if not found:
            marks = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {_TABLES} {_OTHER_TABLES} {marks} COMMIT;")
        elif version == 1:
            _bring_to_2(db)
            _LOG.info("sinks_queue %s is brought from version 1 to version 2", self._path)
        return db

    def keep_others_out(self) -> None:
        """Let no other program open it from now on. For after something was read from it and written to it."""
        assert self._owner is not None
        assert self._db is not None
        self._owner.keep_others_out()
        self._db.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")

    def close(self) -> None:
        """Close the file; the log beside it goes into it. A second call does nothing."""
        if self._owner is not None:
            self._owner.let_others_in()
        if self._db is not None:
            self._db.close()
        if self._owner is not None:
            self._owner.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._db, self._owner, self._lock = None, None, -1

    def unusable(self, exc: Exception) -> StateUnusable:
        """What to tell of an error of opening."""
        text = " ".join(str(exc).split())
        if "locked" in text:
            text += "; another server uses it, or another program has it open: give each server its own file"
        elif "malformed" in text or "not a database" in text:
            text += "; move it away to begin with an empty queue, the answers in it are lost"
        else:
            text += "; it has to be on a local disk that this server may write to"
        return StateUnusable(f"sinks_queue {self._path}: cannot use it ({text})")

    def _version(self, db: sqlite3.Connection) -> int:
        mark = db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0]
        if mark[0] != _APPLICATION:
            raise StateUnusable(f"sinks_queue {self._path} is another program's database; give another path")
        if not 1 <= mark[1] <= _VERSION:
            raise StateUnusable(
                f"sinks_queue {self._path} has version {mark[1]}, this server reads {_VERSION}; move it away to begin "
                "with an empty queue, or run the server that wrote it"
            )
        return int(mark[1])


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """The statements of a block are done together, or none of them.

    Raises:
        sqlite3.Error: the disk fails.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _wait_until_alone(owner: SoleOwner) -> None:
    end = time.monotonic() + _OPEN_S
    while not owner.alone():
        if time.monotonic() > end:
            raise sqlite3.OperationalError("it is locked")
        time.sleep(0.05)


def _bring_to_2(db: sqlite3.Connection) -> None:
    """Version 1 had a row for each sink that waits for an answer, and counted ids by itself. They keep their ids."""
    with transaction(db):
        db.execute("ALTER TABLE answers RENAME TO answers_1")
        db.execute("ALTER TABLE refused RENAME TO refused_1")
        for statement in filter(None, map(str.strip, _TABLES.split(";"))):
            db.execute(statement)
        names = sorted(row[0] for row in db.execute("SELECT DISTINCT sink FROM answers_1"))
        db.executemany("INSERT INTO sinks VALUES (?, ?, 0)", enumerate(names))
        db.execute(
            "INSERT INTO answers SELECT a.id, a.at, s.slot / ?, 1 << (s.slot % ?), '', 0, 0, a.body "
            "FROM answers_1 AS a JOIN sinks AS s ON s.name = a.sink ORDER BY a.id",
            (PER_BLOCK, PER_BLOCK),
        )
        db.execute("INSERT INTO refused SELECT sink, id, at, reason, body FROM refused_1")
        # Ids go on where they were: those of batches must never come again.
        db.execute("INSERT INTO numbers SELECT 'saved', seq FROM sqlite_sequence WHERE name = 'answers_1'")
        db.execute("DROP TABLE answers_1")
        db.execute("DROP TABLE refused_1")
        db.execute(f"PRAGMA user_version = {_VERSION}")
