"""A session that is opened at last, and never stays failed: for clients with a spool, which do not give up."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from bitneck.backoff import Backoff
from bitneck.errors import BitneckError, DeadlineExceeded, Overloaded, Unavailable
from bitneck_edge.session import EdgeSession

__all__ = ["keep_open", "open_at_last"]

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
