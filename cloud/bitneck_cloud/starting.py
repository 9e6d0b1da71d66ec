"""Steps of a start and a stop that wait for a disk, which may not answer."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from bitneck.disk_thread import DiskThread
from bitneck_cloud.abandoned import abandon

__all__ = ["StoppedBefore", "last_step", "step", "waited"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_TOLD_EVERY_S = 30.0
_LAST_S = 30.0
"""Seconds that the last step of a stop may take."""


class StoppedBefore(Exception):
    """The server was asked to stop before it had started."""


async def step(stopping: asyncio.Event, what: str, work: Callable[..., T], *arguments: object) -> T:
    """Have work done in a thread that the process does not wait for; see `waited`.

    Args:
        stopping: is set when the server is to stop.
        what: is done, for the log.
        work: what to do.
        *arguments: of `work`.

    Raises:
        StoppedBefore: the server is to stop; what was begun goes on, and is of no use.
        Exception: what the work raises.
    """
    disk = DiskThread("bitneck-start")
    try:
        return await waited(stopping, what, disk.run(work, *arguments))
    finally:
        disk.end()


async def waited(stopping: asyncio.Event, what: str, awaitable: Awaitable[T]) -> T:
    """Wait for something that a disk has to do. The log says now and then if it takes long.

    Args:
        stopping: is set when the server is to stop.
        what: is done, for the log.
        awaitable: what to wait for.

    Raises:
        StoppedBefore: the server is to stop.
        Exception: what the awaitable raises.
    """
    done, stop = asyncio.ensure_future(awaitable), asyncio.ensure_future(stopping.wait())
    begin = time.monotonic()
    try:
        while not done.done():
            await asyncio.wait({done, stop}, timeout=_TOLD_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if stop.done() and not done.done():
                abandon(what)
                raise StoppedBefore
            if not done.done():
                _LOG.warning("%s: not done after %.0f s; does the disk answer?", what, time.monotonic() - begin)
        return done.result()
    finally:
        stop.cancel()
        done.cancel()


async def last_step(what: str, work: Callable[[], object]) -> None:
    """Have work done at the end, within a bound.

    Args:
        what: is done, for the log.
        work: what to do.
    """
    disk = DiskThread("bitneck-stop")
    try:
        await disk.within(_LAST_S, work)
    except TimeoutError:
        _LOG.error("%s: not done after %.0f s; the server ends without it", what, _LAST_S)
        abandon(what)
    finally:
        disk.end()
