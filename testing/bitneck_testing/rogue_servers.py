"""A real gRPC server that misbehaves on purpose, for what a right server never does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from bitneck.bundle import Bundle
from bitneck.v1 import inference_pb2 as pb
from bitneck.v1 import inference_pb2_grpc as pb_grpc

Converse = Callable[[Any], Awaitable[None]]


async def at_once(_path: str) -> None:
    """Before a file is handed out: no pause."""


async def answer_all(context: Any) -> None:
    """What a right server does, without computing."""
    await opened(context)
    while isinstance(message := await context.read(), pb.ClientMessage):
        await context.write(result(message.frame.seq))


async def opened(context: Any, window: int = 4) -> None:
    await context.read()
    await context.write(pb.ServerMessage(opened=pb.Opened(session_id="s-rogue", resume_token="t", window=window)))


def result(seq: int) -> pb.ServerMessage:
    labels = [pb.Label(index=seq % 10, name=f"answer {seq}", score=1.0)]
    output = pb.Output(classification=pb.Classification(labels=labels))
    return pb.ServerMessage(result=pb.Result(seq=seq, output=output))


class Rogue(pb_grpc.SplitInferenceServicer):
    def __init__(
        self,
        bundle: Bundle,
        converse: Converse,
        spoil: Callable[[str, bytes], bytes],
        before_fetch: Callable[[str], Awaitable[None]],
    ) -> None:
        self.bundle = bundle
        self.before_fetch = before_fetch
        self.converse = converse
        self.spoil = spoil
        self.streams = 0
        self.fetched: list[str] = []

    async def GetManifest(self, request: Any, context: Any) -> pb.GetManifestResponse:  # noqa: N802
        data = self.spoil("manifest.json", self.bundle.manifest_json)
        return pb.GetManifestResponse(model="tiny", bundle_id=self.bundle.bundle_id, manifest_json=data)

    async def FetchFile(self, request: Any, context: Any) -> AsyncIterator[pb.FileChunk]:  # noqa: N802
        self.fetched.append(request.path)
        await self.before_fetch(request.path)
        data = self.spoil(request.path, (self.bundle.root / request.path).read_bytes())
        for start in range(0, len(data), 1000):
            yield pb.FileChunk(data=data[start : start + 1000])

    async def Stream(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        self.streams += 1
        await self.converse(context)


@asynccontextmanager
async def rogue_server(
    bundle: Bundle,
    converse: Converse = answer_all,
    spoil: Callable[[str, bytes], bytes] = lambda _path, data: data,
    before_fetch: Callable[[str], Awaitable[None]] = at_once,
) -> AsyncIterator[tuple[str, Rogue]]:
    server = grpc.aio.server()
    rogue = Rogue(bundle, converse, spoil, before_fetch)
    pb_grpc.add_SplitInferenceServicer_to_server(rogue, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", rogue
    finally:
        await server.stop(grace=0)
        await asyncio.sleep(0)
