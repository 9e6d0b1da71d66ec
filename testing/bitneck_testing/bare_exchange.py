"""A gRPC exchange with nothing of bitneck around it: what the real path is compared with.

Both sides do the same work inside ONNX Runtime as edge and cloud do for a frame, and send 200 bytes each way. There is
no coding, no protobuf, no batcher and no session.
"""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck_testing.processes import spawned_server

__all__ = ["BareExchange", "BareWork", "bare_server", "open_exchange"]

MESSAGE = bytes(200)


class BareWork:
    """The work of a frame inside ONNX Runtime, on zeros, in a thread of its own. Each method returns its seconds.

    Args:
        bundle: the bundle.
        point_id: the operating point.
        threads: of ONNX Runtime; 0 for its default.
    """

    def __init__(self, bundle: Bundle, point_id: str, threads: int = 0) -> None:
        point = bundle.manifest.ladder[point_id]
        self._chain, self._pool = SegmentChain(bundle, threads=threads), ThreadPoolExecutor(1)
        self._encoder, self._decoder = PointEncoder(bundle, point), PointDecoder(bundle, point)
        self._head = self._chain.head_length(point.split)
        self._x = np.zeros((1, 3, bundle.manifest.input.height, bundle.manifest.input.width), np.float32)
        self._y = np.zeros((1, *point.latent_shape), np.float32)

    async def edge(self) -> float:
        """Head and encoder."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._edge)

    async def cloud(self) -> float:
        """Decoder and tail."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._cloud)

    def _edge(self) -> float:
        begin = time.perf_counter()
        self._encoder.latent(self._chain.run(self._x, 0, self._head))
        return time.perf_counter() - begin

    def _cloud(self) -> float:
        begin = time.perf_counter()
        self._chain.run(self._decoder.decode(self._y), self._head, len(self._chain))
        return time.perf_counter() - begin


def _serve(bundle: Path | None, point: str, address: "multiprocessing.Queue[str]") -> None:
    async def main() -> None:
        work = BareWork(Bundle.open(bundle), point) if bundle is not None else None

        async def handle(_: Any, context: Any) -> None:
            while (await context.read()) is not grpc.aio.EOF:
                seconds = await work.cloud() if work is not None else 0.0
                await context.write(np.float64(seconds).tobytes() + MESSAGE)

        server = grpc.aio.server()
        method: Any = grpc.stream_stream_rpc_method_handler(handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {"Exchange": method}),))
        address.put(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())


def bare_server(bundle: Path | None = None, point: str = "") -> AbstractContextManager[str]:
    """The server's side in a process of its own. Its address.

    Args:
        bundle: folder of the bundle; None for a server that computes nothing.
        point: the operating point.
    """
    return spawned_server(_serve, bundle, point)


class BareExchange:
    """The client's side: one open stream."""

    def __init__(self, call: Any, work: BareWork) -> None:
        self._call, self._work = call, work

    async def once(self) -> float:
        """Compute, send, and wait for the answer. Returns the seconds inside ONNX Runtime on both sides."""
        inside = await self._work.edge()
        await self._call.write(MESSAGE)
        return inside + float(np.frombuffer((await self._call.read())[:8])[0])


@asynccontextmanager
async def open_exchange(address: str, work: BareWork) -> AsyncIterator[BareExchange]:
    """A stream to a `bare_server`, for the length of a block."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.stream_stream("/bare.Bare/Exchange")()
        yield BareExchange(call, work)
        call.cancel()
