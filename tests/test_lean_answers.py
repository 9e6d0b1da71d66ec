"""Without answers, with a part of them, and several frames in a message: real servers, real streams."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.coding.class_map import decode_map, encode_map
from bitneck.coding.coarse_map import coarse
from bitneck.errors import GRPC_CODES, InvalidConfig, ProtocolError, Unavailable
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import Answers
from bitneck.wire.scores import unpacked_scores
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import Access
from bitneck_edge.sources.capture import Capture
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.rogue_servers import opened, rogue_server
from bitneck_testing.rogue_servers import result as made_up
from bitneck_testing.streams import Frames, Stream, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle, scene_bundle: Bundle) -> Iterator[Server]:
    with running_server(tiny_bundle.root, scene_bundle.root) as running:
        yield running


@pytest.fixture(scope="module")
def frames(tiny_bundle: Bundle) -> Frames:
    return Frames(tiny_bundle)


def client(address: str, tmp_path: Path, **values: Any) -> EdgeClient:
    fixed = {"cache_dir": tmp_path / "cache", "threads": 1, "retries": 30, "point": "s1-r2", "model": "tiny"}
    return EdgeClient(address, **(fixed | values))


async def answers_of(it: EdgeClient, pictures: Any, **options: Any) -> list[Answer]:
    async with asyncio.timeout(HANG_S):
        found = [result async for result in it.stream(pictures, **options)]
    assert not [result for result in found if isinstance(result, Failure)]
    return [result for result in found if isinstance(result, Answer)]


def session_of(server: Server, session_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.http}/v1/sessions/{session_id}").json()
    return found


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
        while session_of(server, first.opened.session_id)["frames_answered"] < 3:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.01)
        again = await open_silent(cloud, tiny_bundle, first.opened.resume_token)
        for seq in (1, 2, 3):
            await again.send(frames.frame(seq))
        await again.call.write(pb.ClientMessage(acknowledge=pb.Acknowledge()))
        assert acknowledged(await again.read()) == [1, 2, 3]
        assert session_of(server, first.opened.session_id)["frames_answered"] == 3


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


@pytest.mark.parametrize(
    ("model", "answers", "text"),
    [("tiny", pb.ANSWERS_MAP, "all, none, labels"), ("scene", pb.ANSWERS_LABELS, "shares, map, map/4"),
     ("tiny", 77, "unknown")],
)  # fmt: skip
async def test_answers_that_a_model_does_not_have_are_refused(
    server: Server, tiny_bundle: Bundle, scene_bundle: Bundle, model: str, answers: Any, text: str
) -> None:
    bundle = tiny_bundle if model == "tiny" else scene_bundle
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        call = cloud.Stream()
        await call.write(pb.ClientMessage(open=pb.Open(model=model, bundle_id=bundle.bundle_id, answers=answers)))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert (await call.code()).name == "INVALID_ARGUMENT"
        assert text in await call.details()


async def test_the_device_says_so_before_it_sends_anything(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="a model for classification has no answers map; ask for all, none, labels"):
        async with client(server.grpc, tmp_path, answers="map"):
            pass


async def test_without_answers_every_picture_is_acknowledged_once(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, answers="none") as it:
        async with asyncio.timeout(HANG_S):
            one = await it.infer(photo(1))  # it does not wait for eleven others
        assert (one.labels, one.segmentation) == ((), None)
        found = await answers_of(it, [photo(k) for k in range(40)])
        session = session_of(server, it.session_id)
    assert [answer.seq for answer in found] == list(range(2, 42))
    assert (session["frames_answered"], session["faults"]) == (41, {})
    assert session["message_bytes_down"] < 41 * 8


async def test_cuts_lose_nothing_without_answers_and_in_packs(server: Server, tmp_path: Path) -> None:
    for values in ({"answers": "none"}, {"pack": 5, "pack_ms": 200}, {"answers": "none", "pack": 3, "pack_ms": 200}):
        async with Proxy(server.grpc, delay_s=0.01) as link:

            async def pictures() -> Any:
                for k in range(50):
                    await asyncio.sleep(0.01)
                    if k in (11, 30):
                        link.cut()
                        await asyncio.sleep(0.05)
                        link.mend()
                    yield Capture(photo(k % 5), f"picture {k}")

            async with client(link.address, tmp_path, **values) as it:
                found = await answers_of(it, pictures())
                session = session_of(server, it.session_id)
                assert it.reconnects >= 1
        assert [answer.file for answer in found] == [f"picture {k}" for k in range(50)], values
        assert session["frames_answered"] == 50, values


async def test_a_server_that_never_acknowledges_counts_as_dead(tiny_bundle: Bundle, tmp_path: Path) -> None:
    asked: list[str] = []

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            asked.append(str(message.WhichOneof("message")))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        values = {"answers": "none", "answer_timeout_s": 0.6, "retries": 1, "model": ""}
        async with client(address, tmp_path, **values) as it:
            with pytest.raises(Exception, match=r"waited 0\.6 s"):
                await it.infer(photo(1))
    assert "acknowledge" in asked  # it asked before it gave up


async def test_packs_of_pictures(server: Server, tmp_path: Path) -> None:
    pictures = [photo(k) for k in range(22)]
    async with client(server.grpc, tmp_path) as it:
        alone = await answers_of(it, pictures)
        plain = session_of(server, it.session_id)
    async with client(server.grpc, tmp_path, pack=10) as it:
        packed = await answers_of(it, pictures)  # the last two do not wait for others
        session = session_of(server, it.session_id)
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

    async with client(server.grpc, tmp_path, pack=10, pack_ms=50) as it, asyncio.timeout(HANG_S):
        stream = it.stream(pictures())
        assert isinstance(await anext(stream), Answer)
        assert isinstance(await anext(stream), Answer)
        more.set()
        assert [result async for result in stream] == []


async def test_a_pack_larger_than_the_window_is_sent_when_that_is_full(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root, options=["--window", "3"]) as small:
        async with client(small.grpc, tmp_path, pack=10, pack_ms=10_000) as it:
            assert len(await answers_of(it, [photo(k) for k in range(8)])) == 8
        async with client(small.grpc, tmp_path, pack=10, pack_ms=10_000, answers="none", in_flight=2) as it:
            assert len(await answers_of(it, [photo(k) for k in range(8)])) == 8


async def test_a_server_with_a_smaller_window_gets_smaller_packs(tiny_bundle: Bundle, tmp_path: Path) -> None:
    packs: list[int] = []

    async def converse(context: Any) -> None:
        await opened(context, window=2 if packs else 8)
        first = not packs
        while isinstance(message := await context.read(), pb.ClientMessage):
            numbers = range(message.pack.seq, message.pack.seq + len(message.pack.payload))
            packs.append(len(numbers) or 1)
            if first:
                return  # the stream ends, and nothing was answered
            for seq in numbers or [message.frame.seq]:
                await context.write(made_up(seq))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with client(address, tmp_path, model="", pack=4) as it:
            found = await answers_of(it, [photo(k) for k in range(8)])
    assert [answer.seq for answer in found] == list(range(1, 9))
    assert packs[0] == 4
    assert max(packs[1:]) == 2


def test_a_pack_must_not_wait_until_the_link_counts_as_dead() -> None:
    with pytest.raises(InvalidConfig, match="pack_ms"):
        EdgeClient("127.0.0.1:1", pack=2, pack_ms=15_000)


async def test_labels_without_timings(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path) as it:
        whole = await it.infer(photo(4))
        most = session_of(server, it.session_id)["message_bytes_down"]
    async with client(server.grpc, tmp_path, answers="labels") as it:
        answer = await it.infer(photo(4))
        assert session_of(server, it.session_id)["message_bytes_down"] < most
    assert answer.labels == whole.labels
    assert (answer.ms.queued, answer.ms.decode) == (0, 0)
    assert answer.ms.compute > 0


async def test_parts_of_a_class_map(server: Server, scene_bundle: Bundle, tmp_path: Path) -> None:
    found: dict[str, Answer] = {}
    for answers in Answers.of_task("segmentation"):
        async with client(server.grpc, tmp_path, model="scene", answers=answers.value) as it:
            found[answers] = await it.infer(photo(4))
    assert found["none"].segmentation is None
    whole = found["all"].segmentation
    assert whole is not None
    for name in ("map", "map/4", "shares"):
        part = found[name].segmentation
        assert part is not None
        assert {share.index for share in part.classes} <= {share.index for share in whole.classes}
        assert all(share.name for share in part.classes)
        if name == "map":
            assert (part.map == whole.map).all()
            assert part.classes == whole.classes
        elif name == "shares":
            assert part.map.shape == (0, 0)
            assert part.map_bytes == 0
            assert [s.share for s in part.classes] == pytest.approx([s.share for s in whole.classes], abs=1e-4)
        else:
            assert part.map.shape == whole.map.shape
            assert (coarse(part.map, 4) == coarse(whole.map, 4)).all()
            assert part.map_bytes == len(encode_map(coarse(whole.map, 4)))
            assert part.map_bytes < whole.map_bytes


async def test_a_client_without_the_manifest_gets_sizes_names_and_shares(server: Server, scene_bundle: Bundle) -> None:
    scenes = Frames(scene_bundle)
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        full = await open_stream(cloud, scene_bundle.bundle_id, model="scene", answers=pb.ANSWERS_MAP_4)
        coded = (await full.ask(scenes.frame(1))).result.output.segmentation
        assert (coded.height, coded.width, coded.step) == (24, 40, 4)
        assert decode_map(coded.map, height=6, width=10, number=5).shape == (6, 10)
        assert all(share.name for share in coded.classes)
        brief = await open_stream(cloud, scene_bundle.bundle_id, model="scene", brief=True, answers=pb.ANSWERS_SHARES)
        shares = (await brief.ask(scenes.frame(1))).result.output.segmentation
        assert not shares.map
        assert list(shares.index) == [share.index for share in coded.classes]
        assert unpacked_scores(shares.shares) == pytest.approx([share.share for share in coded.classes], abs=1e-4)


SHARE_LIES = {
    "a map": pb.Segmentation(height=24, width=40, map=encode_map(np.zeros((24, 40), np.uint8))),
    "nothing": pb.Segmentation(),
    "an unknown class": pb.Segmentation(index=[77], shares=b"\xff\xff"),
    "a share without its class": pb.Segmentation(index=[1, 2], shares=b"\xff\xff"),
    "a share above one": pb.Segmentation(classes=[pb.ClassShare(index=1, share=1.5)]),
    "no number": pb.Segmentation(classes=[pb.ClassShare(index=1, share=float("nan"))]),
}


async def test_shares_that_lie_fail_their_frame_alone(scene_bundle: Bundle, tmp_path: Path) -> None:
    lies = list(SHARE_LIES.values())

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            seq = message.frame.seq
            found = lies[seq - 1] if seq <= len(lies) else pb.Segmentation(index=[1], shares=b"\xff\xff")
            await context.write(
                pb.ServerMessage(result=pb.Result(seq=seq, output=pb.Output(segmentation=found), cloud_us=1))
            )

    async with rogue_server(scene_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with client(address, tmp_path, model="", answers="shares", retries=1) as it:
            found = [result async for result in it.stream([photo(0)] * (len(lies) + 1))]
    for name, result in zip(SHARE_LIES, found[:-1], strict=True):
        assert isinstance(result, Failure), name
        assert isinstance(result.error, ProtocolError), name
    assert isinstance(found[-1], Answer)


async def test_automatic_rate_without_answers_and_in_packs(server: Server, tmp_path: Path) -> None:
    async def pictures(count: int) -> Any:
        for k in range(count):
            await asyncio.sleep(0.01)
            yield photo(k % 5)

    for values in ({"answers": "none"}, {"pack": 4, "pack_ms": 100}):
        async with client(server.grpc, tmp_path, point="auto", **values) as it:
            await answers_of(it, pictures(60))
            assert it._session is not None
            assert it._session._rate.delay_s is not None, values  # it has seen how long the link takes
            assert it._session._rate.cost.down > 0, values  # and what frames cost on it


WAYS: tuple[dict[str, Any], ...] = ({"answers": "none"}, {"pack": 5, "pack_ms": 10_000})


@pytest.mark.parametrize("values", WAYS, ids=["none", "pack"])
@pytest.mark.parametrize("point", ["s1-r2", "auto"])
async def test_fresh_pictures_do_not_wait_for_one_another(
    server: Server, tmp_path: Path, values: dict[str, Any], point: str
) -> None:
    async def camera() -> Any:
        for k in range(40):
            await asyncio.sleep(0.02)
            yield Capture(photo(k % 5), f"picture {k}")

    async with client(server.grpc, tmp_path, point=point, **values) as it, asyncio.timeout(HANG_S):
        found = [result async for result in it.stream(camera(), newest_first=True)]
    assert all(isinstance(result, Answer) for result in found)
    assert len(found) > 20  # not two or three


@pytest.mark.parametrize("values", WAYS, ids=["none", "pack"])
async def test_a_server_that_does_not_read_counts_as_dead(
    tiny_bundle: Bundle, tmp_path: Path, values: dict[str, Any]
) -> None:
    async def converse(context: Any) -> None:
        await opened(context, window=1000)
        await asyncio.sleep(HANG_S)

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = Link(
            LinkSettings(
                access=Access(address=address), model="", bundle_id=tiny_bundle.bundle_id, client="c",
                connect_timeout_s=5.0, answer_timeout_s=1.0, retries=0, positions={"s1-r1": 1},
                answers=Answers(values.get("answers", "all")), pack=values.get("pack", 1), pack_ms=50,
            ),
            lambda _point, _reason: None,
        )  # fmt: skip
        await link.open()
        with pytest.raises(Unavailable, match="gave up"):
            while True:
                await link.send("s1-r1", bytes(200_000))
        await link.close()


@pytest.mark.parametrize("values", WAYS, ids=["none", "pack"])
async def test_a_server_that_stops_answers_first(tiny_bundle: Bundle, tmp_path: Path, values: dict[str, Any]) -> None:
    with running_server(tiny_bundle.root, options=["--drain-s", "30"]) as own:
        async with client(own.grpc, tmp_path, retries=1, **values) as it, asyncio.timeout(HANG_S):
            more = asyncio.Event()

            async def pictures() -> Any:
                for k in range(3):
                    yield photo(k)
                await more.wait()

            stream = it.stream(pictures())
            first = asyncio.create_task(anext(stream))
            assert it._session is not None
            exchange = it._session.link._exchange
            while exchange.progress[0] < 4:  # noqa: ASYNC110  three frames were sent, or wait for others
                await asyncio.sleep(0.01)
            own.process.terminate()
            assert isinstance(await first, Answer)
            assert isinstance(await anext(stream), Answer)
            assert isinstance(await anext(stream), Answer)
            async with asyncio.timeout(15):  # half of what the server would wait
                await asyncio.to_thread(own.process.wait)
            more.set()
            await stream.aclose()


@pytest.mark.parametrize("values", WAYS, ids=["none", "pack"])
async def test_another_bundle_delays_nobody(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    first = make_tiny_bundle(folder)
    with running_server(first.root) as own:
        async with Proxy(own.grpc) as link, asyncio.timeout(HANG_S):
            async with client(link.address, tmp_path, **values) as it:
                more = asyncio.Event()

                async def pictures() -> Any:
                    for k in range(8):
                        yield photo(k)
                    more.set()
                    await asyncio.sleep(0.3)
                    for k in range(4):
                        yield photo(k)

                async def reload() -> None:
                    await more.wait()
                    await asyncio.to_thread(shutil.rmtree, folder)
                    await asyncio.to_thread(make_tiny_bundle, folder, seed=5)
                    async with httpx.AsyncClient(base_url=own.http) as http:
                        for _ in range(2):  # the generation before the last is not served any more
                            done = await http.post("/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"})
                            assert done.status_code == 200, done.text
                    link.cut()
                    link.mend()

                reloading = asyncio.create_task(reload())
                begun = asyncio.get_running_loop().time()
                found = await answers_of(it, pictures())
                await reloading
                assert len(found) == 12
                assert asyncio.get_running_loop().time() - begun < 30


async def test_a_caller_who_gives_up_takes_nobody_along(server: Server, frames: Frames, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, pack=3, pack_ms=10_000, answer_timeout_s=30) as it:
        assert it._session is not None
        exchange = it._session.link._exchange
        payload = frames.payload("s1-r2", 1)
        async with asyncio.timeout(HANG_S):
            others = [await exchange.send("s1-r2", payload) for _ in range(2)]
            async with exchange._write_lock:
                last = asyncio.create_task(exchange.send("s1-r2", payload))
                while len(exchange._packer):  # noqa: ASYNC110  until it has filled the pack, and waits to write
                    await asyncio.sleep(0.001)
                last.cancel()
                await asyncio.gather(last, return_exceptions=True)
        async with asyncio.timeout(10):  # not until the link counts as dead
            assert [(await sent.answer).result.seq for sent in others] == [1, 2]


async def test_streams_that_are_left_early_leave_automatic_rate_as_it_was(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, point="auto") as it, asyncio.timeout(HANG_S):
        for _ in range(30):
            async for _result in it.stream([photo(k) for k in range(6)]):
                break
        assert it._session is not None
        await answers_of(it, [photo(k) for k in range(6)])
        assert not it._session._rate._flights


async def test_a_time_that_is_none_is_not_sent(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, pack=2) as it:
        odd = [Capture(photo(1), f"{unix_us}", unix_us=unix_us) for unix_us in (-5, 2**64, 7, 2**63)]
        assert len(await answers_of(it, odd)) == 4


async def test_a_pack_before_open_is_refused_like_a_frame(server: Server) -> None:
    async with stub(server.grpc) as cloud, asyncio.timeout(HANG_S):
        call = cloud.Stream()
        await call.write(pb.ClientMessage(pack=pb.Pack(seq=1, payload=[b"x"] * 2, crc32c=[1, 2], position=[1])))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert (await call.code()).name == "FAILED_PRECONDITION"


async def test_similar_frames_refer_to_acknowledged_ones(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("similar") / "bundle", similar=("s1-r2",))
    with running_server(bundle.root) as own:
        async with client(own.grpc, tmp_path, answers="none", similar="on") as it:
            found = await answers_of(it, [photo(1)] * 60)
            session = session_of(own, it.session_id)
    assert sum(answer.reference > 0 for answer in found) > 20
    assert session["faults"] == {}


async def test_link_bytes_are_shown_and_counted(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path) as it:
        await answers_of(it, [photo(k) for k in range(3)])
        async with httpx.AsyncClient(base_url=server.http) as http:
            text = (await http.get("/metrics")).text
    up = re.search(r'bitneck_link_bytes_total\{direction="up",model="tiny"\} (\S+)', text)
    messages = re.search(r'bitneck_message_bytes_total\{direction="up",model="tiny"\} (\S+)', text)
    assert up is not None
    assert messages is not None
    assert float(up[1]) > 1.5 * float(messages[1]) > 0
