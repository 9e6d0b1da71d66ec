"""The HTTP control API: models, sessions and rates. Errors are RFC 9457 problem details."""

import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import bitneck
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.ladder import ClientChooses, FixedPoint, MaxBytesPerFrame, MaxKbps, MinAccuracy, RatePolicy, choose
from bitneck_cloud.access.security import same_secret
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.engine.outputs import output_tensors
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.faults import public_text
from bitneck_cloud.observe.logs import REQUEST_ID_HEADER, new_request_id
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.reload import Reloader
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Session

__all__ = ["RateRequest", "Readiness", "build_app"]

PROBLEM_TYPE = "application/problem+json"
MAX_BODY_BYTES = 16384
"""Of a request; it is looked at before anything is read, and before the credential."""


class Readiness:
    """Whether the server takes new work; the program sets it."""

    def __init__(self) -> None:
        self.ready = False


class RateRequest(BaseModel):
    """Exactly one of these."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    point: str | None = Field(None, description="id of an operating point")
    max_bytes_per_frame: float | None = Field(None, gt=0, description="mean payload bytes of a frame, at most")
    max_kbps: float | None = Field(None, gt=0, description="mean payload rate at the session's frame rate, kbit/s")
    min_accuracy: float | None = Field(None, ge=0, le=1, description="measured accuracy, at least, a fraction")
    auto: Literal[True] | None = Field(None, description="the client chooses")

    def policy(self) -> RatePolicy:
        """The one that is given.

        Raises:
            InvalidConfig: none, or more than one.
        """
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise InvalidConfig(
                f"give exactly one of point, max_bytes_per_frame, max_kbps, min_accuracy and auto; got {len(given)}"
            )
        match given:
            case {"point": str(point)}:
                return FixedPoint(point)
            case {"max_bytes_per_frame": float(limit)}:
                return MaxBytesPerFrame(limit)
            case {"max_kbps": float(limit)}:
                return MaxKbps(limit)
            case {"auto": True}:
                return ClientChooses()
            case _:
                return MinAccuracy(given["min_accuracy"])


class RateAnswer(BaseModel):
    """What was set."""

    policy: dict[str, str | float | bool]
    point: str | None = Field(description="the operating point chosen; null where the client chooses")
    pushed: bool = Field(description="whether a connected client was told at once")


class NewSessionsRate(BaseModel):
    """What new sessions begin with."""

    policy: dict[str, str | float | bool]
    points: dict[str, str | None] = Field(description="the operating point chosen, by model")


class PointInfo(BaseModel):
    """An operating point, as measured."""

    id: str
    split: str
    stride: int
    channels: int
    step: float
    latent_shape: tuple[int, int, int]
    payload_bytes: float
    bpp_payload: float
    accuracy: float
    agreement: float
    dataset: str
    images: int


class TensorInfo(BaseModel):
    """A tensor, as the Open Inference Protocol describes one."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    """A served model; its ladder is in order of rate."""

    name: str
    bundle_id: str
    task: str
    backbone: str
    input_height: int = Field(description="pixels")
    input_width: int
    classes: int
    outputs: list[TensorInfo] = Field(description="of an answer")
    uncompressed_accuracy: float = Field(description="top-1, or mean IoU for segmentation")
    points: list[PointInfo]


class ReloadAnswer(BaseModel):
    """What a reload changed."""

    bundle_id: str
    changed: bool = Field(description="false where the folder holds the bundle that is served already")
    added: list[str] = Field(description="operating points")
    removed: list[str]
    altered: list[str]
    files_loaded: int = Field(description="ONNX files read; what the two bundles share was not")


class ModelMetadata(BaseModel):
    """A model, as the Open Inference Protocol describes one. Its versions are bundle ids."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class SessionInfo(BaseModel):
    """A session, connected or waiting to be resumed."""

    id: str
    client: str
    model: str
    bundle_id: str
    connected: bool
    age_s: float
    policy: dict[str, str | float | bool] | None
    point_asked: str | None = Field(description="the point that the policy chose")
    point_last_used: str | None = Field(description="the point of the newest frame")
    frames_answered: int
    frames_resent: int
    frames_dropped: int
    frames_in_flight: int
    faults: dict[str, int] = Field(description="by gRPC status number")
    payload_bytes_mean: float | None
    frames_per_s: float


