"""The server: gRPC and HTTP on one event loop, from loading to the drained end."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bitneck.bundle import Bundle
from bitneck.config import Address
from bitneck.errors import InvalidConfig
from bitneck.frames import MAX_MESSAGE_BYTES
from bitneck.v1 import inference_pb2 as pb
from bitneck.v1 import inference_pb2_grpc as pb_grpc
from bitneck_cloud.engine import Engine
from bitneck_cloud.grpc_service import InferenceService
from bitneck_cloud.http_api import Readiness, build_app
from bitneck_cloud.models import ServedModel
from bitneck_cloud.registry import Registry
from bitneck_cloud.settings import CloudSettings

__all__ = ["Ready", "load_models", "serve"]

_LOG = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["SplitInference"].full_name
_HEALTH_NAMES = ("", _SERVICE)

_GRPC_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a load balancer
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Without these two a client can queue 4 MB at a server that does not read.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.keepalive_time_ms", 30_000),  # a half-open connection is found within 40 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a running server serves, and where."""

    grpc: str
    http: str
    models: dict[str, ServedModel]


def load_models(bundles: Sequence[Path], threads: int) -> dict[str, ServedModel]:
    """Verify and load bundles.

    Raises:
        InvalidConfig: no bundle, or two of one name.
        BundleError, ModelFailure: a bundle cannot be used.
    """
    models: dict[str, ServedModel] = {}
    for path in bundles:
        model = ServedModel(Bundle.open(path), threads=threads)
        if model.name in models:
            raise InvalidConfig(f"{path}: a model {model.name!r} is loaded already; give each bundle its own name")
        models[model.name] = model
    if not models:
        raise InvalidConfig("no bundle to serve: give --bundle DIR")
    return models


async def serve(settings: CloudSettings, bundles: Sequence[Path], on_ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        settings: addresses and limits.
        bundles: folders.
        on_ready: called once, when both ports take requests.

    Raises:
        InvalidConfig: a port is taken, or a bundle's folder is none.
        BundleError, ModelFailure: see `load_models`.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    models = await asyncio.to_thread(load_models, bundles, settings.threads)
    registry = Registry(
        models,
        window=settings.window,
        max_sessions=settings.max_sessions,
        resume_s=settings.resume_s,
        assumed_fps=settings.assumed_fps,
    )
    engine = Engine(max_batch=settings.max_batch, max_queue=settings.max_queue)
    service = InferenceService(registry, engine)
    readiness = Readiness()
    token = settings.http_token.get_secret_value() if settings.http_token is not None else None
    http = _HttpServer(
        uvicorn.Config(build_app(registry, service, readiness, token), log_config=None, access_log=False, ws="none")
    )
    with contextlib.closing(_listen(Address.parse(settings.http))) as http_socket:
        server, health_servicer, port = await _grpc_server(Address.parse(settings.grpc), service)
        engine.start()
        await server.start()
        http_task = asyncio.create_task(http.serve(sockets=[http_socket]))
        await http.listening.wait()
        for name in _HEALTH_NAMES:
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        readiness.ready = not stopping.is_set()
        grpc_host, http_host = Address.parse(settings.grpc).host, Address.parse(settings.http).host
        http_port = http_socket.getsockname()[1]
        on_ready(Ready(str(Address(grpc_host, port)), str(Address(http_host, http_port)), models))
        await stopping.wait()
        _LOG.info("stopping: waiting up to %.1f s for unanswered frames", settings.drain_s)
        readiness.ready = False
        await health_servicer.enter_graceful_shutdown()
        await service.drain("the server is stopping")
        await _streams_end(service, settings.drain_s)
        await server.stop(grace=1.0)
        await engine.stop()
        http.should_exit = True
        await http_task


async def _streams_end(service: InferenceService, limit_s: float) -> None:
    """Wait until every client has finished, at most `limit_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while service.streams:  # noqa: ASYNC110  only here, at the end, does anyone wait for all streams
                await asyncio.sleep(0.02)


async def _grpc_server(
    address: Address, service: InferenceService
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int]:
    server = grpc.aio.server(options=_GRPC_OPTIONS)
    pb_grpc.add_SplitInferenceServicer_to_server(service, server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(str(address))
    except RuntimeError as exc:
        raise InvalidConfig(f"gRPC cannot listen on {address}; is another server running there?") from exc
    return server, servicer, port


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as exc:
        raise InvalidConfig(f"HTTP cannot listen on {address} ({exc.strerror}); is another server there?") from exc


class _HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: the program has one way to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
