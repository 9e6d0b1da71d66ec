"""HTTP requests of a thread that are over by a given moment, however slowly the other side reads and answers.

The library's own limits are for one step each, and a server that sends a byte now and then begins them anew.
"""

import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpcore
import httpx

__all__ = ["Poster", "Reply"]

_PIECE = 1 << 14
"""Bytes that are written under one limit."""
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
        proxy: URL of a proxy to go through; empty for none.

    Raises:
        OSError: the authorities cannot be read.
    """

    def __init__(self, url: httpx.URL, *, tls_ca: Path | None, proxy: str) -> None:
        self._url = _core(url)
        self._network = _Network()
        trusted = httpcore.default_ssl_context() if tls_ca is None else ssl.create_default_context(cafile=tls_ca)
        options: dict[str, Any] = {
            "ssl_context": trusted, "max_connections": 1, "keepalive_expiry": _IDLE_S, "network_backend": self._network,
        }  # fmt: skip
        if proxy:
            self._pool: httpcore.ConnectionPool = httpcore.HTTPProxy(_core(httpx.URL(proxy)), **options)
        else:
            self._pool = httpcore.ConnectionPool(**options)

    def post(self, body: bytes, headers: Mapping[str, str], *, within_s: float, most: int) -> Reply:
        """Post once. Redirects are not followed.

        Args:
            body: of the request.
            headers: likewise, beside ``Host`` and ``Content-Length``.
            within_s: seconds for all of it; names are looked up beside that.
            most: bytes of the answer's body that are read, about; the connection of a longer one is given up.

        Raises:
            TimeoutError: the time is up.
            OSError: there is no connection, or it breaks, or the other side does not speak HTTP.
        """
        self._network.end = time.monotonic() + within_s
        try:
            with self._pool.stream("POST", self._url, headers=list(headers.items()), content=body) as response:
                text = b""
                for part in response.iter_stream():
                    text += part
                    if len(text) > most:
                        break
        except httpcore.TimeoutException as exc:
            raise TimeoutError(str(exc)) from exc
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as exc:
            raise OSError(str(exc) or type(exc).__name__) from exc
        found = {name.lower(): value for name, value in response.headers}
        return Reply(response.status, found.get(b"retry-after", b"").decode("latin-1"), text)

    def close(self) -> None:
        """Close the connection."""
        self._pool.close()


def _core(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


class _Network(httpcore.NetworkBackend):
    """Connections whose every step ends by a moment.

    Attributes:
        end: that moment, on the monotonic clock.
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
        timeout: float | None = None,  # noqa: ARG002  the moment counts
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """See `httpcore.NetworkBackend`."""
        stream = self._inner.connect_tcp(host, port, self.left_s(), local_address, socket_options)
        return _Stream(stream, self)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, network: _Network) -> None:
        self._inner, self._network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002  the moment counts
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
        inner = self._inner.start_tls(ssl_context, server_hostname, self._network.left_s())
        return _Stream(inner, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
