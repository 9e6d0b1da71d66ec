"""The state database: an SQLite file on a local disk, which one server owns. Everything here blocks.

The file's ``application_id`` says that it is ours, its ``user_version`` which schema it has. A newer schema says in
``meta`` how old a program may be that still reads and writes it: new tables, and new columns that have defaults, need
no new program. So a server can go back to an older version.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Self, get_args

from bitneck.errors import BitneckError, StateUnusable
from bitneck_cloud.fleet.patterns import Groups, Pattern
from bitneck_cloud.fleet.records import BundleChoice, BundleKind, ClientRecord, RateChange
from bitneck_cloud.fleet.rules import RateRule
from bitneck_cloud.fleet.tables import policy_dict, policy_of

__all__ = ["MAX_CHANGES", "StateFile"]

MAX_CHANGES = 500
"""Changes of rules that are kept. The audit log has all of them."""

_APPLICATION_ID = 0x62746E6B  # "btnk"
_SCHEMA = 2
_BUSY_S = 2.0
"""A server that is replaced may still be closing the file."""

_CREATE = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "INSERT INTO meta VALUES ('oldest_program', '1')",
    "CREATE TABLE rate_rules (model TEXT NOT NULL, clients TEXT NOT NULL, policy TEXT NOT NULL, since TEXT NOT NULL,"
    " by TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (model, clients))",
    "CREATE TABLE rate_changes (number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT NOT NULL)",
    "CREATE TABLE clients (client TEXT NOT NULL, model TEXT NOT NULL, caller TEXT NOT NULL, point TEXT NOT NULL,"
    " last_seen REAL NOT NULL, frames INTEGER NOT NULL, payload_bytes INTEGER NOT NULL,"
    " link_bytes_up INTEGER NOT NULL, link_bytes_down INTEGER NOT NULL, faults INTEGER NOT NULL,"
    " PRIMARY KEY (client, model))",
    f"PRAGMA application_id = {_APPLICATION_ID}",
)
_CREATE_2 = (
    "CREATE TABLE bundle_choices (model TEXT NOT NULL, kind TEXT NOT NULL, base TEXT NOT NULL, bundle TEXT"
    " NOT NULL, bundle_id TEXT NOT NULL, clients TEXT NOT NULL, since TEXT NOT NULL, by TEXT NOT NULL,"
    " PRIMARY KEY (model, kind))",
    f"PRAGMA user_version = {_SCHEMA}",
)
_COLUMNS = [field.name for field in fields(ClientRecord) if field.name != "connected"]
_NAMES = ", ".join(_COLUMNS)
_CHOICE = [field.name for field in fields(BundleChoice)]
_CHOICE_NAMES = ", ".join(_CHOICE)


class StateFile:
    """An open state database. One thread uses it.

    Args:
        connection: to the file.
        path: of the file, for messages.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the file, or make it. It stays locked until `close`, so a second server cannot open it.

        Raises:
            StateUnusable: it cannot be read or written, is damaged, is another program's, has a schema that is too
                new, or is open elsewhere.
        """
        connection: sqlite3.Connection | None = None
        try:
            if not path.exists():
                path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            state = cls(connection, path)
            state._prepare()
        except (sqlite3.Error, OSError, BitneckError) as exc:
            if connection is not None:
                connection.close()
            if isinstance(exc, BitneckError):
                raise
            raise _refused(path, exc) from exc
        return state

    def _prepare(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        (owner,) = run("PRAGMA application_id").fetchone()
        (schema,) = run("PRAGMA user_version").fetchone()
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if owner != _APPLICATION_ID and tables:
            raise StateUnusable(
                f"state_db {self._path} is a database of another program (application_id {owner:#x}, expected "
                f"{_APPLICATION_ID:#x}); give the path of a file of its own"
            )
        if schema > _SCHEMA:
            row = run("SELECT value FROM meta WHERE key = 'oldest_program'").fetchone()
            if row is None or int(row[0]) > _SCHEMA:
                raise StateUnusable(
                    f"state_db {self._path} was written by a newer version of bitneck (schema {schema}, this one "
                    f"has {_SCHEMA}); update this server, or give another path"
                )
        (found,) = run("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _refused(self._path, found)
        (mode,) = run("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StateUnusable(f"state_db {self._path}: this file system has no write-ahead log; use a local disk")
        run("PRAGMA synchronous = FULL")
        with self._transaction():  # also shows that it can be written, and locks it
            if not tables:
                for statement in _CREATE:
                    run(statement)
            if schema < 2:
                for statement in _CREATE_2:
                    run(statement)
            run("INSERT OR REPLACE INTO meta VALUES ('opened', datetime('now'))")

    def rules(self, groups: Groups) -> list[RateRule]:
        """The kept rules. A group that is not there any more stands for nobody.

        Raises:
            StateUnusable: a row that this program cannot have written.
        """
        query = "SELECT model, clients, policy, since, by, number FROM rate_rules"
        try:
            return [
                RateRule(
                    model=Pattern(model), clients=groups.clients(clients, known=False), policy=policy_of(policy),
                    since=since, by=by, number=number,
                )
                for model, clients, policy, since, by, number in self._connection.execute(query)
            ]  # fmt: skip
        except (sqlite3.Error, ValueError, TypeError, AttributeError, BitneckError) as exc:
            raise _refused(self._path, f"a rule cannot be read: {exc}") from exc

    def changes(self) -> list[RateChange]:
        """The kept changes of rules, the oldest first.

        Raises:
            StateUnusable: a row that this program cannot have written.
        """
        try:
            rows = self._connection.execute("SELECT change FROM rate_changes ORDER BY number")
            return [RateChange(**json.loads(change)) for (change,) in rows]
        except (sqlite3.Error, ValueError, TypeError) as exc:
            raise _refused(self._path, f"a change cannot be read: {exc}") from exc

    def clients(self) -> list[ClientRecord]:
        """The kept clients.

        Raises:
            StateUnusable: they cannot be read.
        """
        try:
            rows = self._connection.execute(f"SELECT {_NAMES} FROM clients")  # noqa: S608  names of ours
            return [ClientRecord(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]
        except sqlite3.Error as exc:
            raise _refused(self._path, exc) from exc

    def save_rule(self, key: tuple[str, str], rule: RateRule | None, change: RateChange) -> None:
        """Set or delete a rule, and keep the change.

        Args:
            key: the rule's.
            rule: None to delete it.
            change: what is remembered of it.

        Raises:
            StateUnusable: it could not be written; nothing is changed.
        """
        with self._transaction():
            run = self._connection.execute
            self._set_rule(key, rule)
            run("INSERT INTO rate_changes (change) VALUES (?)", (json.dumps(asdict(change)),))
            run("DELETE FROM rate_changes WHERE number <= (SELECT max(number) FROM rate_changes) - ?", (MAX_CHANGES,))

    def take_back(self, key: tuple[str, str], rule: RateRule | None, change: RateChange) -> None:
        """Undo `save_rule`, if it was done.

        Args:
            key: the rule's.
            rule: what it was before; None if there was none.
            change: what is not to be remembered.

        Raises:
            StateUnusable: it could not be written; nothing is changed.
        """
        with self._transaction():
            self._set_rule(key, rule)
            newest = "number = (SELECT max(number) FROM rate_changes)"
            query = f"DELETE FROM rate_changes WHERE {newest} AND change = ?"  # noqa: S608  no text from elsewhere
            self._connection.execute(query, (json.dumps(asdict(change)),))

    def _set_rule(self, key: tuple[str, str], rule: RateRule | None) -> None:
        run = self._connection.execute
        run("DELETE FROM rate_rules WHERE model = ? AND clients = ?", key)
        if rule is not None:
            policy = json.dumps(policy_dict(rule.policy))
            run(
                "INSERT INTO rate_rules (model, clients, policy, since, by, number) VALUES (?, ?, ?, ?, ?, ?)",
                (*key, policy, rule.since, rule.by, rule.number),
            )

    def choices(self) -> list[BundleChoice]:
        """The kept choices of bundles.

        Raises:
            StateUnusable: they cannot be read.
        """
        try:
            rows = self._connection.execute(f"SELECT {_CHOICE_NAMES} FROM bundle_choices")  # noqa: S608  names of ours
            found = [BundleChoice(**dict(zip(_CHOICE, row, strict=True))) for row in rows]
        except sqlite3.Error as exc:
            raise _refused(self._path, exc) from exc
        texts = all(isinstance(getattr(choice, name), str) for choice in found for name in _CHOICE)
        if not texts or any(choice.kind not in get_args(BundleKind) for choice in found):
            raise _refused(self._path, "a choice of a bundle cannot be read")
        return found

    def save_choices(self, model: str, choices: Iterable[BundleChoice]) -> None:
        """Keep these choices of a model in place of those before.

        Raises:
            StateUnusable: they could not be written; nothing is changed.
        """
        marks = ", ".join("?" for _ in _CHOICE)
        with self._transaction():
            self._connection.execute("DELETE FROM bundle_choices WHERE model = ?", (model,))
            self._connection.executemany(
                f"INSERT INTO bundle_choices ({_CHOICE_NAMES}) VALUES ({marks})",  # noqa: S608  names of ours
                ([getattr(choice, name) for name in _CHOICE] for choice in choices),
            )

    def save_clients(self, changed: Iterable[ClientRecord], gone: Iterable[tuple[str, str]]) -> None:
        """Write records of clients, and delete others.

        Raises:
            StateUnusable: they could not be written; nothing is changed.
        """
        marks = ", ".join("?" for _ in _COLUMNS)
        with self._transaction():
            self._connection.executemany("DELETE FROM clients WHERE client = ? AND model = ?", gone)
            self._connection.executemany(
                f"INSERT OR REPLACE INTO clients ({_NAMES}) VALUES ({marks})",  # noqa: S608  names of ours
                ([getattr(record, name) for name in _COLUMNS] for record in changed),
            )

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # of some errors, such as a full disk, SQLite has done it itself
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as exc:
            raise _refused(self._path, exc) from exc


def _refused(path: Path, cause: object) -> StateUnusable:
    text = " ".join(str(cause).split())
    if isinstance(cause, OSError):
        return StateUnusable(f"state_db {path}: {cause.strerror}; its folder must be there, and this user may write it")
    if isinstance(cause, sqlite3.OperationalError):
        if "locked" in text:
            return StateUnusable(f"state_db {path} is open in another process; each server needs a file of its own")
        if any(word in text for word in ("readonly", "full", "unable to open", "disk I/O")):
            return StateUnusable(f"state_db {path}: {text}; is the disk full, or may this user not write there?")
    return StateUnusable(
        f"state_db {path} is damaged, or no state database ({text}); move it away to begin with an empty one, or put "
        "a copy back"
    )
