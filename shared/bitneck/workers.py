"""A few threads for work that would block the event loop, with few steps between a call and its result.

`concurrent.futures` takes more steps. They cost a single frame 0.1 ms on each side when the caches are cold
(``benchmarks/serving.py``).
"""

import asyncio
import atexit
import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from bitneck.errors import Unavailable

__all__ = ["Workers", "settling", "tell"]

T = TypeVar("T")

_CLOSE_S = 60.0
"""A thread that takes longer waits for a disk that does not answer."""


class Workers:
    """Daemon threads that take calls in order. The first call starts them.

    A program that ends joins them, whatever way it ends: a thread inside ONNX Runtime would abort the process. It does
    so for a minute: a thread may wait for a disk.

    Args:
        count: threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def post(self, call: Callable[[], None], dropped: Callable[[], None] = lambda: None) -> None:
        """Run `call` in a thread; it must not raise. If `close` comes first, `dropped` is called instead."""
        if self._closed:
            dropped()
            return
        if not self._threads:
            atexit.register(self._end)
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._calls.put((call, dropped))

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of a call in a thread; see `submit`."""
        return await self.submit(function, *args)

    def submit(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Begin a call in a thread. Cancelling its future leaves the call running, if it has begun.

        The future raises `Unavailable` if `close` came first, or whatever `function` raises.
        """
        call, done = settling(function, *args)
        refused = Unavailable(f"closed: {self._name} takes no more calls")
        loop = asyncio.get_running_loop()
        self.post(lambda: None if done.cancelled() else call(), lambda: tell(loop, _set_exception, done, refused))
        return done

    def close(self, *, wait: bool = False) -> None:
        """Take no more calls. Calls that have not begun are dropped.

        Args:
            wait: until the threads have ended, or for a minute.
        """
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while (left := self._calls.get_nowait()) is not None:
                left[1]()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            limit = time.monotonic() + _CLOSE_S
            for thread in self._threads:
                thread.join(max(0.0, limit - time.monotonic()))
            atexit.unregister(self._end)

    def _end(self) -> None:
        """At the program's end, which waits a minute for all of them together."""
        self.close()
        for thread in self._threads:
            thread.join(max(0.0, _exit_limit() - time.monotonic()))

    def _work(self) -> None:
        while (taken := self._calls.get()) is not None:
            taken[0]()
            del taken  # what it holds is free while the thread waits
        if not any(each.is_alive() for each in self._threads if each is not threading.current_thread()):
            atexit.unregister(self._end)  # nothing is left to be joined


@functools.cache
def _exit_limit() -> float:
    return time.monotonic() + _CLOSE_S


def settling(function: Callable[..., T], *args: Any) -> "tuple[Callable[[], None], asyncio.Future[T]]":
    """A call for another thread, which does not raise, and the future on this loop that gets what becomes of it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def call() -> None:
        try:
            result = function(*args)
        except StopIteration as exc:  # no future takes one
            error = RuntimeError("a call in a thread raised StopIteration")
            error.__cause__ = exc
            tell(loop, _set_exception, done, error)
        except BaseException as exc:  # noqa: BLE001  raised where it is awaited
            tell(loop, _set_exception, done, exc)
        else:
            tell(loop, _set_result, done, result)

    return call, done


def tell(loop: asyncio.AbstractEventLoop, how: Callable[..., object], *what: Any) -> None:
    """Call a function on a loop from another thread; not if the loop is closed, because nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(how, *what)


def _set_result(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _set_exception(done: asyncio.Future[Any], exc: BaseException) -> None:
    if not done.done():
        done.set_exception(exc)
