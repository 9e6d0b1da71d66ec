"""Streams: raw ones, of frames made with the bundle's own numerics and sent with plain grpc.aio; and a client's own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import preprocess
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck.wire.frames import seal_frame
from bitneck.wire.messages import Classification, Result, Timings
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.wire import frame_to_wire
from bitneck_testing.photographs import photo

__all__ = [
    "Frames",
    "Stream",
    "answers_of",
    "assert_a_batch_equals_frame_by_frame",
    "edge_client",
    "empty_result",
    "open_stream",
    "sealed",
    "stub",
]


def sealed(**fields: Any) -> pb.Frame:
    """A frame with its CRC, ready for the wire. The fields are those of `seal_frame`."""
    return frame_to_wire(seal_frame(**fields))


def empty_result(seq: int) -> Result:
    """An answer with nothing in it."""
    return Result(seq, None, Timings(received_unix_us=0, queued_us=0, decode_us=0, compute_us=0, batch=1))


class Frames:
    """Right frames of a bundle, and the right answers to them."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.spec = bundle.manifest.input
        self.chain = SegmentChain(bundle, threads=1)
        self.encoders = {p.id: PointEncoder(bundle, p) for p in bundle.manifest.ladder}
        self.decoders = {p.id: PointDecoder(bundle, p) for p in bundle.manifest.ladder}

    def payload(self, point: str, seed: int) -> bytes:
        """The payload of `photo(seed)` at an operating point."""
        encoder = self.encoders[point]
        f = self.chain.run(preprocess(photo(seed), self.spec), 0, self.chain.head_length(encoder.point.split))
        return encoder.encode(f).payload

    def frame(self, seq: int, point: str = "s1-r2", seed: int = 0, **fields: Any) -> pb.Frame:
        """The frame of `photo(seed)` at an operating point."""
        return sealed(seq=seq, point=point, payload=self.payload(point, seed), **fields)

    def logits(self, point: str, payload: bytes) -> NDArray[np.float32]:
        """What the network makes of a payload: (classes,) or (classes, H, W)."""
        decoder = self.decoders[point]
        f_hat = decoder.decode(decoder.dequantize(payload)[None])
        logits: NDArray[np.float32]
        logits = self.chain.run(f_hat, self.chain.head_length(decoder.point.split), len(self.chain))[0]
        return logits


def assert_a_batch_equals_frame_by_frame(frames: Frames, model: ServedModel, points: list[str]) -> None:
    """Frame k has operating point `points[k]`; all in one pass give the same labels as one after the other."""
    latents = [model.decode(point, frames.payload(point, k)) for k, point in enumerate(points)]
    together = model.compute(points, latents)
    for point, latent, output in zip(points, latents, together, strict=True):
        (alone,) = model.compute([point], [latent])
        assert isinstance(output, Classification)
        assert isinstance(alone, Classification)
        ours, theirs = (x.labels for x in (output, alone))
        assert [x.index for x in ours] == [x.index for x in theirs]
        np.testing.assert_allclose([x.score for x in ours], [x.score for x in theirs], atol=1e-5)


class Stream:
    """One open stream.

    Attributes:
        call: the gRPC call.
        opened: the server's answer to Open.
    """

    def __init__(self, call: Any, opened: pb.Opened) -> None:
        self.call = call
        self.opened = opened

    async def send(self, frame: pb.Frame) -> None:
        """Send a frame."""
        await self.call.write(pb.ClientMessage(frame=frame))

    async def read(self) -> pb.ServerMessage:
        """The next message from the server. It fails if the stream has ended."""
        message = await self.call.read()
        assert isinstance(message, pb.ServerMessage), "the stream ended"
        return message

    async def ask(self, frame: pb.Frame) -> pb.ServerMessage:
        """Send a frame and read the next message."""
        await self.send(frame)
        return await self.read()


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[Any]:
    """A stub of the service, on a connection of its own."""
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield pb_grpc.SplitInferenceStub(channel)


async def open_stream(
    stub: Any, bundle_id: str, token: str = "", client: str = "test", model: str = "", *, brief: bool = False,
    answers: pb.Answers = pb.ANSWERS_ALL, spool: str = "", bearer: str = "",
) -> Stream:  # fmt: skip
    """Open a stream, or resume a session with its token. It fails if the server does not answer with Opened."""
    call = stub.Stream(metadata=(("authorization", f"Bearer {bearer}"),) if bearer else None)
    opening = pb.Open(
        model=model, bundle_id=bundle_id, client=client, resume_token=token, brief=brief, answers=answers, spool=spool
    )
    await call.write(pb.ClientMessage(open=opening))
    first = await call.read()
    assert isinstance(first, pb.ServerMessage)
    assert first.HasField("opened")
    return Stream(call, first.opened)


def edge_client(address: str, folder: Path, **values: Any) -> EdgeClient:
    """A client of the tiny bundle that comes back after every cut.

    Args:
        address: of the server.
        folder: for its cache.
        **values: settings; others than these stay as they are.
    """
    fixed: dict[str, Any] = {
        "cache_dir": folder / "cache",
        "threads": 1,
        "retries": 30,
        "point": "s1-r2",
        "model": "tiny",
        "going_over_s": 0.5,
    }
    return EdgeClient(address, **(fixed | values))


async def answers_of(client: EdgeClient, pictures: Any, **options: Any) -> list[Answer]:
    """The answers to some pictures. It fails if one has none, or they take longer than a minute."""
    async with asyncio.timeout(60.0):
        found = [result async for result in client.stream(pictures, **options)]
    assert not [result for result in found if isinstance(result, Failure)]
    return [result for result in found if isinstance(result, Answer)]
