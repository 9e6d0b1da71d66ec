"""The proxy that tests of links use: what is cut is cut, at whatever moment, and the proxy ends."""

import asyncio

from bitneck_testing.links import Proxy

HANG_S = 10.0


async def test_a_connection_that_is_cut_while_it_is_made_ends() -> None:
    """Its other half is not there yet. The client does nothing about it."""

    async def target(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(target, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with asyncio.timeout(HANG_S), server, Proxy(f"{host}:{port}") as link:
        reader, writer = await asyncio.open_connection(*link.address.split(":"))
        while not link.accepted:  # noqa: ASYNC110  it goes on to its target in this very turn of the loop
            await asyncio.sleep(0)
        link.cut()
        assert await reader.read() == b""
        link.mend()
    writer.close()
