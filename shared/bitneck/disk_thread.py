"""A thread that works on a disk, so that the event loop never waits for one. A disk may not answer for minutes."""

import asyncio
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from bitneck.errors import Unavailable
from bitneck.workers import settling

__all__ = ["DiskThread"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class DiskThread:
    """One thread, which does what it is given in order. It ends with the process, also if the disk does not answer.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, Callable[[], object]] = OrderedDict()
        self._tickets = itertools.count()
        self._begun_at: float | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closed

    @property
    def stuck_s(self) -> float:
        """Seconds that it has been at its present work; 0 if it has none."""
        begun_at = self._begun_at
        return time.monotonic() - begun_at if begun_at is not None else 0.0

    def post(self, work: Callable[[], object]) -> int:
        """Have work done, behind all that was given before; not once it is closed. What it raises goes to the log.

        Returns:
            A ticket, for `forget`.
        """
        ticket = next(self._tickets)
        with self._changed:
            if self._closed:
                return ticket
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._waiting[ticket] = work
            self._changed.notify()
        return ticket

    def forget(self, ticket: int) -> bool:
        """Do not do this work; False if it is too late."""
        with self._changed:
            return self._waiting.pop(ticket, None) is not None

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Have work done, and wait for what it gives. If the wait is cancelled, the work is done all the same.

        Raises:
            Unavailable: it takes no more work.
            Exception: what the work raises.
        """
        if self._closed:
            raise Unavailable(f"{self._name} is closed")
        call, done = settling(work, *arguments)
        self.post(call)
        return await done

    async def within(
        self, limit_s: float, work: Callable[..., T], *arguments: object, undo: Callable[[], object] | None = None
    ) -> T:
        """`run`, for some time only. Work that has not begun by then is not done.

        Args:
            limit_s: seconds to wait, at most.
            work: what to do.
            *arguments: of `work`.
            undo: what to do behind work that had begun by then, and may still succeed; None for nothing.

        Raises:
            TimeoutError: it is not done in time.
            Unavailable: it takes no more work.
            Exception: what the work raises.
        """
        if self._closed:
            raise Unavailable(f"{self._name} is closed")
        call, done = settling(work, *arguments)
        ticket = self.post(call)
        try:
            await asyncio.wait({done}, timeout=limit_s)
            if not done.done():
                raise TimeoutError
            return done.result()
        finally:
            if not done.done():
                if not self.forget(ticket) and undo is not None:
                    self.post(undo)
                done.cancel()

    def end(self) -> None:
        """Take no more work. The thread ends when all that it was given is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    async def close(self, timeout_s: float) -> bool:
        """`end`, and wait for that; False if it takes too long."""
        self.end()
        limit = time.monotonic() + timeout_s
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() > limit:
                return False
            await asyncio.sleep(0.005)
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                _, work = self._waiting.popitem(last=False)
                self._begun_at = time.monotonic()
            try:
                work()
            except Exception:  # noqa: BLE001  a bug here must not end the thread
                _LOG.exception("work on the disk failed")
            del work  # what it holds is free while the thread waits
            self._begun_at = None
