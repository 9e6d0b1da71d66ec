"""Blocking iterators, read beside the event loop."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(source: Callable[[], Iterator[T]]) -> AsyncGenerator[T]:
    """The items of a blocking iterator, which is read in its own thread, one item ahead.

    The thread is a daemon: if it blocks for ever, as on standard input, the program can still end.

    Args:
        source: called in the thread; returns the iterator.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[T | None, BaseException | None, bool]] = asyncio.Queue()
    room, stopped = threading.Semaphore(2), threading.Event()

    def hand(item: T | None, error: BaseException | None, last: bool) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(items.put_nowait, (item, error, last))

    def read() -> None:
        try:
            for item in source():
                room.acquire()
                if stopped.is_set():
                    return
                hand(item, None, False)
            hand(None, None, True)
        except BaseException as exc:  # noqa: BLE001  raised again where the items are taken
            hand(None, exc, True)

    threading.Thread(target=read, name="bitneck-source", daemon=True).start()
    try:
        while True:
            item, error, last = await items.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
            room.release()
    finally:
        stopped.set()
        room.release()
