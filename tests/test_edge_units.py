"""The edge against servers that misbehave, its cache, and its encoder; no second process."""

import asyncio
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle, verify_file
from bitneck.errors import (
    BitneckError,
    BundleCorrupt,
    BundleMismatch,
    ImageError,
    InvalidConfig,
    Unavailable,
    UnknownPoint,
)
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import Result
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.bundles.fetch import take_bundle
from bitneck_edge.bundles.part import Part
from bitneck_edge.client import EdgeClient
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.link.exchange import Exchange
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.rogue_servers import answer_all, opened, result, rogue_server


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "retries": 1, "connect_timeout_s": 2.0, "threads": 1} | values


def test_switching_the_point_reads_no_segment_again(tiny_bundle: Bundle) -> None:
    encoder = EdgeEncoder(tiny_bundle, threads=1)
    encoder.encode(photo(), "s1-r2")
    modules = dict(encoder.chain._modules)
    for point in ("s1-r1", "s2-r1", "s1-r2"):
        encoder.encode(photo(), point)
    assert encoder.chain.loaded == (0, 1)
    assert all(encoder.chain._modules[k] is module for k, module in modules.items())
    with pytest.raises(UnknownPoint, match="s1-r1, s2-r1, s1-r2"):
        encoder.encode(photo(), "nope")


async def test_a_bundle_is_fetched_once_and_mended(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = tiny_bundle.manifest
    async with rogue_server(tiny_bundle) as (address, rogue):
        for _ in range(2):
            async with EdgeClient(address, **settings(tmp_path, point="s1-r2")) as client:
                assert (await client.infer(photo())).labels[0].name == "answer 1"
        assert rogue.fetched == list(manifest.files_of("s1-r2", "float32"))
        damaged = client.bundle.path("segments/00-seg0.onnx")
        assert damaged.name == manifest.files["segments/00-seg0.onnx"].sha256
        damaged.write_bytes(damaged.read_bytes()[:-1])
        async with EdgeClient(address, **settings(tmp_path, point="s1-r2")) as client:
            await client.infer(photo())
        assert rogue.fetched[len(manifest.files_of("s1-r2", "float32")) :] == ["segments/00-seg0.onnx"]


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda path, data: data[:-1] if path.endswith(".onnx") else data, BundleCorrupt, "arrived with"),
        (lambda path, data: data + b"x" if path.endswith(".onnx") else data, BundleCorrupt, "longer than"),
        (lambda path, data: data[:-1] + b"x" if path.endswith("encoder.onnx") else data, BundleCorrupt, "SHA-256"),
        (lambda path, data: data + b" " if path == "manifest.json" else data, BundleMismatch, "hashes to"),
    ],
)
async def test_a_damaged_download_is_refused_and_leaves_nothing(
    tiny_bundle: Bundle, tmp_path: Path, spoil: Any, error: type[BitneckError], text: str
) -> None:
    async with rogue_server(tiny_bundle, spoil=spoil) as (address, _):
        with pytest.raises(error, match=text):
            async with EdgeClient(address, **settings(tmp_path)):
                pass
    digests = {entry.sha256: entry for entry in tiny_bundle.manifest.files.values()}
    for path in (tmp_path / "cache" / "files").glob("*"):  # what stays is right and whole
        verify_file(path, digests[path.name])
    async with rogue_server(tiny_bundle) as (address, _), EdgeClient(address, **settings(tmp_path)) as client:
        await client.infer(photo())


async def test_two_clients_fill_one_cache(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle) as (address, _):

        async def once() -> Answer:
            async with EdgeClient(address, **settings(tmp_path)) as client:
                return await client.infer(photo())

        assert len(await asyncio.gather(*[once() for _ in range(4)])) == 4


