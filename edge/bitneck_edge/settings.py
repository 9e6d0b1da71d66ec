"""Settings of the edge client."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.config import Address, Settings

__all__ = ["EdgeSettings"]


class EdgeSettings(Settings):
    """Flags > ``BITNECK_EDGE_*`` > file > these defaults.

    Attributes:
        server: HOST:PORT of the cloud's gRPC.
        model: which of the server's models; empty for the only one.
        point: operating point to begin with; empty for the cloud's wish, or the ladder's best.
        bundle_id: refuse a server with any other bundle; empty for whatever it serves.
        client: name for the cloud's logs and sessions list.
        cache_dir: where bundles are kept; None for the user's cache folder.
        threads: of ONNX Runtime inside one operator of the head; 0 for every core.
        deadline_ms: from a frame's receipt in the cloud; 0 for none.
        connect_timeout_s: for one attempt to connect.
        retries: attempts after the first, before the server counts as unreachable.
        answer_timeout_s: an unanswered frame of this age means that the link is dead; so does a download that pauses
            as long.
    """

    model_config = SettingsConfigDict(env_prefix="BITNECK_EDGE_")

    server: str = "127.0.0.1:50051"
    model: str = ""
    point: str = ""
    bundle_id: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    client: Annotated[str, Field(max_length=128)] = "bitneck-edge"
    cache_dir: Path | None = None
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    deadline_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 0
    connect_timeout_s: Annotated[float, Field(gt=0, le=600)] = 3.0
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    answer_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 15.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        Address.parse(self.server)
        return self
