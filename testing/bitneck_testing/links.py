"""Thin, slow and broken links: a TCP proxy with a delay, a rate, cuts, and silence.

async with Proxy("127.0.0.1:50051", delay_s=0.02) as link:
    ... EdgeClient(link.address) ...
    link.cut()       # every connection ends, and new ones end at once
    link.mend()
    link.silence()   # half-open: connections stay, but nothing passes
"""

import asyncio
import contextlib
import multiprocessing
from contextlib import AbstractContextManager
from typing import Self

from bitneck_testing.processes import spawned_server

__all__ = ["Proxy", "proxy_process"]

_CHUNK = 16 * 1024


class Proxy:
    """Forwards TCP connections to one address.

    Args:
        target: HOST:PORT.
        delay_s: added each way.
        bits_per_s: the rate each way; None for no limit.

    Attributes:
        address: HOST:PORT to connect to, once the block is entered.
        bits_per_s: may be changed at any time.
        accepted: how many connections were taken so far.
    """

    def __init__(self, target: str, *, delay_s: float = 0.0, bits_per_s: float | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._delay = delay_s
        self.bits_per_s = bits_per_s
        self.accepted = 0
        self._passing = asyncio.Event()
        self._passing.set()
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self._passing.set()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """End every connection. New ones end at once, until `mend` is called."""
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Keep every connection, but let nothing pass until `mend` is called."""
        self._passing.clear()

    def mend(self) -> None:
        """Take new connections again, and let everything pass."""
        self._open = True
        self._passing.set()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not self._open:
            writer.transport.abort()
            return
        self.accepted += 1
        pair = {writer}
        self._writers |= pair  # also while the other half is made: a cut ends it
        try:
            there_reader, there = await asyncio.open_connection(*self._target)
            pair.add(there)
            if writer.transport.is_closing():
                return
            self._writers.add(there)
            both = [asyncio.create_task(self._pump(a, b)) for a, b in ((reader, there), (there_reader, writer))]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        except OSError:
            pass  # nobody listens there
        finally:
            self._writers -= pair
            for one in pair:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one direction. Data on its way waits in a queue, so that a delay costs no throughput."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                if (pause := due - loop.time()) > 0:
                    await asyncio.sleep(pause)
                await self._passing.wait()
                writer.write(data)
                await writer.drain()

        delivery = asyncio.create_task(deliver())
        free = 0.0
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(_CHUNK):
                    free = max(free, loop.time())
                    if self.bits_per_s is not None:
                        free += len(data) * 8 / self.bits_per_s
                    await waiting.put((free + self._delay, data))
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)


def _serve(target: str, delay_s: float, address: "multiprocessing.Queue[str]") -> None:
    async def main() -> None:
        async with Proxy(target, delay_s=delay_s) as proxy:
            address.put(proxy.address)
            await asyncio.get_running_loop().create_future()

    asyncio.run(main())


def proxy_process(target: str, *, delay_s: float) -> AbstractContextManager[str]:
    """A `Proxy` in a process of its own, so that it takes no time from the client's. Its address."""
    return spawned_server(_serve, target, delay_s)