def test_a_part_that_somebody_else_keeps_meanwhile_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its lock it became the whole file, which nobody may write to."""
    path, whole, flock = tmp_path / "parts" / "x", tmp_path / "files" / "x", fcntl.flock
    first = Part.open(path)
    first.append(b"whole")

    def late(descriptor: int, how: int) -> None:
        if not whole.exists():
            first.keep(whole)
            first.close()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Part.open(path)
    assert second.size() == 0
    second.append(b"again")
    assert whole.read_bytes() == b"whole"
    second.keep(whole)
    second.close()
    assert (whole.read_bytes(), path.exists()) == (b"again", False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_cache_that_cannot_be_written(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    async with rogue_server(tiny_bundle) as (address, _):
        with pytest.raises(InvalidConfig, match="cannot be written"):
            async with EdgeClient(address, **settings(tmp_path)):
                pass


async def test_a_cache_that_is_a_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    async with rogue_server(tiny_bundle) as (address, _):
        with pytest.raises(InvalidConfig, match="cannot be written"):
            async with EdgeClient(address, **settings(tmp_path)):
                pass


async def test_a_pinned_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle) as (address, _):
        async with EdgeClient(address, **settings(tmp_path, bundle_id=tiny_bundle.bundle_id)) as client:
            await client.infer(photo())
        with pytest.raises(BundleMismatch, match="expected sha256:000"):
            async with EdgeClient(address, **settings(tmp_path, bundle_id="sha256:" + "0" * 64)):
                pass


async def test_answers_twice_late_and_unasked_count_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        await context.write(result(77))
        while isinstance(message := await context.read(), pb.ClientMessage):
            await context.write(result(message.frame.seq))
            await context.write(result(message.frame.seq))
            await context.write(result(1))

    async with rogue_server(tiny_bundle, converse) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            answers = [a async for a in client.stream([photo(k) for k in range(10)])]
    assert [a.seq for a in answers if isinstance(a, Answer)] == list(range(1, 11))
    assert [a.labels[0].name for a in answers if isinstance(a, Answer)] == [f"answer {k}" for k in range(1, 11)]


async def test_a_link_cut_again_and_again_loses_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Every third frame the stream breaks before its answer; the client resumes and resends."""
    answered: list[int] = []

    async def converse(context: Any) -> None:
        await opened(context)
        count = 0
        while isinstance(message := await context.read(), pb.ClientMessage):
            count += 1
            if count == 3:
                raise RuntimeError("cut")
            answered.append(message.frame.seq)
            await context.write(result(message.frame.seq))

    async with rogue_server(tiny_bundle, converse) as (address, rogue):
        async with EdgeClient(address, **settings(tmp_path, retries=3)) as client:
            answers = [a async for a in client.stream([photo(k % 3) for k in range(12)])]
            assert client.reconnects == rogue.streams - 1 >= 4
    assert [a.seq for a in answers if isinstance(a, Answer)] == list(range(1, 13))


