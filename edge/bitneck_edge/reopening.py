"""Sessions that are opened at last, after another one has failed, or because the client has another bundle now.

Clients with a spool do not give up: they go on encoding whatever the server does.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from bitneck.backoff import Backoff
from bitneck.errors import BitneckError, DeadlineExceeded, Overloaded, Unavailable
from bitneck_edge.session import EdgeSession

__all__ = ["keep_current", "keep_open", "may_pass", "open_at_last"]

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.5
_FIRST_PAUSE_S, _MOST_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 5.0, 60.0


async def open_at_last(open_it: Callable[[], Awaitable[EdgeSession]]) -> EdgeSession:
    """Try to open the first session until the server gives what it needs: without a bundle nothing can be encoded.

    Args:
        open_it: opens it.

    Raises:
        BitneckError: another attempt would be of no use.
    """
    backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_FIRST_PAUSE_S)
    while True:
        try:
            return await open_it()
        except (Unavailable, DeadlineExceeded, Overloaded) as exc:
            pause_s = backoff.failed(random.random()) or _MOST_FIRST_PAUSE_S  # noqa: S311  no secret
            _LOG.warning(
                "%s; nothing can be encoded until the server's bundle is here, so pictures wait or are dropped and "
                "counted; trying again in %.1f s (`bitneck-edge fetch` brings it ahead of time)",
                exc, pause_s,
            )  # fmt: skip
            await asyncio.sleep(pause_s)


async def keep_open(session: Callable[[], EdgeSession], reopen: Callable[[EdgeSession], Awaitable[None]]) -> None:
    """Open another session whenever the one in use has failed; runs until it is cancelled.

    Args:
        session: the one in use.
        reopen: puts another one in its place. If it fails, it is called again after a pause.
    """
    backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S)
    while True:
        await asyncio.sleep(_LOOK_S)
        old = session()
        if old.link.up:
            backoff.succeeded()
        if old.failure is None:
            continue
        _LOG.warning("%s; opening another session", old.failure)
        try:
            await reopen(old)
        except (BitneckError, OSError) as exc:
            _LOG.warning("%s; frames go to the spool", exc)
        await asyncio.sleep(backoff.failed(random.random()) or _MOST_PAUSE_S)  # noqa: S311  no secret


async def keep_current(wanted: asyncio.Event, move: Callable[[], Awaitable[None]], spread_s: float) -> None:
    """Move to the bundle that the server has for this client whenever it says so; runs until it is cancelled.

    The session in use goes on meanwhile, so a bundle that takes minutes to fetch costs no answer. The server tells all
    devices at once: each first waits for a time of its own.

    Args:
        wanted: is set when the server has said so.
        move: opens a session with that bundle, and puts it in place. If it fails, it is called again after a pause.
        spread_s: the longest wait before that, in seconds; 0 for none.
    """
    backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S)
    while True:
        await wanted.wait()
        if not backoff.failures:  # else the pause after the last attempt was one
            await asyncio.sleep(random.uniform(0.0, spread_s))  # noqa: S311  no secret
        wanted.clear()
        try:
            await move()
        except (BitneckError, OSError) as exc:
            pause_s = backoff.failed(random.random()) or _MOST_PAUSE_S  # noqa: S311  no secret
            _LOG.warning("the server's new bundle cannot be used: %s; trying again in %.1f s", exc, pause_s)
            wanted.set()
        else:
            backoff.succeeded()
            pause_s = _FIRST_PAUSE_S  # a server that says it again and again must not keep this device busy
        await asyncio.sleep(pause_s)


def may_pass(failure: BitneckError | None) -> bool:
    """Whether a link that failed so may be opened again."""
    return failure is not None and failure.grpc_status in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
