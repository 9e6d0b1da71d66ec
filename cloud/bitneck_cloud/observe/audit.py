"""What an operator must be able to look up: who changed what, which sessions were there, and who was refused."""

import json
import logging
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["RecentChange", "RecentChanges", "RefusalLog", "acting", "record"]

_LOG = logging.getLogger("bitneck_cloud.audit")

_MOST_RECENT = 200
_LONGEST = 500
"""Characters of a text that is kept."""
_PERIOD_S = 60.0
_MOST_KEYS = 256
_OTHERS = ("other callers", "")

acting: ContextVar[str] = ContextVar("bitneck_acting", default="-")
"""Role and name of the caller that is being served in this context, such as ``operate alice (10.0.0.7)``."""


def record(action: str, target: str, *, who: str | None = None, before: Any = None, after: Any = None) -> None:
    """Write one line of the audit log; its request id comes from the context.

    Args:
        action: such as ``PUT rate`` or ``session end``.
        target: what it changed.
        who: the caller; None for the one that the context knows.
        before: what was there, as JSON can hold it; None if nothing was.
        after: what is there now; likewise.
    """
    who = acting.get() if who is None else who
    fields = {"action": action, "target": target, "who": who, "before": before, "after": after}
    _LOG.info("%s %s by %s: %s -> %s", action, target, who, _short(before), _short(after), extra=fields)


def _short(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=True, default=str)


@dataclass(frozen=True, slots=True)
class RecentChange:
    """One line of the audit log.

    Attributes:
        unix_s: when, seconds since 1970.
        action: see `record`.
        target: likewise.
        who: likewise.
        before: as JSON; None for nothing.
        after: likewise.
    """

    unix_s: float
    action: str
    target: str
    who: str
    before: str | None
    after: str | None


class RecentChanges(logging.Handler):
    """Keeps the newest lines of the audit log that are changes, for the console."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: deque[RecentChange] = deque(maxlen=_MOST_RECENT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; refusals are not kept."""
        values = vars(record)
        if "target" not in values:
            return
        texts = {
            name: None if values[name] is None else _short(values[name])[:_LONGEST] for name in ("before", "after")
        }
        self._kept.append(
            RecentChange(record.created, values["action"], values["target"][:_LONGEST], values["who"], **texts)
        )

    def newest(self) -> list[RecentChange]:
        """What is kept, the newest first."""
        return list(reversed(self._kept))

    def listen(self) -> None:
        """Begin to keep what is logged, until `close`."""
        _LOG.addHandler(self)

    def close(self) -> None:
        """Keep nothing more."""
        _LOG.removeHandler(self)
        super().close()


class RefusalLog:
    """Refused calls: the first of a caller and reason is logged at once, its repeats once a minute as a sum.

    It remembers a bounded number of callers; the ones beyond are summed together.
    """

    def __init__(self) -> None:
        self._repeats: dict[tuple[str, str], int] = {}
        self._begin = time.monotonic()

    def refused(self, who: str, reason: str) -> None:
        """A call was refused.

        Args:
            who: its caller; no text that the caller chose.
            reason: a short text from a small set.
        """
        key = who, reason
        if key not in self._repeats and len(self._repeats) >= _MOST_KEYS:
            key = _OTHERS[0], reason
            if key not in self._repeats and len(self._repeats) >= _MOST_KEYS + 16:
                key = _OTHERS
        if key in self._repeats:
            self._repeats[key] += 1
            return
        self._repeats[key] = 0
        _LOG.warning("refused %s: %s", *key, extra={"action": "refusal", "who": key[0], "after": key[1]})

    def flush(self, now: float | None = None, *, all_of_it: bool = False) -> None:
        """Log the sums of the minute that has ended, and begin another.

        Args:
            now: seconds, of `time.monotonic`; None for its own reading.
            all_of_it: end the minute now, because the server stops.
        """
        now = time.monotonic() if now is None else now
        if now - self._begin < _PERIOD_S and not all_of_it:
            return
        seconds = round(now - self._begin)
        for (who, reason), repeats in self._repeats.items():
            if repeats:
                _LOG.warning(
                    "refused %s: %s, %d more times in %d s", who, reason, repeats, seconds,
                    extra={"action": "refusal", "who": who, "after": reason, "repeats": repeats},
                )  # fmt: skip
        self._repeats.clear()
        self._begin = now