def build_app(
    registry: Registry,
    service: InferenceService,
    readiness: Readiness,
    token: str | None,
    *,
    metrics: Metrics,
    reloader: Reloader,
) -> FastAPI:
    """The application.

    Args:
        registry: models and sessions.
        service: through which a rate reaches a client.
        readiness: for ``/readyz``.
        token: the bearer token that everything but the health paths asks for, or None.
        metrics: for ``/metrics``.
        reloader: of models.
    """
    bearer = HTTPBearer(auto_error=False)

    def authorized(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        given = credentials.credentials if credentials is not None else ""
        if token is not None and not same_secret(given, token):
            metrics.refused("UNAUTHENTICATED")
            raise HTTPException(401, "this server's control API needs its bearer token", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(
        title="bitneck cloud", version=bitneck.__version__, description="Models, sessions, and the rates they run at."
    )
    guarded = [Depends(authorized)]
    problems: dict[int | str, dict[str, Any]] = {
        "4XX": {"description": "problem details", "content": {PROBLEM_TYPE: {}}}
    }
    _add_error_handlers(app)

    @app.middleware("http")
    async def identify(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        value = new_request_id(request.headers.get(REQUEST_ID_HEADER, ""))
        size = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers:
            response: Response = _problem(request, 411, None, "send the body with a Content-Length")
        elif not size.isdecimal() or int(size) > MAX_BODY_BYTES:
            response = _problem(request, 413, None, f"a body has at most {MAX_BODY_BYTES} bytes here")
        else:
            response = await call_next(request)
        response.headers[REQUEST_ID_HEADER] = value
        return response

    @app.get("/healthz", tags=["health"])
    def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"], responses={503: {"description": "not ready"}})
    def readyz() -> JSONResponse:
        """The models are loaded, and the server is not stopping."""
        status = "ready" if readiness.ready else "not ready"
        return JSONResponse({"status": status}, 200 if readiness.ready else 503)

    @app.get("/v1/models", dependencies=guarded, responses=problems, tags=["models"])
    async def models() -> list[ModelInfo]:
        """Every served model with its ladder."""
        return [_model_info(served) for served in registry.models.values()]

    @app.get("/v1/models/{name}", dependencies=guarded, responses=problems, tags=["models"])
    async def model(name: str) -> ModelInfo:
        """One served model with its ladder."""
        return _model_info(registry.model(name))

    @app.post("/v1/models/{name}/reload", dependencies=guarded, responses=problems, tags=["models"])
    async def reload(name: str) -> ReloadAnswer:
        """Load the model's bundle again from its folder, and swap; where that fails, the old one goes on serving."""
        done = await reloader.reload(name)
        return ReloadAnswer(
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

    _add_open_inference(app, registry, readiness, guarded)

    @app.get("/v1/sessions", dependencies=guarded, responses=problems, tags=["sessions"])
    async def sessions() -> list[SessionInfo]:
        """Every session, oldest first."""
        now = time.monotonic()
        return [_session_info(s, connected=service.connected(s), now=now) for s in registry.sessions(now)]

    @app.get("/v1/sessions/{session_id}", dependencies=guarded, responses=problems, tags=["sessions"])
    async def session(session_id: str) -> SessionInfo:
        """One session."""
        now = time.monotonic()
        found = registry.session(session_id, now)
        return _session_info(found, connected=service.connected(found), now=now)

    @app.put("/v1/sessions/{session_id}/rate", dependencies=guarded, responses=problems, tags=["rate"])
    async def put_session_rate(session_id: str, request: RateRequest) -> RateAnswer:
        """Change a session's rate: its client uses the new point from its next frame on."""
        found = registry.session(session_id, time.monotonic())
        policy = request.policy()
        point = found.set_policy(policy)
        text = ", ".join(f"{k}={v}" for k, v in _policy_dict(policy).items())
        pushed = service.push_point(found, point or "", f"control API: {text}")
        return RateAnswer(policy=_policy_dict(policy), point=point, pushed=pushed)

    @app.put("/v1/rate", dependencies=guarded, responses=problems, tags=["rate"])
    async def put_rate(request: RateRequest) -> NewSessionsRate:
        """The rate that new sessions begin with; open sessions keep theirs."""
        policy = request.policy()
        points: dict[str, str | None] = {}
        refused: BitneckError | None = None
        for name, served in registry.models.items():
            try:
                chosen = choose(served.ladder, policy)
                points[name] = chosen.id if chosen is not None else None
            except BitneckError as exc:
                refused = exc
        if not points and refused is not None:
            raise refused
        registry.new_session_policy = policy
        return NewSessionsRate(policy=_policy_dict(policy), points=points)

    return app


def _add_open_inference(app: FastAPI, registry: Registry, readiness: Readiness, guarded: list[Any]) -> None:
    """Health and metadata of the Open Inference Protocol, version 2; frames go over gRPC, see the .proto."""
    tags: list[Any] = ["open inference protocol"]

    @app.get("/v2", dependencies=guarded, tags=tags)
    async def server_metadata() -> dict[str, str | list[str]]:
        """The server's name, version and extensions."""
        return {"name": "bitneck", "version": bitneck.__version__, "extensions": ["bitneck.v1.SplitInference"]}

    @app.get("/v2/health/live", tags=tags)
    def live() -> dict[str, bool]:
        """The process lives."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=tags)
    def ready() -> JSONResponse:
        """The server takes new work."""
        return JSONResponse({"ready": readiness.ready}, 200 if readiness.ready else 503)

    def of_version(name: str, version: str | None) -> ServedModel:
        return registry.model(name) if version is None else registry.generation(name, version)

    @app.get("/v2/models/{name}/ready", dependencies=guarded, tags=tags)
    @app.get("/v2/models/{name}/versions/{version}/ready", dependencies=guarded, tags=tags)
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        """A model, or one of its bundles, is served."""
        of_version(name, version)
        return JSONResponse({"ready": readiness.ready}, 200 if readiness.ready else 503)

    @app.get("/v2/models/{name}", dependencies=guarded, tags=tags)
    @app.get("/v2/models/{name}/versions/{version}", dependencies=guarded, tags=tags)
    async def model_metadata(name: str, version: str | None = None) -> ModelMetadata:
        """What a model takes and gives."""
        served = of_version(name, version)
        return ModelMetadata(
            name=served.name,
            versions=[served.bundle.bundle_id],
            platform="onnxruntime_onnx",
            inputs=[
                TensorInfo(name="point", datatype="BYTES", shape=[1]),
                TensorInfo(name="payload", datatype="BYTES", shape=[1]),
            ],
            outputs=_outputs(served),
        )


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(BitneckError)
    async def bitneck_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, BitneckError)
        return _problem(request, exc.http_status, type(exc).__name__, public_text(exc))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        return _problem(request, exc.status_code, None, str(exc.detail), dict(exc.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        details = "; ".join(f"{'.'.join(str(p) for p in e['loc'][1:]) or 'body'}: {e['msg']}" for e in exc.errors())
        sent = request.headers.get("content-type", "")
        if request.method == "PUT" and not sent.partition(";")[0].strip().lower().endswith("json"):
            details += f"; the body has the type {sent[:80] or '(none)'}, send it with Content-Type: application/json"
        return _problem(request, 422, "InvalidRequest", details)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _exc: Exception) -> JSONResponse:
        return _problem(request, 500, None, "an internal error; the server's log says why")


def _problem(
    request: Request, status: int, kind: str | None, detail: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """RFC 9457."""
    body = {
        "type": f"urn:bitneck:error:{kind}" if kind else "about:blank",
        "title": kind or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
    }
    return JSONResponse(body, status, headers, media_type=PROBLEM_TYPE)


def _policy_dict(policy: RatePolicy) -> dict[str, str | float | bool]:
    match policy:
        case FixedPoint(point):
            return {"point": point}
        case MaxBytesPerFrame(limit):
            return {"max_bytes_per_frame": limit}
        case MaxKbps(limit):
            return {"max_kbps": limit}
        case MinAccuracy(accuracy):
            return {"min_accuracy": accuracy}
        case ClientChooses():
            return {"auto": True}


def _outputs(served: ServedModel) -> list[TensorInfo]:
    tensors = output_tensors(served.manifest, len(served.labels))
    return [TensorInfo(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape)) for tensor in tensors]


def _model_info(served: ServedModel) -> ModelInfo:
    manifest = served.manifest
    entries = {entry.id: entry for entry in manifest.points}
    points = [PointInfo.model_validate(entries[p.id].model_dump(exclude={"measured"})) for p in manifest.ladder]
    return ModelInfo(
        name=manifest.name,
        bundle_id=served.bundle.bundle_id,
        task=manifest.task,
        backbone=manifest.backbone,
        input_height=manifest.input.height,
        input_width=manifest.input.width,
        classes=len(served.labels),
        outputs=_outputs(served),
        uncompressed_accuracy=manifest.uncompressed_accuracy,
        points=points,
    )


def _session_info(session: Session, *, connected: bool, now: float) -> SessionInfo:
    return SessionInfo(
        id=session.session_id,
        client=session.client,
        model=session.model,
        bundle_id=session.bundle_id,
        connected=connected,
        age_s=now - session.created,
        policy=None if session.policy is None else _policy_dict(session.policy),
        point_asked=session.asked_point,
        point_last_used=session.last_point,
        frames_answered=session.answered,
        frames_resent=session.resent,
        frames_dropped=session.dropped,
        frames_in_flight=session.in_flight,
        faults={str(code): count for code, count in session.faults.items()},
        payload_bytes_mean=session.payload_bytes / session.accepted if session.accepted else None,
        frames_per_s=session.frames_per_s,
    )
