"""The HTTP listener with answers that take long to read: who reads them slowly gets them, who does not is closed."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bitneck.settings.model import Address
from bitneck_cloud.api.http_server import HttpServer, listen
from bitneck_cloud.observe.audit import RefusalLog

STALL_S = 0.5
ANSWER = bytes(range(256)) * 12_000


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        return
    headers = [(b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


@contextlib.asynccontextmanager
async def asking() -> AsyncIterator[socket.socket]:
    """A client that has asked, and whose system keeps little of what it does not read."""
    server = HttpServer(application, {}, RefusalLog(), stall_s=STALL_S)
    sockets = listen(Address("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets))
    await server.listening.wait()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, sockets[0].getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield client
    server.should_exit = True
    await serving


async def test_an_answer_that_is_read_slowly_is_read_to_its_end() -> None:
    async with asyncio.timeout(60), asking() as client:
        loop = asyncio.get_running_loop()
        got = bytearray()
        begin = loop.time()
        while not got.endswith(ANSWER):
            data = await loop.sock_recv(client, 1 << 17)
            assert data, "the server ended the connection"
            got += data
            await asyncio.sleep(len(data) / len(ANSWER) * 4 * STALL_S)
        assert loop.time() - begin > 3 * STALL_S


async def test_an_answer_that_is_not_read_is_cut_off() -> None:
    async with asyncio.timeout(60), asking() as client:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(4 * STALL_S)
        size = 0
        with pytest.raises(ConnectionResetError):
            while data := await loop.sock_recv(client, 1 << 17):
                size += len(data)
            raise ConnectionResetError  # closed without the rest
        assert size < len(ANSWER)
