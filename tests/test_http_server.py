"""The HTTP listener with answers that take long to read: who reads them slowly gets them, who does not is closed."""

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bitneck.settings.model import Address
from bitneck_cloud.api import http_server
from bitneck_cloud.api.http_server import HttpServer, listen
from bitneck_cloud.observe.audit import RefusalLog
from bitneck_testing.authority import Authority

STALL_S = 0.5
ANSWER = bytes(range(256)) * 12_000


PART = bytes(1 << 14)
HANG_S = 60.0


class Application:
    """Answers `/` with one text, `/events` with parts without an end; `given` counts the bytes of these."""

    def __init__(self) -> None:
        self.given = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        if scope["path"] == "/":
            headers = [(b"content-length", str(len(ANSWER)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": ANSWER})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(self._gone(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": PART, "more_body": True})
            self.given += len(PART)
            await asyncio.sleep(0)

    @staticmethod
    async def _gone(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class Client:
    """A client on a socket, whose system keeps little of what it does not read. It reads nothing by itself."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        self._connection = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="127.0.0.1") if context else None

    async def ask(self, path: str) -> None:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        if self._tls is not None:
            await self._run(self._tls.do_handshake)
            self._tls.write(request)
            request = self._out.read()
        await loop.sock_sendall(self._connection, request)

    async def read(self, size: int) -> bytes:
        if self._tls is not None:
            return bytes(await self._run(functools.partial(self._tls.read, size)))
        return await asyncio.get_running_loop().sock_recv(self._connection, size)

    async def _run(self, act: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(self._connection, self._out.read())
                if data := await loop.sock_recv(self._connection, 1 << 17):
                    self._in.write(data)
                else:
                    self._in.write_eof()


@contextlib.asynccontextmanager
async def asking(
    path: str, tls: Path | None, *, stall_s: float = STALL_S, application: Application | None = None
) -> AsyncIterator[Client]:
    """A client over plaintext, or over TLS with certificates in a folder; the server stops at the end."""
    options, context = {}, None
    if tls is not None:
        authority = Authority(tls)
        certificate, key = authority.issue("server")
        options = {"ssl_certfile": certificate, "ssl_keyfile": key}
        context = ssl.create_default_context(cafile=authority.ca)
    server = HttpServer(application or Application(), options, RefusalLog(), stall_s=stall_s)
    sockets = listen(Address("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets))
    await server.listening.wait()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, sockets[0].getsockname())
        client = Client(connection, context)
        await client.ask(path)
        yield client
        server.should_exit = True
        await serving


@pytest.fixture(params=["plaintext", "TLS"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "TLS" else None


async def test_an_answer_that_is_read_slowly_is_read_to_its_end(tls: Path | None) -> None:
    async with asyncio.timeout(HANG_S), asking("/", tls) as client:
        loop = asyncio.get_running_loop()
        got = bytearray()
        begin = loop.time()
        while not got.endswith(ANSWER):
            data = await client.read(1 << 17)
            assert data, "the server ended the connection"
            got += data
            await asyncio.sleep(len(data) / len(ANSWER) * 4 * STALL_S)
        assert loop.time() - begin > 3 * STALL_S


async def test_an_answer_that_is_not_read_is_cut_off(tls: Path | None) -> None:
    async with asyncio.timeout(HANG_S), asking("/", tls) as client:
        await asyncio.sleep(4 * STALL_S)
        size = 0
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            while data := await client.read(1 << 17):
                size += len(data)
            raise ConnectionResetError  # closed without the rest
        assert size < len(ANSWER)


async def test_events_that_nobody_reads_take_bounded_memory_and_end(tls: Path | None) -> None:
    application = Application()
    async with asyncio.timeout(HANG_S), asking("/events", tls, application=application) as client:
        await asyncio.sleep(4 * STALL_S)
        # The system's buffer, which Linux doubles, and the client's; and that of asyncio, under TLS two.
        assert application.given < 640 << 10
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            while await client.read(1 << 17):
                pass
            raise ConnectionResetError


@pytest.mark.parametrize("path", ["/", "/events"])
async def test_a_stop_does_not_wait_for_who_reads_nothing(
    path: str, tls: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_GRACE_S", 3600)
    async with asyncio.timeout(HANG_S), asking(path, tls, stall_s=0.0):
        await asyncio.sleep(STALL_S)
