"""What is asked of a session whose `Opened` is under way already: real streams, one server in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import Unavailable
from bitneck.v2 import inference_pb2 as pb
from bitneck.v2 import inference_pb2_grpc as pb_grpc
from bitneck.wire.messages import SetPoint
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.api import grpc_service
from bitneck_cloud.api.grpc_peer import GrpcPeer
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.observe.tracing import open_traces
from bitneck_cloud.sessions.rates import ClientChooses, FixedPoint, RatePolicy
from bitneck_cloud.sessions.session import Session
from bitneck_testing.consumers.canaries import registry_of
from bitneck_testing.streams import Stream, open_stream, stub

HANG_S = 20.0
TOKEN = "a-token-of-sixteen-characters"


@dataclass
class Begins:
    """A server, and what is done to a session once the client was sent its `Opened`.

    Attributes:
        meanwhile: is called with the session, once.
        pushed: whether each new rate was pushed to a stream.
        calls: streams whose caller is known.
    """

    service: InferenceService
    tokens: BearerTokens
    address: str
    meanwhile: Callable[[Session], None] | None = None
    pushed: list[bool] = field(default_factory=list)
    calls: int = 0

    def asks(self, policy: RatePolicy) -> Callable[[Session], None]:
        """What the control API does with a rate."""

        def put(session: Session) -> None:
            point = session.set_policy(policy)
            self.pushed.append(self.service.push_point(session, point or "", "asked"))

        return put


@pytest.fixture
async def begins(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Begins]:
    (tmp_path / "tokens").write_text(f"cam-1 {TOKEN}\n")
    registry = registry_of([ServedModel(tiny_bundle, threads=1)])
    tokens, nothing = BearerTokens(Role.DEVICE, None, tmp_path / "tokens"), cast("Any", None)
    service = InferenceService(
        registry, nothing, Metrics(), open_traces("", 0.0), tokens, CallerLimits(), nothing,
        idle_s=HANG_S, stall_s=HANG_S, similar_bytes=0,
    )  # fmt: skip
    server = grpc.aio.server()
    pb_grpc.add_SplitInferenceServicer_to_server(service, server)
    own = Begins(service, tokens, f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    right, known = GrpcPeer.serve, grpc_service.caller_of

    def caller_of(*arguments: Any) -> Any:
        own.calls += 1
        return known(*arguments)

    monkeypatch.setattr(grpc_service, "caller_of", caller_of)

    def serve(self: GrpcPeer, window: int, *, tls: bool) -> Any:
        meanwhile, own.meanwhile = own.meanwhile, None
        if meanwhile is not None:
            (session,) = registry.sessions(0.0)
            meanwhile(session)
        return right(self, window, tls=tls)

    monkeypatch.setattr(GrpcPeer, "serve", serve)
    await server.start()
    yield own
    await server.stop(None)


async def opened(cloud: Any, bundle: Bundle, resume_token: str = "") -> Stream:
    return await open_stream(cloud, bundle.bundle_id, resume_token, bearer=TOKEN)


def withdraw(begins: Begins, folder: Path) -> None:
    """Take the device's token away."""
    (folder / "tokens").write_text("cam-2 another-token-of-this-length\n")
    begins.tokens.refresh()
    begins.service.end_revoked()


async def test_a_rate_is_pushed(begins: Begins, tiny_bundle: Bundle) -> None:
    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        begins.meanwhile = begins.asks(FixedPoint("s2-r1"))
        stream = await opened(cloud, tiny_bundle)
        assert stream.opened.point == ""
        assert (await stream.read()).set_point.point == "s2-r1"
        assert begins.pushed == [True]


async def test_a_rate_that_the_link_did_not_carry_comes_with_the_next_one(begins: Begins, tiny_bundle: Bundle) -> None:
    """`Opened` says which point is asked for, but not that the client chooses again."""

    def cut(session: Session) -> None:
        begins.asks(ClientChooses())(session)
        raise Unavailable("the link is cut")

    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        begins.meanwhile = begins.asks(FixedPoint("s2-r1"))
        first = await opened(cloud, tiny_bundle)
        assert (await first.read()).set_point.point == "s2-r1"
        first.call.cancel()
        begins.meanwhile = cut
        second = await opened(cloud, tiny_bundle, first.opened.resume_token)
        assert second.opened.point == "s2-r1"
        with pytest.raises(grpc.aio.AioRpcError, match="the link is cut"):
            await second.read()
        third = await opened(cloud, tiny_bundle, second.opened.resume_token)
        assert third.opened.point == ""
        told = await third.read()
        assert told.HasField("set_point")
        assert told.set_point.point == ""
        assert begins.pushed == [True, True]


async def test_a_server_that_stops_says_so_once(begins: Begins, tiny_bundle: Bundle) -> None:
    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        begins.meanwhile = lambda _: begins.service.drain("the server is stopping")
        stream = await opened(cloud, tiny_bundle)
        assert (await stream.read()).HasField("go_away")
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF


async def test_a_token_that_is_withdrawn_ends_the_stream(begins: Begins, tiny_bundle: Bundle, tmp_path: Path) -> None:
    def withdraw(_: Session) -> None:
        (tmp_path / "tokens").write_text("cam-2 another-token-of-this-length\n")
        begins.tokens.refresh()
        begins.service.end_revoked()

    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        begins.meanwhile = withdraw
        stream = await opened(cloud, tiny_bundle)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert begins.service.streams == 0


async def test_a_token_that_is_withdrawn_before_the_stream_begins_opens_none(
    begins: Begins, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """The call has begun, and its `Open` is held back."""
    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        call = cloud.Stream(metadata=(("authorization", f"Bearer {TOKEN}"),))
        while not begins.calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        withdraw(begins, tmp_path)
        await call.write(pb.ClientMessage(open=pb.Open(bundle_id=tiny_bundle.bundle_id)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_rate_that_was_being_written_when_the_link_was_cut_comes_again(
    begins: Begins, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GrpcPeer.write

    async def cut(self: GrpcPeer, message: Any) -> None:
        if isinstance(message, SetPoint) and not message.point:
            monkeypatch.setattr(GrpcPeer, "write", right)
            raise ConnectionResetError
        await right(self, message)

    monkeypatch.setattr(GrpcPeer, "write", cut)
    async with stub(begins.address) as cloud, asyncio.timeout(HANG_S):
        begins.meanwhile = begins.asks(FixedPoint("s2-r1"))
        first = await opened(cloud, tiny_bundle)
        assert (await first.read()).set_point.point == "s2-r1"
        first.call.cancel()
        begins.meanwhile = begins.asks(ClientChooses())
        second = await opened(cloud, tiny_bundle, first.opened.resume_token)
        assert await second.call.read() is grpc.aio.EOF
        third = await opened(cloud, tiny_bundle, second.opened.resume_token)
        assert third.opened.point == ""
        assert (await third.read()).HasField("set_point")
