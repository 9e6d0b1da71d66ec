"""A page for Prometheus: ``GET`` or ``HEAD /metrics`` and nothing else, within limits of time, size and connections."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

import h11

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address

__all__ = ["serve_page"]

_LOG = logging.getLogger(__name__)
_MOST_CONNECTIONS = 8
_MOST_REQUEST_BYTES = 8192
_REQUEST_S = 5.0
"""For a request to come and its answer to go."""
TEXT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@contextlib.asynccontextmanager
async def serve_page(address: str, page: Callable[[], bytes]) -> AsyncIterator[Address]:
    """Serve a page for the length of a block.

    On loopback it answers requests for loopback only, whatever name another page has given to this address.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        page: its text, asked for at each request.

    Yields:
        Where it is served.

    Raises:
        InvalidConfig: nothing can listen there.
    """
    where, open_now = Address.parse(address), set[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        try:
            if len(open_now) <= _MOST_CONNECTIONS:
                async with asyncio.timeout(_REQUEST_S):
                    await _answer(reader, writer, page, loopback=where.loopback)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            open_now.discard(writer)
            writer.close()

    try:
        server = await asyncio.start_server(serve, where.host, where.port, limit=_MOST_REQUEST_BYTES)
    except OSError as exc:
        raise InvalidConfig(
            f"metrics: cannot listen on {address} ({exc.strerror or exc}); give another address (--metrics HOST:PORT)"
        ) from exc
    try:
        bound = Address(where.host, server.sockets[0].getsockname()[1])
        _LOG.info("metrics are at http://%s/metrics", bound)
        yield bound
    finally:
        server.close()
        for writer in list(open_now):
            writer.transport.abort()


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, page: Callable[[], bytes], *, loopback: bool
) -> None:
    """One request, one answer; the connection ends then."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_REQUEST_BYTES)
    status, text, method = 400, b"this is no request of HTTP\n", b""
    with contextlib.suppress(h11.RemoteProtocolError):
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await reader.read(_MOST_REQUEST_BYTES))
        if not isinstance(event, h11.Request):
            return
        method = event.method
        status, text = _page_of(event, page, loopback=loopback)
    kind = TEXT_TYPE if status == 200 else b"text/plain; charset=utf-8"
    headers = [(b"content-length", b"%d" % len(text)), (b"content-type", kind), (b"cache-control", b"no-store")]
    headers.append((b"connection", b"close"))
    reason = HTTPStatus(status).phrase.encode()
    writer.write(http.send(h11.Response(status_code=status, headers=headers, reason=reason)) or b"")
    if method != b"HEAD":
        writer.write(http.send(h11.Data(data=text)) or b"")
    writer.write(http.send(h11.EndOfMessage()) or b"")
    await writer.drain()


def _page_of(request: h11.Request, page: Callable[[], bytes], *, loopback: bool) -> tuple[int, bytes]:
    """Status and text."""
    host = next((value for name, value in request.headers if name == b"host"), b"").decode("latin-1")
    if loopback and not _is_loopback(host):
        return 421, b"ask for 127.0.0.1 or localhost\n"
    if request.target.partition(b"?")[0] != b"/metrics":
        return 404, b"the metrics are at /metrics\n"
    if request.method not in (b"GET", b"HEAD"):
        return 405, b"use GET\n"
    return 200, page()


def _is_loopback(host: str) -> bool:
    """Whether a ``Host`` header names loopback."""
    try:
        return Address.parse(host if host.rpartition(":")[2].isdigit() else f"{host}:80").loopback
    except InvalidConfig:
        return False
