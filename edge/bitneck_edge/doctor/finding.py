"""What one check found, and what to do. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "State", "skipped"]

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was looked at, one word.
        state: how it is; only ``failed`` keeps the device from working.
        found: what was seen.
        advice: what to do; empty if nothing.
    """

    check: str
    state: State
    found: str
    advice: str = ""


def skipped(checks: Iterable[str], because: str) -> list[Finding]:
    """Checks that could not be made."""
    return [Finding(check, "skipped", because) for check in checks]
