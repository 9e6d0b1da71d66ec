"""The gRPC listener: the services, the interceptors before them, and the limits of its connections."""

import warnings

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck_cloud.access.bearers import BearerTokens
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.access.security import DeviceTokens, ReaderTokens
from bitneck_cloud.api.call_limits import CallLimits
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.api.old_protocol import OldProtocol
from bitneck_cloud.api.parsing import TolerantParsing
from bitneck_cloud.api.wire import SERVICE
from bitneck_cloud.observe.audit import RefusalLog
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.settings import CloudSettings

__all__ = ["HEALTH_NAMES", "make_grpc_server"]

HEALTH_NAMES = ("", SERVICE)
"""What health checks may ask about."""

_SINGLE_CALLS = 1024
"""Calls that may be open beside the streams of all sessions."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a load balancer
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Without these two a client can queue 4 MB at a server that does not read.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.keepalive_time_ms", 30_000),  # a half-open connection is found within 40 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Whoever connects must speak within ten seconds, and a connection without calls is closed.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # Whoever resets calls may open fewer for a round trip, after each reset: a flood of them takes less from others.
    ("grpc.http.overload_protection", 1),
    ("grpc.http2.ping_on_rst_stream_percent", 100),
    # In a flood of calls, gRPC cancels calls of everybody beyond these. More would take more memory.
    ("grpc.server.max_pending_requests", 5_000),
    ("grpc.server.max_pending_requests_hard_limit", 6_000),
)


def make_grpc_server(
    settings: CloudSettings,
    service: InferenceService,
    limits: CallerLimits,
    devices: BearerTokens,
    operators: BearerTokens,
    metrics: Metrics,
    refusals: RefusalLog,
    *,
    credentials: grpc.ServerCredentials | None,
    max_connections: int,
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int]:
    """A server that is bound to its port and not started.

    Args:
        settings: address and limits.
        service: of ours.
        limits: of the callers.
        devices: tokens.
        operators: tokens of the control API, which subscribers need.
        metrics: counts refusals.
        refusals: logs them.
        credentials: of TLS; None for plaintext.
        max_connections: that are open at once.

    Returns:
        The server, the servicer of health checks, and the port.

    Raises:
        InvalidConfig: the port is taken.
    """
    # grpc.aio makes a coroutine for the requests of each call; calls that are refused never read any.
    warnings.filterwarnings("ignore", "coroutine '_MessageReceiver", RuntimeWarning)
    address = Address.parse(settings.grpc)
    interceptors: list[grpc.aio.ServerInterceptor] = [
        ReaderTokens(operators, metrics, refusals),
        CallLimits(limits, devices, operators, metrics, refusals),
        TolerantParsing(),
    ]
    if devices.needed:
        interceptors.insert(0, DeviceTokens(devices, metrics, refusals))
    options = (
        *_OPTIONS,
        ("grpc.max_allowed_incoming_connections", max_connections),
        # gRPC takes all that a connection may begin in one go, and everybody else waits so long.
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
    )
    most = settings.max_sessions + _SINGLE_CALLS
    server = grpc.aio.server(options=options, interceptors=interceptors, maximum_concurrent_rpcs=most)
    pb_grpc.add_SplitInferenceServicer_to_server(service, server)
    server.add_generic_rpc_handlers((OldProtocol(),))
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if credentials is not None:
            port = server.add_secure_port(str(address), credentials)
        else:
            port = server.add_insecure_port(str(address))
    except RuntimeError as exc:
        raise InvalidConfig(f"gRPC cannot listen on {address}; is another server running there?") from exc
    return server, servicer, port
