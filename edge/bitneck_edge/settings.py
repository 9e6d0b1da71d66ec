"""Settings of the edge client."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.config import Address, Settings
from bitneck_edge.link.remote import Access

__all__ = ["AUTO", "EdgeSettings"]

AUTO = "auto"
"""In place of an operating point: the client chooses, frame by frame."""


class EdgeSettings(Settings):
    """Flags > ``BITNECK_EDGE_*`` > file > these defaults.

    Attributes:
        server: HOST:PORT of the cloud's gRPC.
        tls: encrypt the link.
        tls_ca: PEM authorities of the server's certificate; None for the system's. Implies `tls`, like the next two.
        tls_cert: this device's PEM certificate, where the server asks for one.
        tls_key: its PEM key.
        token: this device's bearer token, where the server asks for one.
        model: which of the server's models; empty for the only one.
        point: operating point to begin with, or ``auto`` to choose one for each frame by what the link and the device
            can do; empty for the cloud's wish, or the ladder's best.
        latency_ms: with ``auto``, from a picture to its answer, at most.
        max_edge_ms: with ``auto``, head and encoder may take so long, which decides among split points; 0 for any time.
        bundle_id: refuse a server with any other bundle; empty for whatever it serves.
        client: name for the cloud's logs and sessions list.
        cache_dir: where bundles are kept; None for the user's cache folder.
        threads: of ONNX Runtime inside one operator of the head; 0 for every core.
        workers: photographs that are loaded and encoded at once; 0 for two, or one where there is only one core.
        in_flight: frames that may be unanswered; 0 for the server's window, and with ``newest`` for as many as the
            distance asks for.
        deadline_ms: from a frame's receipt in the cloud; 0 for none.
        similar: code a picture against one before it where that is smaller: ``on``, ``off``, or ``auto`` for what comes
            from videos, cameras and streams.
        key_every: of so many frames at least one is then coded by itself.
        connect_timeout_s: for one attempt to connect.
        retries: attempts after the first, before the server counts as unreachable; -1 for no end.
        answer_timeout_s: an unanswered frame of this age means that the link is dead; so does a download that pauses
            as long.
    """

    model_config = SettingsConfigDict(env_prefix="BITNECK_EDGE_")

    server: str = "127.0.0.1:50051"
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: SecretStr | None = None
    model: str = ""
    point: str = ""
    latency_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 300
    max_edge_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 0.0
    bundle_id: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    client: Annotated[str, Field(max_length=128)] = "bitneck-edge"
    cache_dir: Path | None = None
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    in_flight: Annotated[int, Field(ge=0, le=1024)] = 0
    deadline_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0
    similar: Literal["auto", "on", "off"] = "auto"
    key_every: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    connect_timeout_s: Annotated[float, Field(gt=0, le=600)] = 3.0
    retries: Annotated[int, Field(ge=-1, le=1_000_000)] = 3
    answer_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 15.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        Address.parse(self.server)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or none")
        return self

    @property
    def access(self) -> Access:
        """Where the cloud is, and how it lets this device in."""
        return Access(
            address=self.server,
            tls=self.tls or self.tls_ca is not None or self.tls_cert is not None,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            token=self.token.get_secret_value() if self.token is not None else "",
        )
