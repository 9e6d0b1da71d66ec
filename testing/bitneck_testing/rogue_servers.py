"""A real gRPC server that misbehaves on purpose."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc

__all__ = ["Converse", "Rogue", "answer_all", "opened", "result", "rogue_server"]

Converse = Callable[[Any], Awaitable[None]]
"""Serves one stream, given the call's context."""


async def at_once(_path: str) -> None:
    """No pause before a file is sent."""


def in_thousands(data: bytes) -> Iterator[bytes]:
    """Chunks of 1,000 bytes."""
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


async def answer_all(context: Any) -> None:
    """Serve a stream as a right server does, but with made-up results."""
    await opened(context)
    while isinstance(message := await context.read(), pb.ClientMessage):
        await context.write(result(message.frame.seq))


async def opened(context: Any, window: int = 4) -> None:
    """Read the client's Open and answer it."""
    await context.read()
    answer = pb.Opened(session_id="s-rogue", resume_token="t", window=window)  # noqa: S106  no secret
    await context.write(pb.ServerMessage(opened=answer))


def result(seq: int) -> pb.ServerMessage:
    """A made-up result of a frame: its label is `answer SEQ`."""
    labels = [pb.Label(index=seq % 10, name=f"answer {seq}", score=1.0)]
    output = pb.Output(classification=pb.Classification(labels=labels))
    return pb.ServerMessage(result=pb.Result(seq=seq, output=output))


class Rogue(pb_grpc.SplitInferenceServicer):
    """The service; see `rogue_server`.

    Attributes:
        streams: how many streams clients have begun.
        fetched: paths of the files that clients have asked for from the beginning, in order.
    """

    def __init__(
        self,
        bundle: Bundle,
        converse: Converse,
        spoil: Callable[[str, bytes], bytes],
        before_fetch: Callable[[str], Awaitable[None]],
        chunks: Callable[[bytes], Iterable[bytes]],
    ) -> None:
        self.bundle = bundle
        self.before_fetch = before_fetch
        self.converse = converse
        self.spoil = spoil
        self.chunks = chunks
        self.streams = 0
        self.fetched: list[str] = []

    async def GetManifest(self, _request: Any, _context: Any) -> pb.GetManifestResponse:  # noqa: N802
        """The manifest, spoiled or not."""
        data = self.spoil("manifest.json", self.bundle.manifest_json)
        return pb.GetManifestResponse(model="tiny", bundle_id=self.bundle.bundle_id, manifest_json=data)

    async def FetchFile(self, request: Any, context: Any) -> AsyncIterator[pb.FileChunk]:  # noqa: N802
        """A file in chunks, spoiled or not."""
        if not request.offset:
            self.fetched.append(request.path)
        try:
            await self.before_fetch(request.path)
        except BitneckError as exc:
            await context.abort(grpc.StatusCode[exc.grpc_status], str(exc))
        data = self.spoil(request.path, (self.bundle.root / request.path).read_bytes())[request.offset :]
        for chunk in self.chunks(data[: request.length] if request.length else data):
            yield pb.FileChunk(data=chunk)

    async def Infer(self, _request: Any, context: Any) -> pb.InferResponse:  # noqa: N802
        """Refused: clients under test use streams."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)
        raise AssertionError

    async def Stream(self, _requests: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802  it writes itself
        """One stream, served by `converse`."""
        self.streams += 1
        await self.converse(context)

    async def Subscribe(self, _request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Refused: devices subscribe to nothing."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)


@asynccontextmanager
async def rogue_server(
    bundle: Bundle,
    converse: Converse = answer_all,
    spoil: Callable[[str, bytes], bytes] = lambda _path, data: data,
    before_fetch: Callable[[str], Awaitable[None]] = at_once,
    chunks: Callable[[bytes], Iterable[bytes]] = in_thousands,
) -> AsyncIterator[tuple[str, Rogue]]:
    """A server in this process, for the length of a block.

    Args:
        bundle: what clients fetch.
        converse: serves a stream.
        spoil: called with the path and the content of each file, the manifest too; returns what is sent instead.
        before_fetch: awaited with the path before a file is sent; an error of bitneck's ends the call with its status.
        chunks: cuts a file into messages.

    Yields:
        HOST:PORT, and the service.
    """
    server = grpc.aio.server()
    rogue = Rogue(bundle, converse, spoil, before_fetch, chunks)
    pb_grpc.add_SplitInferenceServicer_to_server(rogue, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", rogue
    finally:
        await server.stop(grace=0)
        await asyncio.sleep(0)
