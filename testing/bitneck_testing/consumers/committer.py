"""Sinks that run in this process or in one of their own, and answers that are committed to them."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.state import SinkState
from bitneck_cloud.settings import CloudSettings

__all__ = ["Committer", "only", "outgoing", "wait_for"]

_END_S = 30.0


def wait_for(met: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: it is not, in all that time.
    """
    limit = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def outgoing(folder: Path, *sinks: dict[str, Any], clock: Callable[[], float] = time.time) -> Iterator[Outgoing]:
    """Sinks that run for the length of a block.

    Args:
        folder: of the queue's file, ``queue.db``.
        *sinks: tables, as a config file has them.
        clock: seconds since 1970.
    """
    settings = CloudSettings.load({"sinks": list(sinks), "sinks_queue": folder / "queue.db"})
    running = Outgoing(settings.sinks, settings.sinks_queue, server="cloud-1", clock=clock)
    running.start()
    try:
        yield running
    finally:
        running.close()


def only(running: Outgoing) -> SinkState:
    """The state of the only sink."""
    (state,) = running.states()
    return state


class Committer:
    """A process that commits to sinks, as a server does; see `bitneck_testing.consumers.committing_process`.

    Args:
        folder: for its config file and its queue, ``queue.db``.
        *sinks: tables, as a config file has them.
        **other: settings.

    Attributes:
        process: the process.
        last_number: of the answers that were committed before it began.
    """

    def __init__(self, folder: Path, *sinks: dict[str, Any], **other: Any) -> None:
        config = folder / "config.toml"
        config.write_text(tomli_w.dumps({"sinks": list(sinks), "sinks_queue": str(folder / "queue.db")} | other))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bitneck_testing.consumers.committing_process", str(config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.last_number: int = self._read()["last_number"]

    def ask(self, command: str) -> Any:
        """Send a command and wait for what it says."""
        self.begin(command)
        return self._read()

    def begin(self, command: str) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def state(self) -> dict[str, Any]:
        """Of the only sink."""
        (state,) = self.ask("state")
        return dict(state)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        self.process.send_signal(signal.SIGKILL)
        self._end()

    def close(self) -> int:
        """Let it end; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._end()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def _end(self) -> int:
        status = self.process.wait(_END_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        return status
