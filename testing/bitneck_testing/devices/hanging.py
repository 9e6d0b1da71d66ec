"""A disk that does not answer, in this process, and a device whose spool is on it.

It is as a network's disk that is gone, or a card that erases.
"""

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.segment import Kept

__all__ = ["HANG_S", "LIMITS", "Disk", "kept_frame", "spooling_client"]

HANG_S = 60.0
"""A call that hangs for so long fails the test."""
LIMITS = Limits(most_bytes=1_000_000, most_age_s=1e6)
"""Of a spool that nothing falls out of."""


class Disk:
    """Calls that wait while it hangs; then they do what they should, or fail. `os.pwrite` is one of them.

    Attributes:
        waiting: calls that wait now.
        error: what the calls raise; None to let them be done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = 0
        self.error: OSError | None = None
        self._patch = monkeypatch
        self._counting = threading.Lock()
        self._answers = threading.Event()
        self._answers.set()
        self.slows(os, "pwrite")

    def slows(self, owner: object, name: str) -> None:
        """Let another function wait for it, too."""
        right: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(right)
        def call(*arguments: Any, **named: Any) -> Any:
            self.wait()
            if self.error is not None:
                raise self.error
            return right(*arguments, **named)

        self._patch.setattr(owner, name, call)

    def wait(self) -> None:
        """As a call does."""
        with self._counting:
            self.waiting += 1
        try:
            assert self._answers.wait(HANG_S)
        finally:
            with self._counting:
                self.waiting -= 1

    def hang(self) -> None:
        """Answer no more."""
        self._answers.clear()

    def go_on(self) -> None:
        """Answer again."""
        self._answers.set()


def spooling_client(address: str, folder: Path, spooled: list[Answer | Failure], **values: Any) -> EdgeClient:
    """A client with its cache and its spool below a folder; `spooled` gets what comes from the spool."""
    return EdgeClient(
        address, model="tiny", threads=1, cache_dir=folder / "cache", spool=folder / "spool",
        on_spooled=spooled.append, connect_timeout_s=1.0, **values,
    )  # fmt: skip


def kept_frame(number: int) -> Kept:
    """A frame for a spool, of a bundle that nobody has."""
    return Kept(
        seq=0, bundle_id="sha256:" + "ab" * 32, point="p", payload=bytes(100), captured_unix_us=1, name=f"c#{number}"
    )
