"""Without answers and in packs, when links, servers and callers fail: nothing hangs, is lost or computed twice."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import Unavailable
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import Answers
from bitneck_edge.answers.results import Answer
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import Access
from bitneck_edge.sources.capture import Capture
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.rogue_servers import opened, rogue_server
from bitneck_testing.rogue_servers import result as made_up
from bitneck_testing.streams import Frames, answers_of, edge_client
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0


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

            async with edge_client(link.address, tmp_path, **values) as it:
                found = await answers_of(it, pictures())
                session = server.session(it.session_id)
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
        async with edge_client(address, tmp_path, **values) as it:
            with pytest.raises(Exception, match=r"waited 0\.6 s"):
                await it.infer(photo(1))
    assert "acknowledge" in asked  # it asked before it gave up


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
        async with edge_client(address, tmp_path, model="", pack=4) as it:
            found = await answers_of(it, [photo(k) for k in range(8)])
    assert [answer.seq for answer in found] == list(range(1, 9))
    assert packs[0] == 4
    assert max(packs[1:]) == 2


async def test_automatic_rate_without_answers_and_in_packs(server: Server, tmp_path: Path) -> None:
    async def pictures(count: int) -> Any:
        for k in range(count):
            await asyncio.sleep(0.01)
            yield photo(k % 5)

    for values in ({"answers": "none"}, {"pack": 4, "pack_ms": 100}):
        async with edge_client(server.grpc, tmp_path, point="auto", **values) as it:
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

    async with edge_client(server.grpc, tmp_path, point=point, **values) as it, asyncio.timeout(HANG_S):
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
        async with edge_client(own.grpc, tmp_path, retries=1, **values) as it, asyncio.timeout(HANG_S):
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
            async with edge_client(link.address, tmp_path, **values) as it:
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
    async with edge_client(server.grpc, tmp_path, pack=3, pack_ms=10_000, answer_timeout_s=30) as it:
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
    async with edge_client(server.grpc, tmp_path, point="auto") as it, asyncio.timeout(HANG_S):
        for _ in range(30):
            async for _result in it.stream([photo(k) for k in range(6)]):
                break
        assert it._session is not None
        await answers_of(it, [photo(k) for k in range(6)])
        assert not it._session._rate._flights
