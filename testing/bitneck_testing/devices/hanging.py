"""A disk that does not answer, in this process: as a network's disk that is gone, or a card that erases."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["HANG_S", "Disk"]

HANG_S = 60.0
"""A call that hangs for so long fails the test."""


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
