"""Streams of similar frames, end to end: the same answers in fewer bytes, and whatever happens to the references."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.conditional_codec import Reference
from bitneck.errors import CorruptPayload, ReferenceUnknown
from bitneck.image import preprocess
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import check_frame, seal_frame
from bitneck_cloud.sessions.session import Session
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN, Server, running_server, start_server
from bitneck_testing.rogue_servers import result, rogue_server
from bitneck_testing.streams import Frames, Stream, empty_result, open_stream, sealed, stub
from bitneck_testing.tiny_bundles import INPUT, make_tiny_bundle

CODE = {status.name: status.value[0] for status in grpc.StatusCode}
HANG_S = 60.0
"""Only a hang takes so long."""
WINDOW = 4
REACH = WINDOW + 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of its three points two have conditional tables, and one of these contexts too."""
    folder = tmp_path_factory.mktemp("similar") / "bundle"
    return make_tiny_bundle(folder, similar=("s1-r2", "s2-r1"), contextual=("s2-r1",))


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with running_server(bundle.root, options=("--window", str(WINDOW))) as running:
        yield running


LADDER = Ladder(
    [OperatingPoint(id="p", unit="u", split="s", step=1.0, stride=1, latent_shape=(1, 1, 1), payload_bytes=1.0,
                    bpp_payload=0.1, accuracy=0.5)]
)  # fmt: skip


