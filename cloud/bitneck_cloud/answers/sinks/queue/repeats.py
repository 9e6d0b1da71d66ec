"""Which frames were answered before. The newest of that is in the log; the rest is written once a second."""

import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from bitneck.errors import MalformedFrame
from bitneck.text import clean_text
from bitneck_cloud.answers.sinks.queue.opening import transaction
from bitneck_cloud.answers.sinks.queue.seen import Seen

__all__ = ["Repeats"]

_LOG = logging.getLogger(__name__)

_CACHED = 4096
_PART = 32
"""Streams that are written while a commit may wait, by one statement: no other thread comes between its rows."""
_MOST, _MEMORY_S = 100_000, 7 * 86_400.0


class Repeats:
    """The numbers of each session and spool, in memory and in the table `streams`.

    Args:
        path: of the file, for the log.

    Attributes:
        saved: id of the row up to which the tables hold what the log says. These rows may go.
        number: the largest number of an answer in the tables.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._unsaved: dict[str, None] = {}
        self._writing: list[str] = []  # what is left of those that were unsaved when writing began
        self._reached = (0, 0)
        self.saved = self.number = 0

    def load(self, db: sqlite3.Connection, now: float) -> None:
        """Read what the log says since the tables were written. Within a transaction."""
        numbers = dict(db.execute("SELECT name, value FROM numbers").fetchall())
        self.saved, self.number = int(numbers.get("saved", 0)), int(numbers.get("answer", 0))
        db.execute("DELETE FROM streams WHERE at < ?", (now - _MEMORY_S,))
        for stream, seq in db.execute("SELECT stream, seq FROM answers WHERE id > ? ORDER BY id", (self.saved,)):
            self.put({stream: self.of(db, stream).with_(seq)})

    def of(self, db: sqlite3.Connection, stream: str) -> Seen:
        """The numbers of a session or spool."""
        if (seen := self._seen.get(stream)) is not None:
            return seen
        row = db.execute("SELECT seqs FROM streams WHERE stream = ?", (stream,)).fetchone()
        try:
            return Seen.load(row[0]) if row else Seen()
        except MalformedFrame as exc:
            _LOG.error("sinks_queue %s: what %s had answered is unreadable (%s); a repeat of it comes twice",
                       self._path, clean_text(stream), exc)  # fmt: skip
            return Seen()

    def put(self, streams: Mapping[str, Seen]) -> None:
        """What is in the log now."""
        for stream, seen in streams.items():
            self._seen[stream] = seen
            self._seen.move_to_end(stream)
            self._unsaved[stream] = None

    def save(self, db: sqlite3.Connection, last: int, number: int, now: float) -> bool:
        """Write what is new to the tables, a bounded part at a time.

        Args:
            db: the file.
            last: id of the log's last row.
            number: the largest number of an answer.
            now: seconds since 1970.

        Returns:
            Whether there is more.

        Raises:
            sqlite3.Error: the disk fails; it is tried again at the next call.
        """
        if not self._writing:
            if not self._unsaved and (last, number) == (self.saved, self.number):
                return False
            self._writing, self._unsaved, self._reached = list(self._unsaved), {}, (last, number)
        part, rest = self._writing[:_PART], self._writing[_PART:]
        # A stream may be ahead of the log's place that is written last: what it then gets again it knows.
        with transaction(db):
            if part:
                values = ",".join(["(?, ?, ?)"] * len(part))
                rows = [value for stream in part for value in (stream, self._seen[stream].dump(), now)]
                db.execute(f"INSERT OR REPLACE INTO streams VALUES {values}", rows)  # noqa: S608  only question marks
            if not rest:
                db.execute("INSERT OR REPLACE INTO numbers VALUES ('saved', ?), ('answer', ?)", self._reached)
        self._writing = rest
        if not rest:
            self.saved, self.number = self._reached
            while len(self._seen) > _CACHED and next(iter(self._seen)) not in self._unsaved:
                self._seen.popitem(last=False)
        return bool(rest)

    @staticmethod
    def forget(db: sqlite3.Connection) -> None:
        """Forget the oldest where there are too many."""
        over = db.execute("SELECT count(*) FROM streams").fetchone()[0] - _MOST
        if over > 0:
            query = "DELETE FROM streams WHERE stream IN (SELECT stream FROM streams ORDER BY at LIMIT ?)"
            db.execute(query, (over,))
