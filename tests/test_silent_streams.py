"""Acknowledgements in place of answers, and several frames in a message: real servers, real streams."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import GRPC_CODES, InvalidConfig
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import Frames, Stream, answers_of, edge_client, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0


async def open_silent(cloud: Any, bundle: Bundle, token: str = "") -> Stream:
    return await open_stream(cloud, bundle.bundle_id, token, model="tiny", answers=pb.ANSWERS_NONE)


def acknowledged(message: pb.ServerMessage) -> list[int]:
    assert message.HasField("ack"), message
    return list(range(message.ack.seq - message.ack.before, message.ack.seq + 1))


async def test_twelve_frames_have_one_acknowledgement(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        stream = await open_silent(cloud, tiny_bundle)
        seen: list[int] = []
        for seq in range(1, 25):
            await stream.send(frames.frame(seq))
            if seq % 12 == 0:
                first = acknowledged(await stream.read())
                assert len(first) == 12
                seen += first
        assert seen == list(range(1, 25))
        await stream.send(frames.frame(25))
        await stream.send(frames.frame(26, acknowledge=True))
        assert acknowledged(await stream.read())[-1] == 26


async def test_faults_come_and_are_not_acknowledged(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        stream = await open_silent(cloud, tiny_bundle)
        bad = frames.frame(2, acknowledge=True)
        bad.crc32c ^= 1
        await stream.send(frames.frame(1))
        await stream.send(bad)
        assert (await stream.read()).fault.seq == 2
        await stream.send(frames.frame(3))
        await stream.call.write(pb.ClientMessage(acknowledge=pb.Acknowledge()))
        seen: list[int] = []
        while sorted(seen) != [1, 3]:
            seen += acknowledged(await stream.read())
        await stream.send(frames.frame(2, acknowledge=True))  # a fault ends nothing: the same number again
        assert acknowledged(await stream.read()) == [2]


async def test_the_end_of_a_stream_is_acknowledged(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        stream = await open_silent(cloud, tiny_bundle)
        for seq in (1, 2, 3):
            await stream.send(frames.frame(seq))
        await stream.call.done_writing()
        assert acknowledged(await stream.read()) == [1, 2, 3]


async def test_a_resumed_session_acknowledges_what_it_has_computed(
    server: Server, tiny_bundle: Bundle, frames: Frames
) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        first = await open_silent(cloud, tiny_bundle)
        for seq in (1, 2, 3):
            await first.send(frames.frame(seq))
        while server.session(first.opened.session_id)["frames_answered"] < 3:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.01)
        again = await open_silent(cloud, tiny_bundle, first.opened.resume_token)
        for seq in (1, 2, 3):
            await again.send(frames.frame(seq))
        await again.call.write(pb.ClientMessage(acknowledge=pb.Acknowledge()))
        assert acknowledged(await again.read()) == [1, 2, 3]
        assert server.session(first.opened.session_id)["frames_answered"] == 3


async def test_a_pack_is_answered_in_one_message(server: Server, tiny_bundle: Bundle, frames: Frames) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        alone = await open_stream(cloud, tiny_bundle.bundle_id, model="tiny", brief=True)
        stream = await open_stream(cloud, tiny_bundle.bundle_id, model="tiny", brief=True)
        position = 1 + [point.id for point in tiny_bundle.manifest.points].index("s1-r2")
        each = [frames.frame(seq, seed=seq) for seq in (1, 2, 3)]
        pack = pb.Pack(seq=1, payload=[f.payload for f in each], crc32c=[f.crc32c for f in each], position=[position])
        await stream.call.write(pb.ClientMessage(pack=pack))
        together = (await stream.read()).results.result
        expected = [(await alone.ask(frame)).result for frame in each]
        assert sorted(result.seq for result in together) == [1, 2, 3]
        for result in together:
            assert result.output == expected[result.seq - 1].output
        pack.crc32c.pop()
        await stream.call.write(pb.ClientMessage(pack=pack))
        fault = (await stream.read()).fault
        assert (fault.seq, fault.code) == (0, GRPC_CODES["INVALID_ARGUMENT"])
        assert (await stream.ask(frames.frame(9))).HasField("result")


async def test_a_pack_before_open_is_refused_like_a_frame(server: Server) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        call = cloud.Stream()
        await call.write(pb.ClientMessage(pack=pb.Pack(seq=1, payload=[b"x"] * 2, crc32c=[1, 2], position=[1])))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert (await call.code()).name == "FAILED_PRECONDITION"


async def test_without_answers_every_picture_is_acknowledged_once(server: Server, tmp_path: Path) -> None:
    async with edge_client(server.grpc, tmp_path, answers="none") as it:
        async with asyncio.timeout(HANG_S):
            one = await it.infer(photo(1))  # it does not wait for eleven others
        assert (one.labels, one.segmentation) == ((), None)
        found = await answers_of(it, [photo(k) for k in range(40)])
        session = server.session(it.session_id)
    assert [answer.seq for answer in found] == list(range(2, 42))
    assert (session["frames_answered"], session["faults"]) == (41, {})
    assert session["message_bytes_down"] < 41 * 8


async def test_packs_of_pictures(server: Server, tmp_path: Path) -> None:
    pictures = [photo(k) for k in range(22)]
    async with edge_client(server.grpc, tmp_path) as it:
        alone = await answers_of(it, pictures)
        plain = server.session(it.session_id)
    async with edge_client(server.grpc, tmp_path, pack=10) as it:
        packed = await answers_of(it, pictures)  # the last two do not wait for others
        session = server.session(it.session_id)
        at_once = await it.infer(photo(3))
    assert [a.labels for a in packed] == [a.labels for a in alone]
    assert at_once.labels == alone[3].labels
    assert session["message_bytes_up"] < plain["message_bytes_up"]
    assert session["link_bytes_up"] < 0.5 * plain["link_bytes_up"]
    assert sum(a.message_bytes for a in packed) == pytest.approx(session["message_bytes_up"])
    assert sum(a.link_bytes_up for a in alone) == pytest.approx(plain["link_bytes_up"], rel=0.2)


async def test_a_frame_waits_no_longer_than_it_may(server: Server, tmp_path: Path) -> None:
    more = asyncio.Event()

    async def pictures() -> Any:
        yield photo(1)
        yield photo(2)
        await more.wait()

    async with edge_client(server.grpc, tmp_path, pack=10, pack_ms=50) as it, asyncio.timeout(HANG_S):
        stream = it.stream(pictures())
        assert isinstance(await anext(stream), Answer)
        assert isinstance(await anext(stream), Answer)
        more.set()
        assert [result async for result in stream] == []


async def test_a_pack_larger_than_the_window_is_sent_when_that_is_full(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=["--window", "3"]) as small:
        async with edge_client(small.grpc, tmp_path, pack=10, pack_ms=10_000) as it:
            assert len(await answers_of(it, [photo(k) for k in range(8)])) == 8
        async with edge_client(small.grpc, tmp_path, pack=10, pack_ms=10_000, answers="none", in_flight=2) as it:
            assert len(await answers_of(it, [photo(k) for k in range(8)])) == 8


def test_a_pack_must_not_wait_until_the_link_counts_as_dead() -> None:
    with pytest.raises(InvalidConfig, match="pack_ms"):
        EdgeClient("127.0.0.1:1", pack=2, pack_ms=15_000)


async def test_a_time_that_is_none_is_not_sent(server: Server, tmp_path: Path) -> None:
    async with edge_client(server.grpc, tmp_path, pack=2) as it:
        odd = [Capture(photo(1), f"{unix_us}", unix_us=unix_us) for unix_us in (-5, 2**64, 7, 2**63)]
        assert len(await answers_of(it, odd)) == 4


async def test_similar_frames_refer_to_acknowledged_ones(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("similar") / "bundle", similar=("s1-r2",))
    with running_server(bundle.root) as own:
        async with edge_client(own.grpc, tmp_path, answers="none", similar="on") as it:
            found = await answers_of(it, [photo(1)] * 60)
            session = own.session(it.session_id)
    assert sum(answer.reference > 0 for answer in found) > 20
    assert session["faults"] == {}