async def test_a_passing_fault_is_sent_again_and_a_lasting_one_reported(tiny_bundle: Bundle, tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            seq = message.frame.seq
            seen[seq] = seen.get(seq, 0) + 1
            if seq == 2 and seen[seq] == 1:
                await context.write(pb.ServerMessage(fault=pb.Fault(seq=seq, code=15, message="damaged")))
            elif seq == 3:
                await context.write(pb.ServerMessage(fault=pb.Fault(seq=seq, code=3, message="refused")))
            else:
                await context.write(result(seq))

    async with rogue_server(tiny_bundle, converse) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            answers = [a async for a in client.stream([photo(k) for k in range(4)])]
    assert [isinstance(a, Answer) for a in answers] == [True, True, False, True]
    assert seen == {1: 1, 2: 2, 3: 1, 4: 1}
    failure = answers[2]
    assert isinstance(failure, Failure)
    assert "refused" in str(failure.error)


async def test_a_server_that_never_answers_is_given_up(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async def silent(context: Any) -> None:
        await opened(context)
        while isinstance(await context.read(), pb.ClientMessage):
            pass

    async def mute(context: Any) -> None:
        await context.read()
        await asyncio.sleep(60)

    for converse in (silent, mute):
        async with rogue_server(tiny_bundle, converse) as (address, _):
            with pytest.raises(Unavailable, match="gave up"):
                async with EdgeClient(address, **settings(tmp_path, answer_timeout_s=0.3)) as client:
                    await client.infer(photo())


async def test_a_server_that_changes_its_bundle_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    import grpc

    calls = 0

    async def converse(context: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this server has another bundle")
        await opened(context)
        await context.read()

    async with rogue_server(tiny_bundle, converse) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            with pytest.raises(BundleMismatch, match="another bundle"):
                await client.infer(photo())


async def test_wishes_of_the_cloud(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async def converse(context: Any) -> None:
        await context.read()
        reply = pb.Opened(session_id="s", resume_token="t", window=4, point="s1-r1")
        await context.write(pb.ServerMessage(opened=reply))
        for wish in ("nope", "s2-r1"):
            await context.read()
            await context.write(pb.ServerMessage(set_point=pb.SetPoint(point=wish, reason="a test")))
            await context.write(result(1 if wish == "nope" else 2))
        await context.read()
        await context.write(result(3))

    async with rogue_server(tiny_bundle, converse) as (address, _):
        take_bundle(tiny_bundle.root, EdgeSettings.load({"server": address} | settings(tmp_path)))
        async with EdgeClient(address, **settings(tmp_path)) as client:
            points = [(await client.infer(photo())).point for _ in range(3)]
            assert points == ["s1-r1", "s1-r1", "s2-r1"]
            assert [(s.after_seq, s.old, s.new, s.reason) for s in client.switches] == [(2, "s1-r1", "s2-r1", "a test")]


async def test_any_source_and_bad_ones_in_the_middle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(photo_bytes(1))
    (tmp_path / "bad.png").write_bytes(b"no image")
    async with rogue_server(tiny_bundle, answer_all) as (address, _):
        async with EdgeClient(address, **settings(tmp_path, point="s1-r2")) as client:
            sources = [good, photo_bytes(1), tmp_path / "bad.png", photo(1), tmp_path / "none.png"]
            answers = [a async for a in client.stream(sources)]
    assert [type(a).__name__ for a in answers] == ["Answer", "Answer", "Failure", "Answer", "Failure"]
    same = {a.symbols_crc32c for a in answers if isinstance(a, Answer)}
    assert len(same) == 1
    assert all(isinstance(a.error, ImageError) for a in answers if isinstance(a, Failure))
    assert [a.seq for a in answers if isinstance(a, Answer)] == [1, 2, 3]


async def test_leaving_a_stream_early_and_a_source_that_fails(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def broken() -> Any:
        yield photo(0)
        raise RuntimeError("the camera is gone")

    async with rogue_server(tiny_bundle, answer_all) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            async with asyncio.timeout(20):
                stream = client.stream(photo(k % 4) for k in range(1000))
                assert isinstance(await anext(stream), Answer)
                await asyncio.sleep(0.3)  # the producer fills every queue
                await stream.aclose()
                stream = client.stream(broken())
                assert isinstance(await anext(stream), Answer)
                with pytest.raises(RuntimeError, match="the camera is gone"):
                    await anext(stream)
                assert (await client.infer(photo(1))).labels


async def test_settings_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for values, text in (
        ({"server": "nowhere"}, "not HOST:PORT"),
        ({"retries": -2}, "retries"),
        ({"bundle_id": "abc"}, "bundle_id"),
        ({"surprise": 1}, "surprise"),
    ):
        with pytest.raises(InvalidConfig, match=text):
            EdgeClient(**values)
    monkeypatch.setenv("BITNECK_EDGE_RETRIES", "7")
    assert EdgeClient("localhost:1").settings.retries == 7
    assert EdgeClient("localhost:1", retries=2).settings.retries == 2
    monkeypatch.setenv("BITNECK_EDGE_RETRYS", "7")
    with pytest.raises(InvalidConfig, match="BITNECK_EDGE_RETRYS"):
        EdgeClient("localhost:1")


async def test_everyone_who_waits_for_room_is_woken() -> None:
    """Waiters share one event, and each one clears it: none may miss that a frame was answered, or that all is over."""
    exchange = Exchange(key_every=1)
    exchange.granted(window=1, reach=0, same_session=True)
    first = await exchange.send("s1-r1", b"1")
    waiters = [asyncio.create_task(exchange.takes(0, 60.0)) for _ in range(5)]
    await asyncio.sleep(0)
    exchange.take(Result(first.seq, None, None))
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiters) == [True] * 5
    second = await exchange.send("s1-r1", b"2")
    waiters = [asyncio.create_task(exchange.takes(0, 60.0)) for _ in range(5)]
    sending = [asyncio.create_task(exchange.send("s1-r1", b"3")) for _ in range(2)]
    await asyncio.sleep(0)
    exchange.fail(Unavailable("the end"))
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiters) == [False] * 5
        results = await asyncio.gather(second.answer, *sending, return_exceptions=True)
    assert [str(each) for each in results] == ["the end"] * 3
