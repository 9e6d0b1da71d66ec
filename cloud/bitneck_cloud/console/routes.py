"""The routes that the console asks for beside the control API's: who am I, how is the server, the audit log, try."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect

import bitneck
from bitneck.errors import Overloaded
from bitneck_cloud.api.readiness import Readiness
from bitneck_cloud.console.pages import add_pages
from bitneck_cloud.console.schemas import Change, ServerInfo, Trial, WhoAmI
from bitneck_cloud.console.trial import Trials
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.observe.audit import RecentChanges
from bitneck_cloud.sessions.registry import Registry

__all__ = ["MOST_PHOTOS", "add_console"]

MOST_PHOTOS = 4
"""Photographs that are in memory at once, while they arrive or are tried."""


def add_console(
    app: FastAPI,
    registry: Registry,
    engine: Engine,
    readiness: Readiness,
    changes: RecentChanges,
    *,
    streams: Callable[[], int],
    try_photos: bool,
    guarded: Sequence[Any],
    problems: dict[int | str, dict[str, Any]],
) -> None:
    """Add the console's pages and routes.

    Args:
        app: the control API.
        registry: models and sessions.
        engine: tells its queue and counts.
        readiness: of the server.
        changes: the newest lines of the audit log.
        streams: number of open streams.
        try_photos: whether photographs may be tried.
        guarded: dependencies of routes that need a token.
        problems: the responses that errors have.
    """
    trials, began, photos = Trials(), time.monotonic(), asyncio.Semaphore(MOST_PHOTOS)
    add_pages(app)
    shared: dict[str, Any] = {"dependencies": guarded, "responses": problems}

    @app.get("/v1/whoami", tags=["operation"], **shared)
    async def whoami(request: Request) -> WhoAmI:
        """The role of the token that the request has."""
        holder = request.state.holder
        if holder is None:
            return WhoAmI(role="operate", name="", token_needed=False)
        return WhoAmI(role=holder.role, name=holder.name, token_needed=True)

    @app.get("/v1/server", tags=["operation"], **shared)
    async def server() -> ServerInfo:
        """How the server is doing."""
        return ServerInfo(
            version=bitneck.__version__,
            ready=readiness.ready,
            uptime_s=time.monotonic() - began,
            streams=streams(),
            sessions=registry.count,
            queue_frames=engine.waiting,
            queue_limit=engine.max_queue,
            frames=engine.frames,
            batches=engine.batches,
            dropped=engine.dropped,
            try_photos=try_photos,
        )

    @app.get("/v1/audit", tags=["operation"], **shared)
    async def audit() -> list[Change]:
        """The newest lines of the audit log in memory, newest first: rates, reloads, sessions, and who did it."""
        return [Change(**asdict(change)) for change in changes.newest()]

    @app.post("/v1/models/{name}/try", tags=["models"], **shared)
    async def try_photo(name: str, request: Request) -> Trial:
        """One photograph, sent as the body, at every operating point; one at a time, and only where that is allowed."""
        if not try_photos:
            raise HTTPException(403, "photographs cannot be tried here; its operator can allow it with --try-photos")
        served = registry.model(name)
        if photos.locked():
            raise Overloaded(f"{MOST_PHOTOS} photographs are being sent already; wait a few seconds, then send yours")
        async with photos:
            try:
                data = await request.body()
            except ClientDisconnect:
                raise HTTPException(400, "the connection ended before the photograph did") from None
            return await asyncio.to_thread(trials.run, served, data)
