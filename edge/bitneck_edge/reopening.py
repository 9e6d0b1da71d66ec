"""A session that never stays failed: for clients with a spool, which go on encoding whatever the server does."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from bitneck.backoff import Backoff
from bitneck.errors import BitneckError
from bitneck_edge.session import EdgeSession

__all__ = ["keep_open"]

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.5
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 60.0


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