def scene(count: int, *, change: float = 0.01) -> list[Capture]:
    """Pictures of which each resembles the one before it."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(photo(1), dtype=np.float32)
    captures = []
    for k in range(count):
        pixels = pixels * (1 - change) + np.asarray(photo(2 + k), dtype=np.float32) * change
        noisy = np.clip(pixels + rng.normal(0, 1, pixels.shape), 0, 255).astype(np.uint8)
        captures.append(Capture(Image.fromarray(noisy), f"frame {k}", similar=True))
    return captures


def client(address: str, tmp_path: Path, **values: Any) -> EdgeClient:
    fixed = {"cache_dir": tmp_path / "cache", "threads": 1, "retries": 30, "point": "s1-r2", "similar": "auto"}
    return EdgeClient(address, **(fixed | values))


async def answers(it: EdgeClient, captures: Any, **options: Any) -> list[Answer]:
    found = [r async for r in it.stream(captures, **options)]
    assert not [r for r in found if isinstance(r, Failure)]
    return [r for r in found if isinstance(r, Answer)]


def count(server: Server, metric: str) -> float:
    lines = httpx.get(f"{server.http}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(metric))


async def test_the_same_answers_in_fewer_bytes(server: Server, bundle: Bundle, tmp_path: Path) -> None:
    before = count(server, "bitneck_similar_frames_total")
    async with client(server.grpc, tmp_path, similar="off") as it:
        alone = await answers(it, scene(60))
    async with client(server.grpc, tmp_path) as it:
        similar = await answers(it, scene(60))
        plain = await answers(it, [photo(k) for k in range(5)])  # no captures of a video: auto leaves them alone
    assert [a.symbols_crc32c for a in similar] == [a.symbols_crc32c for a in alone]
    assert [a.labels for a in similar] == [a.labels for a in alone]
    assert [a.reference for a in alone] == [0] * 60
    assert similar[0].reference == 0
    referring = [a for a in similar if a.reference]
    assert len(referring) > 40
    assert max(a.reference for a in referring) <= REACH
    assert all(b.message_bytes < a.message_bytes for a, b in zip(alone, similar, strict=True) if b.reference)
    assert all(b.message_bytes == a.message_bytes for a, b in zip(alone, similar, strict=True) if not b.reference)
    assert sum(a.payload_bytes for a in similar) < 0.6 * sum(a.payload_bytes for a in alone)
    assert {a.reference for a in plain} == {0}
    assert count(server, "bitneck_similar_frames_total") == before + len(referring)


async def test_a_scene_that_changes_altogether_costs_nothing_more(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, similar="off") as it:
        alone = await answers(it, scene(30, change=1.0))
    async with client(server.grpc, tmp_path, similar="on") as it:
        similar = await answers(it, scene(30, change=1.0))
    assert all(b.message_bytes <= a.message_bytes for a, b in zip(alone, similar, strict=True))


async def test_key_frames_come_as_often_as_they_are_asked_for(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, key_every=5, in_flight=1) as it:
        one_by_one = [await it.infer(capture) for capture in scene(21)]
    assert [a.seq for a in one_by_one if not a.reference] == [1, 6, 11, 16, 21]
    assert {a.reference for a in one_by_one} == {0, 1}
    async with client(server.grpc, tmp_path, key_every=1) as it:
        assert {a.reference for a in await answers(it, scene(10))} == {0}


async def test_each_point_has_its_own_references(server: Server, tmp_path: Path) -> None:
    """Switches in mid-stream: the first frame at a point is a key frame, and one without tables always is."""
    async with client(server.grpc, tmp_path, similar="off", in_flight=1) as it:
        alone = []
        for k, capture in enumerate(scene(24)):
            it.point = ("s1-r2", "s2-r1", "s1-r1")[k // 3 % 3]
            alone.append(await it.infer(capture))
    async with client(server.grpc, tmp_path, in_flight=1) as it:
        found = []
        for k, capture in enumerate(scene(24)):
            it.point = ("s1-r2", "s2-r1", "s1-r1")[k // 3 % 3]
            found.append(await it.infer(capture))
    assert [a.symbols_crc32c for a in found] == [a.symbols_crc32c for a in alone]
    assert [a.labels for a in found] == [a.labels for a in alone]
    assert [a.reference for a in found[:9]] == [0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert [a.reference for a in found[9:18]] == [7, 1, 1, 7, 1, 1, 0, 0, 0]
    assert {a.reference for a in found if a.point == "s1-r1"} == {0}


async def test_going_back_and_forth_between_points(server: Server, tmp_path: Path) -> None:
    async with client(server.grpc, tmp_path, in_flight=1) as it:
        found = []
        for k, capture in enumerate(scene(12)):
            it.point = "s2-r1" if k % 3 == 2 else "s1-r2"
            found.append(await it.infer(capture))
    assert [a.reference for a in found] == [0, 1, 0, 2, 1, 3, 2, 1, 3, 2, 1, 3]


@pytest.mark.parametrize("key", ["", "k" * 32], ids=["forgotten", "adopted"])
async def test_a_server_killed_in_mid_stream(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Nothing lost, nothing answered twice; what the new process does not have is sent again, coded by itself.

    With the same key the session goes on under its name, and the client learns only from a fault that its references
    are gone.
    """
    if key:
        monkeypatch.setenv("BITNECK_CLOUD_TOKEN_KEY", key)
    first = start_server(bundle.root, options=("--window", "4"))
    async with client(first.grpc, tmp_path, similar="off") as it:
        alone = await answers(it, scene(120))
    second: Server | None = None

    async def pictures() -> AsyncIterator[Capture]:
        nonlocal second
        for k, capture in enumerate(scene(120)):
            if k == 60:
                first.kill()
                second = await asyncio.to_thread(start_server, bundle.root, options=("--window", "4"), grpc=first.grpc)
            yield capture

    try:
        async with asyncio.timeout(HANG_S * 2), client(first.grpc, tmp_path) as it:
            found = await answers(it, pictures())
        assert second is not None
        assert [a.seq for a in found] == list(range(1, 121))
        assert [a.symbols_crc32c for a in found] == [a.symbols_crc32c for a in alone]
        assert [a.labels for a in found] == [a.labels for a in alone]
        assert sum(1 for a in found[70:] if a.reference) > 30
        faults = count(second, 'bitneck_frames_total{model="tiny",outcome="ABORTED"}')
        assert (faults > 0) == bool(key)
        assert "Traceback" not in second.read_log()
    finally:
        for each in (first, second):
            if each is not None:
                each.kill()
                assert each.process.stdout is not None
                each.process.stdout.close()
                each.log.close()


