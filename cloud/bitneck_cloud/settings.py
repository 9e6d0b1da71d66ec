"""Settings of the cloud server."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.config import Address, Settings
from bitneck.runtime import CPU

__all__ = ["CloudSettings"]

_MIN_KEY_CHARACTERS = 16


class CloudSettings(Settings):
    """Flags > ``BITNECK_CLOUD_*`` > file > these defaults.

    Attributes:
        grpc: where edges connect.
        http: where the control API listens.
        http_token: what the control API asks for as a bearer token; needed unless it listens on loopback only.
        device_token: what gRPC asks devices for as a bearer token; None for nothing.
        tls_cert: PEM certificate chain for gRPC and HTTP; None for no TLS.
        tls_key: its PEM key.
        tls_client_ca: PEM authorities; devices must then show a certificate of one of them (mutual TLS).
        http_tls_client_ca: likewise for the control API.
        token_key: signs resume tokens; the same on every replica, so that each takes every returning client. None for
            a random one of this process.
        token_max_age_s: how long a resume token is good for; a fresh one comes with every resume.
        providers: of ONNX Runtime, the preferred one first.
        traces: URL of an OpenTelemetry collector that takes OTLP over gRPC; empty for no traces.
        trace_ratio: share of the frames that are traced; those of a traced caller always are.
        threads: of ONNX Runtime inside one operator; 0 for every core.
        max_batch: frames in one pass through the tail. Beyond 16 a batch gains little on a CPU and delays its first.
        decode_threads: that decode frames while the engine computes others; 0 for none.
        max_queue: frames that wait for the engine, over all sessions, before new ones are refused.
        window: unanswered frames of a session.
        max_sessions: sessions kept, disconnected ones included.
        max_bytes_per_s: payload bytes that a session may send in the long run, with bursts of a second or 64 KiB; 0
            for any number.
        similar_bytes: of answered frames' symbols that a session keeps, so that others may refer to them; 0 for none.
        idle_s: a stream that sends nothing for so long is closed; its session can be resumed. 0 for never.
        resume_s: how long a session outlives its connection.
        drain_delay_s: how long a stopping server, not ready any more, still takes streams: the time that a load
            balancer needs to notice.
        drain_s: how long a stopping server waits for unanswered frames.
        assumed_fps: frame rate that `max_kbps` counts on until a session has shown its own.
    """

    model_config = SettingsConfigDict(env_prefix="BITNECK_CLOUD_")

    grpc: str = "127.0.0.1:50051"
    http: str = "127.0.0.1:8080"
    http_token: SecretStr | None = None
    device_token: SecretStr | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    http_tls_client_ca: Path | None = None
    token_key: SecretStr | None = None
    token_max_age_s: Annotated[float, Field(gt=0, le=31_536_000)] = 86400.0
    providers: Annotated[tuple[str, ...], Field(min_length=1)] = CPU
    traces: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    decode_threads: Annotated[int, Field(ge=0, le=64)] = 1
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    window: Annotated[int, Field(ge=1, le=1024)] = 16
    max_sessions: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_bytes_per_s: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    similar_bytes: Annotated[int, Field(ge=0, le=1 << 30)] = 1 << 18
    idle_s: Annotated[float, Field(ge=0, le=604_800)] = 900.0
    drain_delay_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
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
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or none")
        if self.tls_cert is None and (self.tls_client_ca or self.http_tls_client_ca):
            raise ValueError("client certificates need TLS: give tls_cert and tls_key too")
        if self.token_key is not None and len(self.token_key.get_secret_value()) < _MIN_KEY_CHARACTERS:
            raise ValueError(
                f"token_key is too short to sign with: give at least {_MIN_KEY_CHARACTERS} random characters"
            )
        return self
