"""What a program does with each answer before it gets it, such as writing a class map: in threads of its own.

A disk may not answer. That costs the answers that wait for it, and nothing else: other frames, and the end of the
program, do not wait.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bitneck.errors import Unavailable
from bitneck.workers import settling
from bitneck_edge.answers.results import Answer
from bitneck_edge.sources.photo import Photo

__all__ = ["Finishing"]

_THREADS = 4
_MOST_S = 30.0
"""A slow card takes the pictures of an answer in this time."""
_CLOSE_S = 2.0
"""Seconds in which what has begun may still end: a file would be cut."""
_CLOSED = "the client was closed before the answer was finished"


@dataclass(slots=True, eq=False)
class _Work:
    """What is to be done with one answer.

    Attributes:
        call: does it; it raises nothing.
        done: gets what becomes of it.
        begun_at: when a thread took it, monotonic clock; None if none has.
    """

    call: Callable[[], None]
    done: "asyncio.Future[Answer]"
    begun_at: float | None = None


class Finishing:
    """Calls a function with each photograph and its answer, a few at once, in their order.

    Args:
        finish: it blocks, and returns the answer that the program gets; None for the answer as it is.
    """

    def __init__(self, finish: Callable[[Photo, Answer], Answer] | None) -> None:
        self._finish = finish
        self._changed = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._under_way: set[_Work] = set()  # of this loop: what has no end yet
        self._threads = self._idle = 0
        self._begun_at = 0.0  # the last moment in which a thread took something
        self._closed = False

    async def __call__(self, photo: Photo, answer: Answer) -> Answer:
        """What the function makes of an answer.

        Raises:
            Unavailable: the function did not return in time, or none of the threads has got on for so long; or `close`.
            Exception: what the function raises.
        """
        if self._finish is None:
            return answer
        work = _Work(*settling(self._finish, photo, answer))
        self._under_way.add(work)
        try:
            if not self._begin(work):
                raise Unavailable(_CLOSED)
            while not work.done.done():
                since = self._begun_at if work.begun_at is None else work.begun_at
                if (left_s := since + _MOST_S - time.monotonic()) <= 0:
                    raise _too_late(answer)
                await asyncio.wait({work.done}, timeout=left_s)
            return work.done.result()
        finally:
            self._under_way.discard(work)
            if not work.done.cancel() and not work.done.cancelled():
                work.done.exception()  # nobody else asks for it
            with self._changed:
                if work.begun_at is None and work in self._waiting:
                    self._waiting.remove(work)

    def open(self) -> None:
        """Take answers, also after `close`."""
        self._closed = False

    async def close(self) -> None:
        """Take no more answers. Those that wait fail, and those that have begun too, unless they end in a moment."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            begun = {work.done for work in self._under_way if work.begun_at is not None}
            waiting = {work.done for work in self._under_way} - begun
        _fail(waiting)
        try:
            if begun:
                await asyncio.wait(begun, timeout=_CLOSE_S)
        finally:
            _fail(begun)

    def _begin(self, work: _Work) -> bool:
        """Have it done by the next thread that is free; False if no answers are taken."""
        with self._changed:
            if self._closed:
                return False
            if self._idle <= len(self._waiting) and self._threads < _THREADS:
                self._add_thread()
            if self._idle > len(self._waiting):
                self._begun_at = time.monotonic()  # one will take it at once
            self._waiting.append(work)
            self._changed.notify()
            return True

    def _add_thread(self) -> None:
        """With the lock; it is enough if one thread can be had."""
        try:
            threading.Thread(target=self._run, name="bitneck-finish", daemon=True).start()
        except RuntimeError as exc:
            if not self._threads:
                raise Unavailable(f"an answer cannot be finished: {exc}") from exc
        else:
            self._threads += 1
            self._idle += 1

    def _run(self) -> None:
        """One thread; it is idle now. One that a disk holds is still there when the client is opened again."""
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        self._idle -= 1
                        self._threads -= 1
                        return
                    self._changed.wait()
                work = self._waiting.popleft()
                self._idle -= 1
                work.begun_at = self._begun_at = time.monotonic()
            work.call()
            del work  # what it holds is free while the thread waits
            with self._changed:
                self._idle += 1


def _too_late(answer: Answer) -> Unavailable:
    return Unavailable(
        f"{answer.file}: its answer came, but what was to be done with it has not ended within {_MOST_S:.0f} s; does "
        "the disk that it is written to answer?"
    )


def _fail(futures: "set[asyncio.Future[Answer]]") -> None:
    for future in futures:
        if not future.done():
            future.set_exception(Unavailable(_CLOSED))
