"""What the queue's file keeps beside the log: refused answers, and the states of clients."""

import sqlite3
from collections.abc import Sequence

from bitneck_cloud.answers.sinks.state import Queued

__all__ = ["client_states", "forget_clients", "keep_client", "set_aside"]

_MOST_REFUSED = 100
_MOST_CLIENTS = 10_000
_MEMORY_S = 7 * 86_400.0


def set_aside(db: sqlite3.Connection, sink: str, refused: Sequence[tuple[Queued, str]], now: float) -> None:
    """Keep answers that a sink's other side will never take; only the newest. Within a transaction.

    Args:
        db: the file.
        sink: name.
        refused: each with the reason.
        now: seconds since 1970.
    """
    db.executemany(
        "INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?, ?)",
        [(sink, each.id, now, reason, each.body) for each, reason in refused],
    )
    db.execute(
        "DELETE FROM refused WHERE sink = ? AND id NOT IN "
        "(SELECT id FROM refused WHERE sink = ? ORDER BY at DESC, id DESC LIMIT ?)",
        (sink, sink, _MOST_REFUSED),
    )


def keep_client(db: sqlite3.Connection, client: str, state: str, now: float) -> None:
    """Remember a client's newest state, for a week.

    Args:
        db: the file.
        client: its name.
        state: JSON.
        now: seconds since 1970.
    """
    db.execute("INSERT OR REPLACE INTO clients VALUES (?, ?, ?)", (client, state, now))


def client_states(db: sqlite3.Connection) -> list[str]:
    """The newest states of clients, the newest first, as `keep_client` got them."""
    query = "SELECT state FROM clients ORDER BY at DESC LIMIT ?"
    return [str(row[0]) for row in db.execute(query, (_MOST_CLIENTS,))]


def forget_clients(db: sqlite3.Connection, now: float) -> None:
    """Forget what is older than a week; `now` is in seconds since 1970."""
    db.execute("DELETE FROM clients WHERE at < ?", (now - _MEMORY_S,))
