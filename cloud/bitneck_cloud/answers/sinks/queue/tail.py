"""The newest rows of the log, in memory: a sink that keeps up reads nothing from the file. Pure."""

from collections.abc import Iterator, Sequence

from bitneck_cloud.answers.sinks.queue.readers import Reader
from bitneck_cloud.answers.sinks.state import Queued

__all__ = ["Row", "Tail"]

_MOST, _MOST_BYTES = 4096, 4 << 20

Row = tuple[int, float, int, int, str, int, int, bytes]
"""As the table `answers` has it: id, at, block, wants, stream, seq, number, body."""


class Tail:
    """Rows without gaps between their ids, up to the last one.

    Attributes:
        after: id before the first of them.
    """

    def __init__(self) -> None:
        self.after = 0
        self._rows: list[Row] = []
        self._bytes = 0

    def begin(self, last: int) -> None:
        """Hold nothing; the next row comes after this one."""
        self.after, self._rows, self._bytes = last, [], 0

    def add(self, rows: Sequence[Row]) -> None:
        """Take the next rows."""
        self._rows.extend(rows)
        self._bytes += sum(map(_size, rows))
        while self._rows and (len(self._rows) > _MOST or self._bytes > _MOST_BYTES):
            half = (len(self._rows) + 1) // 2
            self._bytes -= sum(map(_size, self._rows[:half]))
            self.after = self._rows[half - 1][0]
            del self._rows[:half]

    def has(self, reader: Reader) -> bool:
        """Whether all that a sink has before it is here."""
        return reader.cursor >= self.after

    def read(self, reader: Reader) -> Iterator[Queued]:
        """What waits for a sink, which `has` it."""
        block, bit = reader.block, reader.bit
        for place in range(reader.cursor - self.after, len(self._rows)):
            row = self._rows[place]
            if row[3] & bit and row[2] == block:
                yield Queued(row[0], row[1], row[7])


def _size(row: Row) -> int:
    return len(row[7])
