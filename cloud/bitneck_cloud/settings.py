"""Settings of the cloud server. This is their only home: flags, variables, help and documents are made from it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from bitneck.errors import InvalidConfig
from bitneck.runtime import CPU
from bitneck.settings.model import Address, JsonTable, Names, Paths, Settings, Tables, setting
from bitneck_cloud.access.bearers import MIN_SECRET_CHARACTERS
from bitneck_cloud.answers.sinks.settings import SinkTables, check_sinks
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.tables import RateTable, book_of

__all__ = ["CloudSettings"]

_SERVE, _ACCESS, _COMPUTE, _SESSIONS, _FLEET, _ANSWERS, _SINKS, _STOP, _OBSERVE = (
    "Serving", "Access", "Computing", "Sessions", "Fleet", "Answers", "Sinks", "Stopping", "Logs and traces",
)  # fmt: skip


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class CloudSettings(Settings):
    """Flags, then ``BITNECK_CLOUD_*``, then the file, then these defaults."""

    model_config = SettingsConfigDict(env_prefix="BITNECK_CLOUD_")

    bundle: Annotated[Paths, setting("Folder of a bundle. Repeat it to serve several models.", _SERVE)] = ()
    grpc: Annotated[str, setting("HOST:PORT where devices connect.", _SERVE)] = "127.0.0.1:50051"
    http: Annotated[str, setting("HOST:PORT where the control API listens.", _SERVE)] = "127.0.0.1:8080"

    candidates: Annotated[
        Path | None,
        setting(
            "Folder of bundles, each in a folder of its own, that the control API may give to some clients first. "
            "Without it, it can give none.",
            _SERVE,
        ),
    ] = None
    canary_photos: Annotated[
        Path | None,
        setting(
            "Folder of photographs. When such a bundle is tried, the server runs the edge's half of both bundles on "
            "up to 200 of them, in the background, and compares the answers.",
            _SERVE,
        ),
    ] = None

    http_token: Annotated[
        SecretStr | None,
        setting(
            "Bearer token of the control API, with the role operate. Unless it listens on loopback only, this or "
            "http_tokens is needed.",
            _ACCESS,
        ),
    ] = None
    http_tokens: Annotated[
        Path | None,
        setting(
            "File of further tokens of the control API, a line each: ROLE NAME TOKEN, where ROLE is metrics, read or "
            "operate. The server reads the file again when it changes.",
            _ACCESS,
        ),
    ] = None
    http_hosts: Annotated[
        Names,
        setting(
            "Name under which the control API may be called, beside loopback's. Repeat it. Without it, a server that "
            "listens on loopback knows loopback's names only, and another one takes every name.",
            _ACCESS,
            flag="--http-host",
        ),
    ] = ()
    try_photos: Annotated[
        bool,
        setting(
            "Let operators try photographs in the console: the server then runs the edge's half too, on all cores, one "
            "photograph at a time.",
            _ACCESS,
        ),
    ] = False
    device_token: Annotated[
        SecretStr | None, setting("Bearer token that gRPC asks devices for, one for all devices.", _ACCESS)
    ] = None
    device_tokens: Annotated[
        Path | None,
        setting(
            "File of the devices' own tokens, a line each: NAME TOKEN. The server reads the file again when it "
            "changes, and ends the streams of the tokens that are gone.",
            _ACCESS,
        ),
    ] = None
    insecure: Annotated[
        bool,
        setting(
            "Allow plaintext on addresses that other machines can reach. Everybody on the way can then read tokens and "
            "frames. For a network that you trust, or behind a proxy that has TLS.",
            _ACCESS,
        ),
    ] = False
    tls_cert: Annotated[
        Path | None,
        setting("PEM file of the certificate chain for gRPC and HTTP. Without it there is no TLS.", _ACCESS),
    ] = None
    tls_key: Annotated[Path | None, setting("PEM file of the key of tls_cert.", _ACCESS)] = None
    tls_client_ca: Annotated[
        Path | None,
        setting("PEM file of authorities. Devices must then show a certificate of one of them (mutual TLS).", _ACCESS),
    ] = None
    http_tls_client_ca: Annotated[
        Path | None, setting("PEM file of authorities for clients of the control API (mutual TLS).", _ACCESS)
    ] = None
    token_key: Annotated[
        SecretStr | None,
        setting(
            "Signs resume tokens. Give all replicas the same key, so that each of them can resume every session. "
            "Without it, a random key of this process.",
            _ACCESS,
        ),
    ] = None
    token_max_age_s: Annotated[
        float,
        setting("Seconds that a resume token is valid. Every resume gives a fresh one.", _ACCESS, gt=0, le=31_536_000),
    ] = 86400.0

    providers: Annotated[
        Names,
        setting(
            "Execution provider of ONNX Runtime. Repeat it, the preferred one first.", _COMPUTE, flag="--provider",
            min_length=1,
        ),
    ] = CPU  # fmt: skip
    threads: Annotated[
        int, setting("Threads of ONNX Runtime inside one operator; 0 for every core.", _COMPUTE, ge=0, le=1024)
    ] = 0
    decode_threads: Annotated[
        int, setting("Threads that decode frames while the engine computes others; 0 for none.", _COMPUTE, ge=0, le=64)
    ] = 1
    # Beyond 16 a batch gains little on a CPU and delays its first frame.
    max_batch: Annotated[int, setting("Frames in one batch, at most.", _COMPUTE, ge=1, le=1024)] = 16
    max_batch_ms: Annotated[float, setting("A batch that takes this long gets no more frames.", _COMPUTE, gt=0)] = 50
    max_queue: Annotated[
        int,
        setting("Frames of all sessions that may wait for the engine. More are refused.", _COMPUTE, ge=1, le=1_000_000),
    ] = 1024

    window: Annotated[int, setting("Unanswered frames that a session may have.", _SESSIONS, ge=1, le=1024)] = 16
    max_sessions: Annotated[
        int, setting("Sessions that are kept, disconnected ones included.", _SESSIONS, ge=1, le=1_000_000)
    ] = 1024
    max_sessions_per_caller: Annotated[
        int,
        setting(
            "Sessions that one caller may have; 0 for no limit. A caller is a device's certificate or its own token, "
            "else an address. Raise it where many devices come from one address.",
            _SESSIONS,
            ge=0,
            le=1_000_000,
        ),
    ] = 256
    max_calls_per_caller: Annotated[
        int, setting("Open gRPC calls of one caller; 0 for no limit.", _SESSIONS, ge=0, le=1_000_000)
    ] = 512
    max_calls_per_connection: Annotated[
        int,
        setting(
            "Open gRPC calls of one connection; more wait at the client, or open another connection. The more, the "
            "longer a flood of calls that are reset at once keeps others waiting.",
            _SESSIONS,
            ge=2,
            le=1_000_000,
        ),
    ] = 16
    max_connections: Annotated[
        int,
        setting(
            "Open connections of gRPC. Fewer, where the process may not open as many files.",
            _SESSIONS,
            ge=1,
            le=1_000_000,
        ),
    ] = 4096
    max_frames_per_s: Annotated[
        float,
        setting(
            "Frames a second of one caller in the long run, single ones included; 0 for no limit.",
            _SESSIONS,
            ge=0,
            le=1e6,
        ),
    ] = 0.0
    max_bytes_per_s: Annotated[
        float,
        setting(
            "Payload bytes a second that a session, or a caller without one, may send in the long run, with bursts "
            "of a second or 64 KiB; 0 for no limit.",
            _SESSIONS,
            ge=0,
            le=1e12,
        ),
    ] = 0.0
    similar_bytes: Annotated[
        int,
        setting(
            "Bytes of answered frames' symbols that a session keeps, so that later frames may be coded against them; 0 "
            "for none.",
            _SESSIONS,
            ge=0,
            le=1 << 30,
        ),
    ] = 1 << 18
    idle_s: Annotated[
        float,
        setting(
            "Seconds without a message after which a stream ends. Its session can be resumed. 0 for never.",
            _SESSIONS,
            ge=0,
            le=604_800,
        ),
    ] = 900.0
    stall_s: Annotated[
        float,
        setting(
            "Seconds that a client may take to open its stream, to read one message, and to read what waits on a "
            "connection of HTTP; then its call or connection ends. 0 for ever.",
            _SESSIONS,
            ge=0,
            le=3600,
        ),
    ] = 20.0
    earlier: Annotated[
        Path | None,
        setting(
            "Folder in which the server keeps the bundles that it had, so that it can decode frames which devices have "
            "spooled. Without it, only the bundle before the last reload is kept, in memory.",
            _SESSIONS,
        ),
    ] = None
    earlier_most: Annotated[
        int, setting("With earlier: bundles of each model beside the newest one.", _SESSIONS, ge=1, le=1000)
    ] = 8
    earlier_days: Annotated[
        float,
        setting(
            "With earlier: days after which a bundle that is not served or used any more is removed. Give more than "
            "the spool_age of the devices.",
            _SESSIONS,
            gt=0,
            le=3650,
        ),
    ] = 30.0
    resume_s: Annotated[
        float, setting("Seconds that a session outlives its connection.", _SESSIONS, ge=0, le=86400)
    ] = 60.0
    assumed_fps: Annotated[
        float, setting("Frame rate that max_kbps assumes until a session has shown its own.", _SESSIONS, gt=0, le=1000)
    ] = 10.0

    server_name: Annotated[
        str,
        setting("Name of this server in the documents of answers. Without it, the name of the host.", _ANSWERS,
                pattern=r"^[A-Za-z0-9._-]{0,128}$"),
    ] = ""  # fmt: skip
    max_subscribers: Annotated[
        int, setting("Subscribers to answers at once, over HTTP and gRPC together.", _ANSWERS, ge=1, le=100_000)
    ] = 128
    kept_answers: Annotated[
        int,
        setting(
            "Newest answers that are kept in memory for subscribers that come back or are slow.", _ANSWERS, ge=1,
            le=10_000_000,
        ),
    ] = 2048  # fmt: skip
    kept_answer_bytes: Annotated[
        int,
        setting("Bytes of them at most, with their class maps and documents.", _ANSWERS, ge=1 << 16, le=1 << 40),
    ] = 32 << 20
    heartbeat_s: Annotated[
        float,
        setting("Seconds without an answer after which a subscriber gets a sign of life.", _ANSWERS, ge=0.1, le=3600),
    ] = 15.0
    state_db: Annotated[
        Path | None,
        setting(
            "SQLite file on a local disk, where this server alone keeps rules of rates, canaries, promotions and what "
            "it knows of clients. Without it, all of that is forgotten when the server ends.",
            _FLEET,
        ),
    ] = None
    rates: Annotated[
        Tables[RateTable],
        setting(
            "Rule of rates: a table with one of point, max_bytes_per_frame, max_kbps, min_accuracy and auto, and if "
            "wanted clients and model (patterns). If it is given, be it an empty list, the control API cannot change "
            "rules. As a flag, repeat it, each time a JSON object.",
            _FLEET,
            flag="--rate",
        ),
    ] = ()
    groups: Annotated[
        JsonTable[tuple[str, ...]],
        setting(
            "Lists of patterns of clients' names, by the name of a group, for rules and filters. As a flag, JSON.",
            _FLEET,
        ),
    ] = {}  # noqa: RUF012  a field
    max_clients: Annotated[
        int,
        setting("Clients that are remembered after they are gone. The oldest are forgotten.", _FLEET, ge=0, le=100_000),
    ] = 10_000
    sinks: Annotated[
        Tables[SinkTables],
        setting("Where answers go in the cloud: a table [[sinks]] for each. See docs/sinks.md.", _SINKS, flag=None),
    ] = ()
    sinks_queue: Annotated[
        Path | None, setting("File of the queue of all sinks, on a local disk. Sinks need it.", _SINKS)
    ] = None
    sinks_sync: Annotated[
        Literal["second", "always"],
        BeforeValidator(_lower),
        setting(
            "When queued answers are forced to the disk: once a second, or always before their devices get them. "
            "Either way they outlive the server's process; with second, a power cut may cost the last two seconds.",
            _SINKS,
        ),
    ] = "second"

    drain_delay_s: Annotated[
        float,
        setting(
            "Seconds that a stopping server still takes streams while it is not ready any more: the time that a load "
            "balancer needs to notice.",
            _STOP,
            ge=0,
            le=3600,
        ),
    ] = 0.0
    drain_s: Annotated[
        float, setting("Seconds that a stopping server waits for unanswered frames.", _STOP, ge=0, le=3600)
    ] = 10.0

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(_lower),
        setting("Least important messages that are logged.", _OBSERVE),
    ] = "info"
    log_format: Annotated[Literal["text", "json"], BeforeValidator(_lower), setting("Form of log lines.", _OBSERVE)] = (
        "text"
    )
    traces: Annotated[
        str,
        setting(
            "URL of an OpenTelemetry collector (OTLP over gRPC). Without it there are no traces.",
            _OBSERVE,
            pattern=r"^(https?://\S+)?$",
        ),
    ] = ""
    trace_ratio: Annotated[
        float,
        setting("Share of the frames that are traced. Frames of traced callers always are.", _OBSERVE, ge=0, le=1),
    ] = 0.01

    @property
    def rates_are_fixed(self) -> bool:
        """Whether rules of rates are given here, be it an empty list: the control API cannot change them then."""
        return "rates" in self.model_fields_set

    @model_validator(mode="after")
    def _check(self) -> Self:
        open_to_others = [name for name in ("grpc", "http") if not Address.parse(getattr(self, name)).loopback]
        if "http" in open_to_others and self.http_token is None and self.http_tokens is None:
            raise ValueError(
                "the control API would be open to the network: set http_token (BITNECK_CLOUD_HTTP_TOKEN) or "
                "http_tokens, or listen on 127.0.0.1"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or none")
        if self.tls_cert is None and (self.tls_client_ca or self.http_tls_client_ca):
            raise ValueError("client certificates need TLS: give tls_cert and tls_key too")
        if open_to_others and self.tls_cert is None and not self.insecure:
            raise ValueError(
                f"{' and '.join(open_to_others)} would send plaintext over the network: give tls_cert and tls_key, "
                "listen on 127.0.0.1, or allow it with insecure (--insecure) where you trust the network"
            )
        try:
            groups = Groups(self.groups)
            book_of(self.rates, groups)
        except InvalidConfig as exc:
            raise ValueError(str(exc)) from exc
        check_sinks(self.sinks, self.sinks_queue, groups)
        for name in ("http_token", "device_token", "token_key"):
            secret: SecretStr | None = getattr(self, name)
            if secret is not None and len(secret.get_secret_value()) < MIN_SECRET_CHARACTERS:
                raise ValueError(f"{name} is too short: give at least {MIN_SECRET_CHARACTERS} random characters")
        return self
