"""The sinks as readers of the log: each has a slot, a cursor, and what waits behind that."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitneck_cloud.answers.sinks.queue.opening import PER_BLOCK
from bitneck_cloud.answers.sinks.state import Bounds, Held

__all__ = ["Reader", "load_readers"]

_ORPHAN = Bounds(most_bytes=1 << 62, age_s=7 * 86_400.0)
"""What may wait for a sink that is not set up any more, in case that it comes back."""


@dataclass(slots=True)
class Reader:
    """A sink that reads the log.

    Attributes:
        name: of the sink.
        slot: of its bit; no other sink has it.
        cursor: id of a row; no row up to it waits for the sink.
        bounds: what may wait.
        held: what waits.
        stored: the cursor in the file. It may be behind, where the rows between are not for this sink.
        near: id of a row that is so near behind the cursor that all between can be looked at while others wait.
        ahead: id of a row up to which nothing has to fall out while a sender has what comes before.
        block: of its slot.
        bit: of its slot, in the block's rows.
    """

    name: str
    slot: int
    cursor: int
    bounds: Bounds
    held: Held
    stored: int = field(init=False)
    near: int = 0
    ahead: int = 0
    block: int = field(init=False)
    bit: int = field(init=False)

    def __post_init__(self) -> None:
        self.stored = self.cursor
        self.block, place = divmod(self.slot, PER_BLOCK)
        self.bit = 1 << place


def load_readers(
    db: sqlite3.Connection, bounds: Mapping[str, Bounds], held: Mapping[str, Held], last: int
) -> dict[str, Reader]:
    """All sinks of a file, also those that are not set up any more. A new one begins behind the last row.

    Within a transaction.

    Args:
        db: the file.
        bounds: of the sinks that are set up, by name.
        held: likewise, to be filled.
        last: id of the last row.
    """
    found = "SELECT count(*), ifnull(sum(length(body)), 0) FROM answers WHERE id > ? AND block = ? AND wants & ?"
    readers: dict[str, Reader] = {}
    for slot, name, cursor in db.execute("SELECT slot, name, cursor FROM sinks").fetchall():
        known = name in bounds
        reader = Reader(name, slot, cursor, bounds.get(name, _ORPHAN), held[name] if known else Held())
        reader.held.queued, reader.held.bytes = db.execute(found, (cursor, reader.block, reader.bit)).fetchone()
        if known or reader.held.queued:
            readers[name] = reader
        else:
            db.execute("DELETE FROM sinks WHERE slot = ?", (slot,))
    taken = {reader.slot for reader in readers.values()}
    free = (slot for slot in range(len(bounds) + len(taken)) if slot not in taken)
    for name in bounds:
        if name not in readers:
            readers[name] = Reader(name, next(free), last, bounds[name], held[name])
            db.execute("INSERT INTO sinks VALUES (?, ?, ?)", (readers[name].slot, name, last))
    return readers
