"""Health and metadata of the Open Inference Protocol, version 2. Frames go over gRPC; see the .proto file."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

import bitneck
from bitneck_cloud.api import schemas
from bitneck_cloud.api.readiness import Readiness
from bitneck_cloud.api.wire import SERVICE
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.sessions.registry import Registry

__all__ = ["add_open_inference"]


def add_open_inference(app: FastAPI, registry: Registry, readiness: Readiness, guarded: list[Any]) -> None:
    """Add the paths below ``/v2`` to the application.

    Args:
        app: the application.
        registry: models.
        readiness: whether the server takes new work.
        guarded: dependencies that ask for the credential.
    """
    tags: list[Any] = ["open inference protocol"]

    @app.get("/v2", dependencies=guarded, tags=tags)
    async def server_metadata() -> dict[str, str | list[str]]:
        """The server's name, version and extensions."""
        return {"name": "bitneck", "version": bitneck.__version__, "extensions": [SERVICE]}

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
    async def model_metadata(name: str, version: str | None = None) -> schemas.ModelMetadata:
        """What a model takes and gives."""
        return schemas.model_metadata(of_version(name, version))
