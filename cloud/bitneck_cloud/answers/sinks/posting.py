"""HTTP requests of one thread. Each ends by its deadline, however slowly the other side reads and answers.

The limits of HTTP libraries are for single steps: each byte that comes starts them again.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import httpcore
import httpx

__all__ = ["Poster", "Reply"]

_PIECE = 1 << 16
"""Bytes that are written in one step."""
_IDLE_S = 5.0
"""Seconds for which a connection is kept without a request: servers close theirs soon."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered.

    Attributes:
        status: of HTTP.
        retry_after: the header ``Retry-After``; empty if there is none.
        body: the first bytes of it.
    """

    status: int
    retry_after: str
    body: bytes


class Poster:
    """Posts to one URL, on a connection that is kept. For one thread.

    Args:
        url: where to.
        tls_ca: PEM file of the authorities to trust; None for those of certifi.
        proxy: URL of a proxy to go through; None for none.

    Raises:
        OSError: the authorities cannot be read.
    """

    def __init__(self, url: httpx.URL, *, tls_ca: Path | None, proxy: httpx.URL | None) -> None:
        self._url, self._host = _core(url), url.netloc
        self._network = network = _Network()
        trusted = ssl.create_default_context(cafile=tls_ca or certifi.where())
        if proxy is None:
            self._pool = httpcore.ConnectionPool(
                trusted, max_connections=1, keepalive_expiry=_IDLE_S, network_backend=network
            )
            return
        of_proxy = None
        if proxy.scheme == "https":
            of_proxy = network.bounded(ssl.create_default_context(cafile=certifi.where()))
        self._pool = httpcore.HTTPProxy(
            _core(proxy), ssl_context=trusted, proxy_ssl_context=of_proxy, max_connections=1,
            keepalive_expiry=_IDLE_S, network_backend=network,
        )  # fmt: skip

    def post(self, body: bytes, headers: Mapping[str, str], *, within_s: float, most: int) -> Reply:
        """Post once. Redirects are not followed.

        Args:
            body: of the request.
            headers: likewise, beside ``Host`` and ``Content-Length``.
            within_s: seconds for all of it; looking the host's name up is not counted.
            most: bytes of the answer's body that are read, about. The connection of a longer one is closed.

        Raises:
            TimeoutError: the time is up.
            OSError: there is no connection, or it breaks, or the other side does not speak HTTP.
        """
        self._network.end = time.monotonic() + within_s
        with contextlib.ExitStack() as broken:
            broken.callback(self.close)
            text = b""
            try:
                with self._pool.stream(
                    "POST", self._url, headers=[(b"Host", self._host), *headers.items()], content=body,
                    extensions={"timeout": {"pool": within_s}},
                ) as response:  # fmt: skip
                    for part in response.iter_stream():
                        text += part
                        if len(text) > most:
                            break
            except httpcore.TimeoutException as exc:
                raise TimeoutError(str(exc)) from exc
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as exc:
                raise OSError(str(exc) or type(exc).__name__) from exc
            broken.pop_all()
        found = {name.lower(): value for name, value in response.headers}
        return Reply(response.status, found.get(b"retry-after", b"").decode("latin-1"), text)

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        # The library keeps one that broke while a tunnel was opened, and would wait for its end.
        self._pool.close()


def _core(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _numeric(address: tuple[Any, ...]) -> str:
    """The address of a socket, with the interface where it is one of a link (IPv6)."""
    return f"{address[0]}%{address[3]}" if len(address) == 4 and address[3] else str(address[0])


class _Network(httpcore.NetworkBackend):
    """Connections whose every step ends by a deadline.

    Attributes:
        end: the deadline, on the monotonic clock.
    """

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()
        self.end = 0.0

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            httpcore.TimeoutException: none.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException("the time is up")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  the deadline counts
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """See `httpcore.NetworkBackend`. Of several addresses each gets its share of the time."""
        begin = time.monotonic()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:  # the latter: no host can have such a name
            raise httpcore.ConnectError(str(exc)) from exc
        self.end += time.monotonic() - begin
        addresses = list(dict.fromkeys(_numeric(each[4]) for each in found))
        for place, address in enumerate(addresses):
            share_s = self.left_s() / (len(addresses) - place)
            try:
                stream = self._inner.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if place == len(addresses) - 1:
                    raise
            else:
                return _Stream(stream, self)
        raise httpcore.ConnectError(f"{host} has no address")

    def bounded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Let the connections of a context end their steps so: for TLS in TLS, which the library does by itself."""
        left_s = self.left_s

        class Bounded(ssl.SSLSocket):
            def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
                self.settimeout(left_s())
                return super().recv(buflen, flags)

            def send(self, data: Any, flags: int = 0) -> int:
                self.settimeout(left_s())
                return super().send(data, flags)

        context.sslsocket_class = Bounded
        return context


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, network: _Network) -> None:
        self._inner, self._network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002  the deadline counts
        return self._inner.read(max_bytes, self._network.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002  likewise
        for begin in range(0, len(buffer), _PIECE):
            self._inner.write(buffer[begin : begin + _PIECE], self._network.left_s())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002  likewise
    ) -> httpcore.NetworkStream:
        with contextlib.ExitStack() as stack:
            stack.callback(self._inner.close)
            inner = self._inner.start_tls(ssl_context, server_hostname, self._network.left_s())
            stack.pop_all()
        return _Stream(inner, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
