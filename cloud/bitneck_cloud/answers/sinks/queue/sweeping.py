"""Rows of the log that no sink wants any more are deleted, some at a time, beside the commits.

Whenever a sink's cursor passes rows, these are noted. Between two cursors the same sinks are behind for all rows: one
statement deletes those that none of them wants. So the file holds no more than what waits.
"""

import sqlite3
from collections.abc import Collection

from bitneck_cloud.answers.sinks.queue.readers import Reader

__all__ = ["Unswept", "sweep"]

_ROWS = 256
"""Rows that are looked at while a commit may wait."""
_MOST_RANGES = 64

_DELETE = "DELETE FROM answers WHERE id > ? AND id <= ? AND block = ? AND wants & ? = 0"
_END = "SELECT id FROM answers WHERE id > ? AND id <= ? ORDER BY id LIMIT 1 OFFSET ?"


class Unswept:
    """Ranges of rows that some sink has passed since they were looked at. Pure."""

    def __init__(self) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def add(self, block: int, after: int, last: int) -> None:
        """Note the rows of a block with ids from behind `after` to `last`."""
        if after >= last:
            return
        ranges = self._ranges.setdefault(block, [])
        if ranges and ranges[-1][1] == after:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((after, last))
            if len(ranges) > _MOST_RANGES:
                _merge(ranges)

    def first(self, upto: int) -> tuple[int, int, int] | None:
        """Block and ids of the first range of some block; None if there is none up to a row."""
        for block, ranges in self._ranges.items():
            _merge(ranges)
            if ranges and ranges[0][0] < upto:
                return block, ranges[0][0], min(ranges[0][1], upto)
        return None

    def done(self, block: int, last: int) -> None:
        """The rows of a block up to `last` are looked at."""
        self._ranges[block] = [(max(after, last), end) for after, end in self._ranges[block] if end > last]


def sweep(db: sqlite3.Connection, readers: Collection[Reader], unswept: Unswept, upto: int) -> bool:
    """Delete what no sink wants of the first range, or of a part of it.

    Args:
        db: the file.
        readers: all sinks.
        unswept: what to look at.
        upto: id of the last row that may go.

    Returns:
        Whether there is more.

    Raises:
        sqlite3.Error: the disk fails.
    """
    found = unswept.first(upto)
    if found is None:
        return False
    block, after, last = found
    if last - after > _ROWS and (row := db.execute(_END, (after, last, _ROWS - 1)).fetchone()):
        last = row[0]
    readers = [reader for reader in readers if reader.block == block]
    last = min((reader.cursor for reader in readers if after < reader.cursor < last), default=last)
    behind = sum(reader.bit for reader in readers if reader.cursor <= after)
    db.execute(_DELETE, (after, last, block, behind))
    unswept.done(block, last)
    return True


def _merge(ranges: list[tuple[int, int]]) -> None:
    """Put ranges in order, and those together that touch."""
    ranges.sort()
    merged: list[tuple[int, int]] = []
    for after, last in ranges:
        if merged and after <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((after, last))
    ranges[:] = merged
