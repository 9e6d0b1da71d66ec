"""The HTTP control API: models, sessions and rates. Errors are RFC 9457 problem details."""

import time
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer

import bitneck
from bitneck.errors import BitneckError, InvalidConfig
from bitneck_cloud.answers.http_events import add_answers
from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.showing import add_sinks
from bitneck_cloud.answers.subscriptions import Subscriptions
from bitneck_cloud.api import schemas
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.api.open_inference import add_open_inference
from bitneck_cloud.api.problems import PROBLEM_TYPE, add_error_handlers
from bitneck_cloud.api.readiness import Readiness
from bitneck_cloud.bundles.watching import ServedFolders
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.canary.routes import add_canary
from bitneck_cloud.console.routes import add_console
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.routes import add_fleet
from bitneck_cloud.fleet.tables import RateRequest, policy_dict
from bitneck_cloud.observe.audit import RecentChanges, record
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.reload import Reloader
from bitneck_cloud.sessions.registry import Registry

__all__ = ["build_app"]


def build_app(
    registry: Registry,
    service: InferenceService,
    readiness: Readiness,
    *,
    metrics: Metrics,
    reloader: Reloader,
    canaries: Canaries,
    folders: ServedFolders,
    subscriptions: Subscriptions,
    fleet: Fleet,
    engine: Engine,
    changes: RecentChanges,
    try_photos: bool = False,
    outgoing: Outgoing,
) -> FastAPI:
    """The application. It lets everybody in: `bitneck_cloud.api.http_guard.HttpGuard` stands before it.

    Args:
        registry: models and sessions.
        service: tells a rate to a client.
        readiness: for ``/readyz``.
        metrics: for ``/metrics``.
        reloader: of models.
        canaries: likewise.
        folders: of the bundles in use.
        subscriptions: to answers.
        fleet: rules of rates, and clients.
        engine: for the console.
        changes: likewise.
        try_photos: whether photographs may be tried in the console.
        outgoing: sinks of answers.
    """
    app = FastAPI(
        title="bitneck cloud",
        version=bitneck.__version__,
        description="Models, sessions, and the rates they run at.",
        docs_url=None,  # the console has the page, without scripts from elsewhere
        redoc_url=None,
    )
    # The first one says in openapi.json what the guard asks for.
    guarded = [Depends(HTTPBearer(auto_error=False)), Depends(_refuse_unknown_query)]
    problems: dict[int | str, dict[str, Any]] = {
        "4XX": {"description": "problem details", "content": {PROBLEM_TYPE: {}}}
    }
    add_error_handlers(app)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"])
    def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"], responses={503: {"description": "not ready"}})
    def readyz() -> JSONResponse:
        """The models are loaded, and the server is not stopping."""
        status = "ready" if readiness.ready else "not ready"
        return JSONResponse({"status": status}, 200 if readiness.ready else 503)

    @app.get("/v1/models", dependencies=guarded, responses=problems, tags=["models"])
    async def models() -> list[schemas.ModelInfo]:
        """Every served model with its ladder."""
        return [schemas.model_info(served, folders.problem(name)) for name, served in registry.models.items()]

    @app.get("/v1/models/{name}", dependencies=guarded, responses=problems, tags=["models"])
    async def model(name: str) -> schemas.ModelInfo:
        """One served model with its ladder."""
        served = registry.model(name)
        return schemas.model_info(served, folders.problem(served.name))

    @app.post("/v1/models/{name}/reload", dependencies=guarded, responses=problems, tags=["models"])
    async def reload(name: str) -> schemas.ReloadAnswer:
        """Load the model's bundle again from its folder, and swap. If that fails, the old one stays in service."""
        before = registry.model(name).bundle.bundle_id
        try:
            done = await reloader.reload(name)
        except BitneckError as exc:
            record("reload", name, before=before, after=f"failed: {type(exc).__name__}")
            raise
        record("reload", name, before=before, after=done.bundle_id)
        return schemas.ReloadAnswer(
            bundle_id=done.bundle_id,
            changed=done.changed,
            added=list(done.added),
            removed=list(done.removed),
            altered=list(done.altered),
            files_loaded=done.files_loaded,
        )

    @app.get("/metrics", dependencies=guarded, responses=problems, tags=["operation"])
    async def prometheus(request: Request) -> Response:
        """Prometheus metrics."""
        body, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, media_type=media_type)

    add_open_inference(app, registry, readiness, guarded)
    add_answers(app, subscriptions, registry, guarded, problems)
    add_console(
        app, registry, engine, readiness, changes,
        streams=lambda: service.streams, try_photos=try_photos, guarded=guarded, problems=problems,
    )  # fmt: skip
    add_sinks(app, outgoing, guarded, problems)
    add_canary(app, canaries, registry, service.connected, guarded, problems)

    @app.get("/v1/sessions", dependencies=guarded, responses=problems, tags=["sessions"])
    async def sessions() -> list[schemas.SessionInfo]:
        """Every session, oldest first."""
        now = time.monotonic()
        return [schemas.session_info(s, connected=service.connected(s), now=now) for s in registry.sessions(now)]

    @app.get("/v1/sessions/{session_id}", dependencies=guarded, responses=problems, tags=["sessions"])
    async def session(session_id: str) -> schemas.SessionInfo:
        """One session."""
        now = time.monotonic()
        found = registry.session(session_id, now)
        return schemas.session_info(found, connected=service.connected(found), now=now)

    @app.put("/v1/sessions/{session_id}/rate", dependencies=guarded, responses=problems, tags=["rate"])
    async def put_session_rate(session_id: str, request: RateRequest) -> schemas.RateAnswer:
        """Change a session's rate: its client uses the new point from its next frame on."""
        found = registry.session(session_id, time.monotonic())
        if found.spool:
            raise InvalidConfig(f"the frames of session {session_id} come from a spool: they are coded already")
        policy, before = request.policy(), found.policy
        point = found.set_policy(policy)
        record(
            "PUT rate", f"session {session_id}", before=policy_dict(before) if before is not None else None,
            after=policy_dict(policy),
        )  # fmt: skip
        text = ", ".join(f"{k}={v}" for k, v in policy_dict(policy).items())
        pushed = service.push_point(found, point or "", f"control API: {text}")
        return schemas.RateAnswer(policy=policy_dict(policy), point=point, pushed=pushed)

    add_fleet(app, fleet, guarded, problems)
    return app


def _refuse_unknown_query(request: Request) -> None:
    """A misspelt filter must not pass for none.

    Raises:
        InvalidConfig: the route has no query parameter of this name.
    """
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InvalidConfig(f"{request.scope['path']} has no query parameter {name[:80]!r}; {has}")
