"""From a pass of the engine to devices, sinks and subscribers, in the order of answering.

    pass --number--> (a publisher commits, in a thread) --> devices --> the hub and its subscribers

Without a publisher the devices get their answers first and at once. With one, nothing of a pass is sent before the
publisher has committed all of it. Passes that end while it is at work are committed together, next.
"""

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from bitneck.workers import Workers
from bitneck_cloud.answers.answered import Answered
from bitneck_cloud.answers.document import Published
from bitneck_cloud.answers.subscriptions import Subscriptions
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["Publisher", "Publishing"]

_LOG = logging.getLogger(__name__)

_CLOSE_S = 10.0
"""Seconds that a stopping server waits for the last commit."""

_Pass = tuple[tuple[Published, ...], Callable[[], None]]


class Publisher(Protocol):
    """Where answers are kept before any of them is sent, such as a queue on disk."""

    def commit(self, answers: Sequence[Published]) -> None:
        """Keep answers, so that they outlive this process. When it returns, they are sent to their devices.

        It is always called in the same thread, and never twice at once. Every frame waits for it: a few milliseconds
        are fine. It raises nothing: what it cannot keep, it counts itself.

        Args:
            answers: of one or more passes, their numbers following on.
        """


class Publishing:
    """Numbers answers and hands them on, on one event loop.

    Args:
        server: name of the server.
        subscriptions: to answers.
        metrics: counts what happens.
        publisher: commits answers before they are sent; None for none.
    """

    def __init__(
        self, server: str, subscriptions: Subscriptions, metrics: Metrics, publisher: Publisher | None = None
    ) -> None:
        self._server = server
        self._subscriptions = subscriptions
        self._metrics = metrics
        self._publisher = publisher
        self._next = subscriptions.hub.end
        self._thread = Workers(1, "bitneck-commit")
        self._lock = threading.Lock()
        self._waiting: list[_Pass] = []  # with the lock, as the next one
        self._committing = False
        self._begun = 0  # passes that are not handed on yet
        self._idle = asyncio.Event()
        self._idle.set()

    def answered(self, answers: Sequence[Answered], send: Callable[[], None]) -> None:
        """A pass is done.

        Args:
            answers: of it, in order.
            send: sends them, and the faults of the pass, to their devices; it is called once, on the event loop.
        """
        if not answers:
            send()
            return
        published = tuple(
            Published(number, self._server, answer) for number, answer in enumerate(answers, start=self._next)
        )
        self._next += len(published)
        if self._publisher is None:
            self._hand_on(published, send)
            return
        self._begun += 1
        self._idle.clear()
        with self._lock:
            self._waiting.append((published, send))
            begin, self._committing = not self._committing, True
        if begin:
            self._thread.post(functools.partial(self._commit, self._publisher, asyncio.get_running_loop()))

    async def close(self) -> None:
        """Wait until everything is committed and handed on, within a bound. Nothing may come after it."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._idle.wait()
        except TimeoutError:
            _LOG.error("answers are still not committed after %.0f s; the server stops", _CLOSE_S)
            return
        await asyncio.to_thread(self._thread.close, wait=True)

    def _commit(self, publisher: Publisher, loop: asyncio.AbstractEventLoop) -> None:
        """Commit until nothing waits. The next commit does not wait for the event loop, which may be busy."""
        while True:
            with self._lock:
                passes, self._waiting = self._waiting, []
                if not passes:
                    self._committing = False
                    return
            answers = [published for answers, _ in passes for published in answers]
            try:
                publisher.commit(answers)
            except Exception:  # noqa: BLE001  a bug there must not keep answers from their devices
                _LOG.exception("%d answers could not be committed; they are sent all the same", len(answers))
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server did not wait any longer
                loop.call_soon_threadsafe(self._committed, passes)

    def _committed(self, passes: Sequence[_Pass]) -> None:
        for answers, send in passes:
            self._hand_on(answers, send)
        self._begun -= len(passes)
        if not self._begun:
            self._idle.set()

    def _hand_on(self, answers: Sequence[Published], send: Callable[[], None]) -> None:
        """Send a pass to its devices, then keep it: numbers must follow on, whatever becomes of one pass."""
        try:
            send()
        except Exception:  # noqa: BLE001  a bug with one pass must not keep others from their devices
            _LOG.exception("%d answers could not be sent", len(answers))
        self._keep(answers)

    def _keep(self, answers: Sequence[Published]) -> None:
        self._metrics.published(answers[0].answered.model, len(answers))
        self._subscriptions.keep(answers)
