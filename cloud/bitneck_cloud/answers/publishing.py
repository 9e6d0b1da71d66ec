"""From a pass of the engine to devices, sinks and subscribers, in the order of answering.

    pass --number--> (a publisher commits, in a thread) --> devices --> the hub and its subscribers

Without a publisher the devices get their answers first and at once. With one, nothing of a pass is sent before the
publisher has committed all of it. A pass after which the engine has nothing to do is committed in the engine's thread:
each step to another thread would wait for the interpreter. Else a thread of its own commits it, beside the next pass;
passes that end while it is at work are committed together, next.
"""

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitneck.workers import Workers, tell
from bitneck_cloud.abandoned import abandon
from bitneck_cloud.answers.answered import Answered
from bitneck_cloud.answers.document import Published
from bitneck_cloud.answers.subscriptions import Subscriptions
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["Pass", "Publisher", "Publishing"]

_LOG = logging.getLogger(__name__)

_CLOSE_S = 10.0
"""Seconds that a stopping server waits for the last commit."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The answers of one pass of the engine.

    Attributes:
        answers: with their numbers.
        committed: whether the publisher has them already.
    """

    answers: tuple[Published, ...]
    committed: bool


class Publisher(Protocol):
    """Where answers are kept before any of them is sent, such as a queue on disk.

    Attributes:
        waits: whether a commit waits for a disk, and has to go on beside the engine.
    """

    waits: bool

    def commit(self, answers: Sequence[Published]) -> None:
        """Keep answers, so that they outlive this process. When it returns, they are sent to their devices.

        It is never called twice at once. Every frame waits for it: a few milliseconds are fine. It raises nothing:
        what it cannot keep, it counts itself.

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
        self._uncommitted = 0  # passes that have their numbers; with the lock, as the next ones
        self._waiting: list[tuple[Pass, Callable[[], None]]] = []
        self._committing = False
        self._begun = 0  # passes that are not handed on yet
        self._idle = asyncio.Event()
        self._idle.set()

    def passed(self, answers: Sequence[Answered], *, at_once: bool) -> Pass:
        """Number the answers of a pass, in the engine's thread.

        Args:
            answers: of the pass, in order.
            at_once: commit them here and now, if those before them are committed.
        """
        with self._lock:
            published = tuple(
                Published(number, self._server, answer) for number, answer in enumerate(answers, start=self._next)
            )
            self._next += len(published)
            if not published or self._publisher is None:
                return Pass(published, committed=True)
            at_once = at_once and not self._uncommitted and not self._publisher.waits
            if not at_once:
                self._uncommitted += 1
        if at_once:  # the next pass ends in this thread too, so nothing comes between
            self._keep(self._publisher, published)
        return Pass(published, committed=at_once)

    def answered(self, passed: Pass, send: Callable[[], None]) -> None:
        """A pass is done: hand it on, on the event loop, once it is committed.

        Args:
            passed: from `passed`, in the order of its calls.
            send: sends the answers, and the faults of the pass, to their devices; it is called once, on the event loop.
        """
        if not passed.answers:
            send()
            return
        if passed.committed:
            self._hand_on(passed.answers, send)
            return
        assert self._publisher is not None
        self._begun += 1
        self._idle.clear()
        with self._lock:
            self._waiting.append((passed, send))
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
            abandon("a commit")
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
            self._keep(publisher, [published for passed, _ in passes for published in passed.answers])
            tell(loop, self._committed, passes)  # not if the server did not wait any longer
            with self._lock:  # only now: a pass that is committed at once must not overtake these
                self._uncommitted -= len(passes)

    @staticmethod
    def _keep(publisher: Publisher, answers: Sequence[Published]) -> None:
        try:
            publisher.commit(answers)
        except Exception:  # noqa: BLE001  a bug there must not keep answers from their devices
            _LOG.exception("%d answers could not be committed; they are sent all the same", len(answers))

    def _committed(self, passes: Sequence[tuple[Pass, Callable[[], None]]]) -> None:
        for passed, send in passes:
            self._hand_on(passed.answers, send)
        self._begun -= len(passes)
        if not self._begun:
            self._idle.set()

    def _hand_on(self, answers: Sequence[Published], send: Callable[[], None]) -> None:
        """Send a pass to its devices, then keep it: numbers must follow on, whatever becomes of one pass."""
        try:
            send()
        except Exception:  # noqa: BLE001  a bug with one pass must not keep others from their devices
            _LOG.exception("%d answers could not be sent", len(answers))
        try:
            self._metrics.published(answers[0].answered.model, len(answers))
            self._subscriptions.keep(answers)
        except Exception:  # noqa: BLE001  likewise
            _LOG.exception("%d answers could not be kept for subscribers", len(answers))