async def test_every_reference_refused_by_the_server(bundle: Bundle, tmp_path: Path) -> None:
    """Each such frame is sent again under its number, coded by itself, and answered once."""
    seen: list[tuple[int, int]] = []

    async def converse(context: Any) -> None:
        message = await context.read()
        assert message.open.references
        granted = pb.Opened(session_id="s-rogue", resume_token="t", window=4, references=4)
        await context.write(pb.ServerMessage(opened=granted))
        while isinstance(message := await context.read(), pb.ClientMessage):
            frame = message.frame
            seen.append((frame.seq, frame.reference))
            if frame.reference:
                code = CODE["ABORTED"] if frame.seq % 2 else CODE["DATA_LOSS"]
                await context.write(pb.ServerMessage(fault=pb.Fault(seq=frame.seq, code=code, message="what frame?")))
            else:
                frame.point = bundle.manifest.points[frame.position - 1].id
                check_frame(frame)
                await context.write(result(frame.seq))

    async with rogue_server(bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with client(address, tmp_path, in_flight=1) as it:
            found = [await it.infer(capture) for capture in scene(9)]
    assert [a.labels[0].name for a in found] == [f"answer {k}" for k in range(1, 10)]
    # A refused frame is answered by its second copy, which the next one may refer to.
    assert seen[:5] == [(1, 0), (2, 1), (2, 0), (3, 1), (3, 0)]


async def test_a_server_that_grants_nothing_gets_no_references(bundle: Bundle, tmp_path: Path) -> None:
    seen: list[int] = []

    async def converse(context: Any) -> None:
        await context.read()
        await context.write(pb.ServerMessage(opened=pb.Opened(session_id="s-old", resume_token="t", window=4)))
        while isinstance(message := await context.read(), pb.ClientMessage):
            seen.append(message.frame.reference)
            await context.write(result(message.frame.seq))

    async with rogue_server(bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        async with client(address, tmp_path) as it:
            await answers(it, scene(10))
    assert seen == [0] * 10


class Similar(Frames):
    """Right frames with references."""

    def symbols(self, point: str, seed: int) -> np.ndarray:
        encoder = self.encoders[point]
        f = self.chain.run(preprocess(photo(seed), INPUT), 0, self.chain.head_length(encoder.point.split))
        return encoder.symbols(f)

    def against(self, seq: int, distance: int, point: str, seed: int, other: int) -> pb.Frame:
        """Frame `seq` of photograph `seed`, coded against photograph `other`, said to stand `distance` before it."""
        codec = self.encoders[point].conditional
        assert codec is not None
        reference = codec.keep(self.symbols(point, other))
        return sealed(
            seq=seq,
            point=point,
            payload=codec.encode(self.symbols(point, seed), reference),
            reference=distance,
            reference_crc32c=reference.crc32c,
        )


@pytest.fixture(scope="module")
def frames(bundle: Bundle) -> Similar:
    return Similar(bundle)


async def opened(cloud: Any, bundle: Bundle, *, references: bool, token: str = "") -> Stream:
    call = cloud.Stream()
    request = pb.Open(bundle_id=bundle.bundle_id, client="raw", references=references, resume_token=token)
    await call.write(pb.ClientMessage(open=request))
    return Stream(call, (await call.read()).opened)


async def refused(stream: Stream, frame: pb.Frame) -> str:
    fault = (await stream.ask(frame)).fault
    assert fault.seq == frame.seq
    return next(name for name, code in CODE.items() if code == fault.code)


async def test_wrong_and_hostile_references(server: Server, bundle: Bundle, frames: Similar) -> None:
    """Each gets a fault of its own, the stream goes on, and the frame may come again, coded by itself."""
    async with stub(server.grpc) as cloud:
        stream = await opened(cloud, bundle, references=True)
        assert stream.opened.references == REACH
        assert (await stream.ask(frames.frame(1, "s1-r2", 1))).result.seq == 1
        assert (await stream.ask(frames.frame(2, "s2-r1", 1))).result.seq == 2
        assert (await stream.ask(frames.frame(3, "s1-r1", 1))).result.seq == 3
        for distance in (1, 2, 4, 5, 2**32 - 1):  # two of other points, and what is before the first one
            assert await refused(stream, frames.against(4, distance, "s1-r2", 2, 1)) == "ABORTED"
        # The right frame is named, and the payload coded against other symbols than it has.
        assert await refused(stream, frames.against(4, 3, "s1-r2", 2, 7)) == "DATA_LOSS"
        honest = frames.against(4, 3, "s1-r2", 2, 1)
        for field, value in (("payload", honest.payload + b"x"), ("point", "s2-r1"), ("crc32c", 1)):
            spoiled = pb.Frame()
            spoiled.CopyFrom(honest)
            setattr(spoiled, field, value)
            assert await refused(stream, spoiled) in ("DATA_LOSS", "ABORTED")
        no_reference = pb.Frame()
        no_reference.CopyFrom(honest)
        no_reference.reference = 0  # as a server reads it that does not know the field
        assert await refused(stream, no_reference) == "DATA_LOSS"
        codec = frames.encoders["s1-r2"].conditional
        assert codec is not None
        one = codec.keep(frames.symbols("s1-r2", 1))
        long = bytes(codec.max_payload_bytes + 1)
        for payload in (long, honest.payload + b"\0"):  # right in all but the payload itself
            frame = sealed(seq=4, point="s1-r2", payload=payload, reference=3, reference_crc32c=one.crc32c)
            assert await refused(stream, frame) == "INVALID_ARGUMENT"
        answer = (await stream.ask(honest)).result
        alone = await opened(cloud, bundle, references=False)
        assert (await alone.ask(frames.frame(1, "s1-r2", 2))).result.output == answer.output
        # What is answered and sent again, and references to it.
        assert (await stream.ask(honest)).result == answer
        assert (await stream.ask(frames.against(5, 1, "s1-r2", 3, 2))).result.seq == 5


async def test_only_the_newest_are_kept_and_only_where_it_is_asked_for(
    server: Server, bundle: Bundle, frames: Similar
) -> None:
    async with stub(server.grpc) as cloud:
        plain = await opened(cloud, bundle, references=False)
        assert plain.opened.references == 0
        assert (await plain.ask(frames.frame(1, "s1-r2", 1))).result.seq == 1
        assert await refused(plain, frames.against(2, 1, "s1-r2", 2, 1)) == "ABORTED"
        stream = await opened(cloud, bundle, references=True)
        for seq in range(1, REACH + 3):
            assert (await stream.ask(frames.frame(seq, "s1-r2", seq))).result.seq == seq
        last = REACH + 2
        assert await refused(stream, frames.against(last + 1, last, "s1-r2", 9, 1)) == "ABORTED"
        assert (await stream.ask(frames.against(last + 1, last - 1, "s1-r2", 9, 2))).result.seq == last + 1
        # A resumed session has its references still; one that does not ask for them any more has not.
        token = stream.opened.resume_token
        stream.call.cancel()
        again = await opened(cloud, bundle, references=True, token=token)
        assert again.opened.session_id == stream.opened.session_id
        assert (await again.ask(frames.against(last + 2, 1, "s1-r2", 8, 9))).result.seq == last + 2
        again.call.cancel()
        third = await opened(cloud, bundle, references=False, token=again.opened.resume_token)
        assert await refused(third, frames.against(last + 3, 1, "s1-r2", 9, 8)) == "ABORTED"
        request = pb.InferRequest(bundle_id=bundle.bundle_id, frame=frames.against(2, 1, "s1-r2", 2, 1))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await cloud.Infer(request)
        assert told.value.code() is grpc.StatusCode.ABORTED
        no_tables = await open_stream(cloud, bundle.bundle_id)
        assert no_tables.opened.references == 0


@pytest.mark.parametrize(("kept_bytes", "reach"), [(0, 0), (32, 0), (64, 1), (200, 5)])
def test_what_is_granted_is_bounded_in_bytes(bundle: Bundle, kept_bytes: int, reach: int) -> None:
    """A frame's symbols take 32 bytes at most."""
    granted = asyncio.run(_granted(bundle, "--similar-bytes", str(kept_bytes)))
    assert granted == reach


def test_a_bundle_without_conditional_tables_is_told_at_the_opening(tiny_bundle: Bundle) -> None:
    assert asyncio.run(_granted(tiny_bundle)) == 0


async def _granted(bundle: Bundle, *options: str) -> int:
    with running_server(bundle.root, options=options) as server:
        async with stub(server.grpc) as cloud:
            return int((await opened(cloud, bundle, references=True)).opened.references)


@given(st.lists(st.integers(1, 60), max_size=120), st.integers(1, 6))
def test_a_session_keeps_the_newest_and_no_more(seqs: list[int], window: int) -> None:
    session = Session(session_id="s", model="m", client="c", ladder=LADDER, window=window, assumed_fps=10.0, now=0.0)
    session.keep(1000)
    assert session.reach == window + 8
    answered: set[int] = set()
    for seq in seqs:
        if seq in answered:
            continue
        answered.add(seq)
        session.complete(empty_result(seq), Reference("p", np.zeros((1, 1, 1), np.int8), seq))
        kept = set(sorted(answered)[-window - 9 :])
        for other in range(1, 61):
            if other in kept:
                found = session.reference(100, 100 - other, "p")
                assert found is not None
                assert found.crc32c == other
            else:
                with pytest.raises(ReferenceUnknown):
                    session.reference(100, 100 - other, "p")
    session.keep(3)
    assert session.reach == 2
    for rank, other in enumerate(sorted(answered, reverse=True)):
        if rank < 3:
            assert session.reference(100, 100 - other, "p") is not None
        else:
            with pytest.raises(ReferenceUnknown):
                session.reference(100, 100 - other, "p")
    session.keep(1)  # the newest alone would be gone before a frame that refers to it comes
    assert session.reach == 0
    for other in answered:
        with pytest.raises(ReferenceUnknown):
            session.reference(100, 100 - other, "p")


def test_the_crc_covers_the_reference() -> None:
    frame = seal_frame(seq=5, point="p", payload=b"abc", reference=2, reference_crc32c=99)
    check_frame(frame, 99)
    with pytest.raises(CorruptPayload):
        check_frame(frame, 98)
    with pytest.raises(ReferenceUnknown, match="coded by itself"):
        check_frame(frame)
    frame = replace(frame, reference=0)
    with pytest.raises(CorruptPayload):
        check_frame(frame)
    check_frame(seal_frame(seq=5, point="p", payload=b"abc"), 99)  # without a reference there is nothing to cover


def test_a_video_is_coded_so_and_photographs_are_not(server: Server, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    video = tmp_path / "scene.mp4"
    with av.open(str(video), "w") as container:
        track = container.add_stream("mpeg4", rate=10)
        track.width, track.height = 48, 40
        for capture in scene(20):
            container.mux(track.encode(av.VideoFrame.from_image(capture.photo)))
        container.mux(track.encode())
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, capture in enumerate(scene(20)):
        assert isinstance(capture.photo, Image.Image)
        capture.photo.save(folder / f"{k:02d}.png")

    def run(source: Path, *options: str) -> list[int]:
        command = [
            str(BIN / "bitneck-edge"), "run", "--server", server.grpc, "--point", "s1-r2", "--json",
            "--cache-dir", str(tmp_path / "cache"), *options, str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [frame["reference"] for frame in json.loads(done.stdout)["frames"]]

    assert any(run(video))
    assert not any(run(video, "--similar", "off"))
    assert not any(run(folder))
    assert any(run(folder, "--similar", "on"))
    assert not any(run(folder, "--similar", "on", "--key-every", "1"))
