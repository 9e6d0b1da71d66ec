"""Settings of the cloud server."""

from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.config import Address, Settings

__all__ = ["CloudSettings"]


class CloudSettings(Settings):
    """Flags > ``BITNECK_CLOUD_*`` > file > these defaults.

    Attributes:
        grpc: where edges connect.
        http: where the control API listens.
        http_token: what the control API asks for as a bearer token; needed unless it listens on loopback only.
        threads: of ONNX Runtime inside one operator; 0 for every core.
        max_batch: frames in one pass through the tail. Beyond 16 a batch gains little on a CPU and delays its first.
        max_queue: frames that wait for the engine, over all sessions, before new ones are refused.
        window: unanswered frames of a session.
        max_sessions: sessions kept, disconnected ones included.
        resume_s: how long a session outlives its connection.
        drain_s: how long a stopping server waits for unanswered frames.
        assumed_fps: frame rate that `max_kbps` counts on until a session has shown its own.
    """

    model_config = SettingsConfigDict(env_prefix="BITNECK_CLOUD_")

    grpc: str = "127.0.0.1:50051"
    http: str = "127.0.0.1:8080"
    http_token: SecretStr | None = None
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    window: Annotated[int, Field(ge=1, le=1024)] = 16
    max_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    resume_s: Annotated[float, Field(ge=0, le=86400)] = 60.0
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    assumed_fps: Annotated[float, Field(gt=0, le=1000)] = 10.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        Address.parse(self.grpc)
        if not Address.parse(self.http).loopback and self.http_token is None:
            raise ValueError(
                "the control API would be open to the network: set http_token (BITNECK_CLOUD_HTTP_TOKEN), "
                "or listen on 127.0.0.1"
            )
        return self
