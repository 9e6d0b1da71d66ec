"""The door of the control API, before any route: request id, size, host, origin, and the caller's role."""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.requests import Request

from bitneck.errors import BitneckError
from bitneck.settings.model import Address
from bitneck_cloud.access.bearers import HTTP_ROLES, BearerTokens, Holder, Role
from bitneck_cloud.api.problems import problem
from bitneck_cloud.console.pages import is_page
from bitneck_cloud.observe.audit import RefusalLog, acting
from bitneck_cloud.observe.logs import REQUEST_ID_HEADER, new_request_id
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["MARK_HEADER", "MAX_BODY_BYTES", "MAX_PHOTO_BYTES", "HttpGuard", "KnownHosts"]

MAX_BODY_BYTES = 16384
"""Largest body of a request. It is checked before anything is read, and before the credential."""

MAX_PHOTO_BYTES = 8 << 20
"""The same where a photograph is sent. Only operators send any."""

MARK_HEADER = "x-bitneck-request"
"""A header that no web page can send to another origin without being asked first. Its value does not matter."""

_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"})
_TRY_PATH = re.compile(r"/v1/models/[^/]+/try")
_SAFE_METHODS = frozenset({"GET", "HEAD"})
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class KnownHosts:
    """The names under which this server may be addressed. A web page under another name then reaches nothing.

    Args:
        names: that the operator gives, without ports.
        listen: where the server listens. If that is loopback, only loopback's names and `names` are known. Elsewhere
            every host is known as long as `names` is empty, because calls need a token there.
    """

    def __init__(self, names: Iterable[str], listen: Address) -> None:
        self._names = {name.lower().strip("[]") for name in names}
        self._any = not self._names and not listen.loopback
        self._names |= _LOOPBACK_NAMES | {listen.host.lower()}

    def __contains__(self, authority: str) -> bool:
        return self._any or _host(authority) in self._names

    def allows_origin(self, origin: str, authority: str) -> bool:
        """Whether a page of this origin may call: its host is the one that it calls, or one that the operator names."""
        _, _, of_page = origin.partition("://")
        if of_page.lower() == authority.lower():
            return True
        return not self._any and _host(of_page) in self._names - _LOOPBACK_NAMES


def _host(authority: str) -> str:
    """The host of ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``, in lower case; empty if it is none of these."""
    text = authority.lower()
    host = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.rstrip(".")


class _Refused(BitneckError):
    def __init__(self, status: int, reason: str, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.headers = headers or {}


class HttpGuard:
    """Middleware that lets a request through, or answers it with a problem document.

    Args:
        app: the application behind it.
        tokens: of the control API.
        hosts: under which the server may be addressed.
        metrics: counts refusals.
        refusals: logs them.
    """

    def __init__(
        self, app: Asgi, *, tokens: BearerTokens, hosts: KnownHosts, metrics: Metrics, refusals: RefusalLog
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._hosts = hosts
        self._metrics = metrics
        self._refusals = refusals

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is no request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        identity = new_request_id(request.headers.get(REQUEST_ID_HEADER, ""))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), identity.encode())]
            await send(message)

        peer = request.client.host if request.client is not None else "(unknown)"
        acting.set(f"anyone ({peer})")
        try:
            _check_size(request)
            if not _open(request):
                holder = request.state.holder = self._admit(request)
                acting.set(f"{holder if holder is not None else 'anyone'} ({peer})")
        except _Refused as exc:
            self._metrics.refused(exc.reason)
            self._refusals.refused(f"address {peer}", exc.reason)
            answer = problem(request, exc.status, None, str(exc), exc.headers)
            await answer(scope, receive, sending)
            return
        await self._app(scope, receive, sending)

    def _admit(self, request: Request) -> Holder | None:
        """The holder of the request's token; None where none is needed."""
        authority = request.headers.get("host", "")
        if authority not in self._hosts:
            raise _Refused(
                421, "UNKNOWN_HOST", f"this server is not known as {authority[:80]!r}; its operator can add it to "
                "http_hosts",
            )  # fmt: skip
        origin = request.headers.get("origin")
        if origin is not None and not self._hosts.allows_origin(origin, authority):
            raise _Refused(
                403, "FOREIGN_ORIGIN", f"pages of {origin[:80]!r} may not call this server; its operator can add the "
                "page's host to http_hosts",
            )  # fmt: skip
        holder = self._holder(request) if self._tokens.needed else None
        if request.method not in _SAFE_METHODS and holder is None and not _deliberate(request):
            raise _Refused(
                403, "NO_MARK", f"send a body with Content-Type: application/json, or the header {MARK_HEADER}: 1, so "
                "that no web page can send this for you",
            )  # fmt: skip
        return holder

    def _holder(self, request: Request) -> Holder:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        holder = self._tokens.find(given) if scheme.lower() == "bearer" else None
        if holder is None:
            raise _Refused(
                401, "UNAUTHENTICATED", "this server's control API needs its bearer token",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        needed = _role_for(request)
        if HTTP_ROLES.index(holder.role) < HTTP_ROLES.index(needed):
            raise _Refused(
                403, "PERMISSION_DENIED", f"a token of the role {holder.role} may not do this; it needs {needed}"
            )
        return holder


def _open(request: Request) -> bool:
    """Whether everybody may see this: health, and the console's files."""
    path = request.scope["path"]
    return request.method in _SAFE_METHODS and (path in _OPEN_PATHS or is_page(path))


def _check_size(request: Request) -> None:
    size = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers:
        raise _Refused(411, "NO_LENGTH", "send the body with a Content-Length")
    most = MAX_PHOTO_BYTES if _TRY_PATH.fullmatch(request.scope["path"]) else MAX_BODY_BYTES
    if not size.isdecimal() or int(size) > most:
        raise _Refused(413, "TOO_LARGE", f"a body has at most {most} bytes here")


def _role_for(request: Request) -> Role:
    if request.method not in _SAFE_METHODS:
        return Role.OPERATE
    return Role.METRICS if request.scope["path"] == "/metrics" else Role.READ


def _deliberate(request: Request) -> bool:
    """Whether a browser would ask this server before it sends such a request for a page of another origin."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or MARK_HEADER in request.headers
