"""Who may call: TLS credentials from files, and bearer tokens of devices, checked before any work."""

import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from bitneck.errors import BitneckError, InvalidConfig, PermissionDenied, Unauthenticated
from bitneck_cloud.aborting import abort
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.access.callers import bearer_token, host_of
from bitneck_cloud.observe.audit import RefusalLog
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["SUBSCRIBE", "DeviceTokens", "ReaderTokens", "aborting", "grpc_credentials", "tls_files_usable"]

_GUARDED = re.compile(r"/(bitneck\.|grpc\.reflection\.)")

SUBSCRIBE = "/Subscribe"
"""End of the method that `ReaderTokens` guards, and no device's token opens."""

_READERS = (Role.READ, Role.OPERATE)


class _TokenCheck(grpc.aio.ServerInterceptor):
    """What both checks of tokens have."""

    def __init__(self, tokens: BearerTokens, metrics: Metrics, refusals: RefusalLog) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._refusals = refusals

    def _refusing(self, handler: Any, exc: BitneckError) -> Any:
        """A handler that refuses its calls, counts and logs that."""

        def count(context: Any) -> None:
            self._metrics.refused(exc.grpc_status)
            self._refusals.refused(f"address {host_of(context.peer() or '')}", exc.grpc_status)

        return aborting(handler, exc, count)


class DeviceTokens(_TokenCheck):
    """Refuses calls of our service and of reflection without a bearer token of a device; health checks stay open.

    Args:
        tokens: that devices may send as ``authorization: Bearer TOKEN``.
        metrics: counts refusals.
        refusals: logs them.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Pass the call on, or replace it by a handler that aborts it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not _GUARDED.match(method) or method.endswith(SUBSCRIBE):
            return handler
        if self._tokens.find(bearer_token(handler_call_details.invocation_metadata)) is not None:
            return handler
        exc = Unauthenticated("this server asks devices for a bearer token; give it with --token or BITNECK_EDGE_TOKEN")
        return self._refusing(handler, exc)


class ReaderTokens(_TokenCheck):
    """Refuses ``Subscribe`` without a bearer token of the control API whose role may read.

    A server that has no such token refuses every call: the port of gRPC may be reachable from where the control API is
    not.

    Args:
        tokens: of the control API.
        metrics: counts refusals.
        refusals: logs them.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Pass the call on, or replace it by a handler that aborts it."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.endswith(SUBSCRIBE):
            return handler
        holder = self._tokens.find(bearer_token(handler_call_details.invocation_metadata))
        exc: BitneckError
        if holder is None:
            setting = "" if self._tokens.needed else "; this server has none: set http_tokens or http_token"
            exc = Unauthenticated(
                "Subscribe asks for a bearer token of the control API with the role read or operate, not for a "
                f"device's{setting}"
            )
        elif holder.role in _READERS:
            return handler
        else:
            exc = PermissionDenied(f"a token of the role {holder.role} may not read answers; it needs read or operate")
        return self._refusing(handler, exc)


def aborting(handler: Any, exc: BitneckError, refused: Callable[[Any], None]) -> Any:
    """A handler that ends every call with an error.

    Args:
        handler: the one that it stands for.
        exc: the error.
        refused: called with the context of each call.
    """

    async def refuse(_request: Any, context: Any) -> None:
        refused(context)
        await abort(context, exc)

    # Without a deserializer: who may not call has nothing parsed.
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def grpc_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Credentials of the gRPC server. With `client_ca`, it asks clients for a certificate of that authority.

    Raises:
        InvalidConfig: a file cannot be read, or is no certificate or key.
    """
    tls_files_usable(cert, key, client_ca)
    authority = client_ca.read_bytes() if client_ca is not None else None
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())], root_certificates=authority, require_client_auth=authority is not None
    )


def tls_files_usable(cert: Path, key: Path, client_ca: Path | None) -> None:
    """Load the files as a server does, because gRPC itself would only log an error, and refuse every client.

    Raises:
        InvalidConfig: a file cannot be read, is no certificate or key, or the two do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # an encrypted key is refused, not asked about
    except (OSError, ssl.SSLError) as exc:
        raise InvalidConfig(
            f"tls_cert {cert} and tls_key {key} cannot be used ({exc}); "
            "give a PEM certificate and its PEM key, without a passphrase"
        ) from exc
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as exc:
            raise InvalidConfig(f"tls_client_ca {client_ca} cannot be used ({exc}); give PEM certificates") from exc
