"""The log of ``bitneck-edge run`` on stderr. A warning that comes again and again is written now and then."""

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TextIO

__all__ = ["SparseLog", "log_to_stderr"]

_OFTEN = 3
"""Times that a warning is written as it comes."""
_PAUSE_S = 60.0
"""After that it is written once in this time."""
_FORGOTTEN_S = 600.0
"""A warning that has not come for so long is new when it comes."""
_MOST_KEPT = 200


@dataclass(slots=True)
class _Seen:
    """A warning that came: how often, when it came and was written last, and how many were left out since then."""

    times: int
    came_s: float
    written_s: float
    left_out: int = 0


class SparseLog(logging.StreamHandler[TextIO]):
    """Writes lines. A warning or error that differs from an earlier one in numbers alone counts as the same.

    It is written three times, and then once a minute, with the number of those that were left out. So a device that
    waits for a server over a night does not fill its journal.

    Args:
        stream: where to.
        clock: seconds, for tests.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._seen: OrderedDict[tuple[str, ...], _Seen] = OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or leave it out."""
        if record.levelno < logging.WARNING:
            super().emit(record)
            return
        now, key = self._clock(), _key(record)
        seen = self._seen.pop(key, None)
        if seen is None or now - seen.came_s > _FORGOTTEN_S:
            seen = _Seen(0, now, now)
        self._seen[key] = seen
        if len(self._seen) > _MOST_KEPT:
            self._seen.popitem(last=False)
        seen.times, seen.came_s = seen.times + 1, now
        if seen.times > _OFTEN and now - seen.written_s < _PAUSE_S:
            seen.left_out += 1
            return
        if seen.left_out:
            more = copy(record)
            more.msg, more.args = f"{record.getMessage()} [the same {seen.left_out} times before]", None
            record = more
        seen.written_s, seen.left_out = now, 0
        super().emit(record)
        if seen.times == _OFTEN:
            again = copy(record)
            again.msg, again.args = "the last warning is told once a minute from now on, as long as it comes", None
            super().emit(again)


def _key(record: logging.LogRecord) -> tuple[str, ...]:
    """What a record has in common with others that say the same."""
    values = record.args if isinstance(record.args, tuple) else ()
    return record.name, str(record.msg), *(str(value) for value in values if not isinstance(value, int | float))


def log_to_stderr(level: str) -> None:
    """Write the log of this process to stderr, from a level on."""
    handler = SparseLog(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
