"""Faults in numbers: malformed, cut and late requests, slow readers, clients that vanish, fuzzed bytes, SIGTERM."""

import asyncio
import itertools
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bitneck.bundle import Bundle
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.client import EdgeClient
from bitneck_edge.measure.load_generator import LoadPlan, run_load, summarize
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN, running_server, start_server
from bitneck_testing.streams import Frames, Stream, open_stream, stub

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = 10_000


@pytest.mark.timeout(240)
async def test_ten_thousand_requests_of_which_a_third_is_bad(tiny_bundle: Bundle, frames: Frames) -> None:
    """Each frame is answered once, with a result or with its own fault; then a clean one succeeds."""
    payloads = {point: [frames.payload(point, k) for k in range(4)] for point in frames.encoders}
    sealed = {point: [frames.frame(1, point, seed=k) for k in range(4)] for point in payloads}
    with running_server(tiny_bundle.root, options=("--window", "32", "--max-sessions", "2000")) as server:
        outcomes: Counter[str] = Counter()

        async def client(k: int) -> None:
            dice = random.Random(k)
            left = REQUESTS // 8
            async with stub(server.grpc) as cloud:
                while left > 0:
                    stream = await open_stream(cloud, tiny_bundle.bundle_id, client=f"chaos-{k}")
                    turns = min(left, dice.randint(1, 400))
                    left -= turns
                    await conversation(stream, dice, turns)

        async def conversation(stream: Stream, dice: random.Random, turns: int) -> None:
            for seq in range(1, turns + 1):
                frame = pb.Frame()
                frame.CopyFrom(dice.choice(sealed[dice.choice(list(sealed))]))
                frame.seq = seq
                fate = dice.random()
                if fate < 0.1:
                    frame.payload = dice.randbytes(dice.randint(0, 200))  # the CRC no longer fits
                elif fate < 0.2:
                    frame.payload = frame.payload[: dice.randint(0, len(frame.payload))] + b"x"
                elif fate < 0.3:
                    frame.point = dice.choice(["", "s9-r9", "../../etc/passwd", "s1-r1\0", "ü" * 40])
                elif fate < 0.35:
                    frame.deadline_ms = 1  # late, or just in time
                answer = await stream.ask(frame)
                kind = answer.WhichOneof("message")
                outcomes[str(kind)] += 1
                if fate < 0.3 or fate >= 0.35:
                    assert kind == ("result" if fate >= 0.3 else "fault")
                elif kind == "fault":
                    assert answer.fault.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
                assert getattr(answer, str(kind)).seq == seq
            if dice.random() < 0.5:
                stream.call.cancel()  # cut, without a word
            else:
                await stream.call.done_writing()

        await asyncio.gather(*[client(k) for k in range(2)])
        after_some = server.resident_mib
        await asyncio.gather(*[client(k) for k in range(2, 8)])
        assert sum(outcomes.values()) == REQUESTS
        assert 0.27 < outcomes["fault"] / REQUESTS < 0.38
        assert server.resident_mib < after_some + 24
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            assert (await stream.ask(frames.frame(1))).HasField("result")


async def test_a_slow_reader_holds_up_nobody_but_itself(tiny_bundle: Bundle, frames: Frames) -> None:
    with running_server(tiny_bundle.root, options=("--window", "8")) as server:
        async with stub(server.grpc) as cloud, stub(server.grpc) as other:
            slow = await open_stream(cloud, tiny_bundle.bundle_id)
            before = server.resident_mib
            frame = frames.frame(1)

            async def push() -> None:
                for seq in range(1, 100_000):  # never reads
                    frame.seq = seq
                    await slow.send(frame)

            pushing = asyncio.create_task(push())
            quick = await open_stream(other, tiny_bundle.bundle_id)
            for seq in range(1, 200):
                assert (await quick.ask(frames.frame(seq, seed=seq % 3))).HasField("result")
            await asyncio.sleep(1.0)
            assert not pushing.done()  # flow control has stopped it
            assert server.resident_mib < before + 32
            pushing.cancel()
            slow.call.cancel()


async def test_clients_that_vanish_leave_nothing_behind(tiny_bundle: Bundle, frames: Frames) -> None:
    options = ("--resume-s", "0.2", "--max-sessions", "64")
    with running_server(tiny_bundle.root, options=options) as server:

        async def vanish(k: int) -> None:
            async with stub(server.grpc) as cloud:
                stream = await open_stream(cloud, tiny_bundle.bundle_id)
                for seq in range(1, 4):
                    await stream.send(frames.frame(seq, seed=k % 4))
                stream.call.cancel()

        for _ in range(10):
            await asyncio.gather(*[vanish(k) for k in range(20)])
            await asyncio.sleep(0.25)
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            assert (await stream.ask(frames.frame(1))).HasField("result")


async def test_raw_garbage_on_the_socket_harms_no_one(tiny_bundle: Bundle, frames: Frames) -> None:
    dice = random.Random(0)
    with running_server(tiny_bundle.root) as server:
        host, port = server.grpc.rsplit(":", 1)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        for k in range(100):
            reader, writer = await asyncio.open_connection(host, int(port))
            garbage = dice.randbytes(dice.randint(1, 4000))
            if k % 2:
                garbage = preface + struct.pack(">I", dice.randint(0, 2**31)) + garbage
            writer.write(garbage)
            writer.close()
            del reader
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id)
            assert (await stream.ask(frames.frame(1))).HasField("result")


async def test_messages_that_are_no_protobuf(tiny_bundle: Bundle, frames: Frames) -> None:
    """Each gets its status or its fault; a good frame after them on the same stream is answered."""
    dice = random.Random(1)
    garbage = [b"\xff" + dice.randbytes(dice.randint(1, 300)) for _ in range(100)]
    opening = pb.ClientMessage(open=pb.Open(bundle_id=tiny_bundle.bundle_id, client="x")).SerializeToString()
    good = pb.ClientMessage(frame=frames.frame(1)).SerializeToString()

    async def one_by_one(messages: list[bytes]) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    with running_server(tiny_bundle.root) as server:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stream: Any = channel.stream_stream("/bitneck.v2.SplitInference/Stream")
            calls: list[Any] = [
                channel.unary_unary("/bitneck.v2.SplitInference/Infer")(garbage[0]),
                channel.unary_unary("/bitneck.v2.SplitInference/GetManifest")(garbage[1]),
                channel.unary_stream("/bitneck.v2.SplitInference/FetchFile")(garbage[2]).read(),
                stream(one_by_one(garbage[:1])).read(),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            call = stream(one_by_one([opening, *garbage, good]))
            answers = [pb.ServerMessage.FromString(data) async for data in call]
            assert [a.WhichOneof("message") for a in answers] == ["opened", *["fault"] * 100, "result"]


async def test_sigterm_under_load_loses_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The clients are told, finish, and go on at a second server on the same address."""
    with running_server(tiny_bundle.root) as first:
        answers = []
        begun = asyncio.Event()

        async def camera(k: int) -> None:
            async with EdgeClient(first.grpc, cache_dir=tmp_path, retries=30, client=f"camera-{k}") as client:
                for _ in range(120):
                    answers.append(await client.infer(photo(k)))
                    if len(answers) > 80:
                        begun.set()

        cameras = [asyncio.create_task(camera(k)) for k in range(4)]
        await begun.wait()
        first.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.process.wait, 20) == 0
        second = start_server(tiny_bundle.root, grpc=first.grpc)
        try:
            await asyncio.gather(*cameras)
        finally:
            second.stop()
            assert second.process.stdout is not None
            second.process.stdout.close()
            second.log.close()
    assert len(answers) == 480


@pytest.mark.parametrize(
    "plan", [LoadPlan(clients=4, seconds=1.0, warm_s=0.2), LoadPlan(clients=3, seconds=1.0, fps=20)]
)
async def test_the_load_generator_tells_what_it_did(tiny_bundle: Bundle, tmp_path: Path, plan: LoadPlan) -> None:
    with running_server(tiny_bundle.root) as server:
        settings = EdgeSettings.load({"server": server.grpc, "cache_dir": tmp_path})
        document = summarize(await run_load(settings, [photo_bytes(1), photo_bytes(2)], plan))
    assert document["failed"] == 0
    assert document["frames"] > 20
    if plan.fps:
        assert document["offered_per_s"] == 60
        assert 20 < document["frames"] < 120
    assert document["ms"]["round_trip"]["p99"] >= document["ms"]["round_trip"]["p50"] > 0
    assert document["batch_mean"] >= 1


def test_a_seed_and_a_client_have_moments_of_their_own() -> None:
    def moments(seed: int, client: int) -> list[float]:
        return list(itertools.takewhile(lambda moment: moment < 100, LoadPlan(fps=20, seed=seed).moments(client)))

    all_moments = [moments(seed, client) for seed in (0, 1) for client in (0, 1)]
    assert [moments(seed, client) for seed in (0, 1) for client in (0, 1)] == all_moments
    assert all(one[:5] != other[:5] for one, other in itertools.combinations(all_moments, 2))
    for each in all_moments:
        assert each == sorted(each)
        assert 1800 < len(each) < 2200  # 2000, and more than four standard deviations


def test_the_load_command(tiny_bundle: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(photo_bytes(1))
    with running_server(tiny_bundle.root) as server:
        command = [BIN / "bitneck-edge", "load", picture, "--server", server.grpc, "--cache-dir", tmp_path / "cache"]
        done = subprocess.run([*command, "--seconds", "0.5", "--clients", "2"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "round trip" in done.stdout
        unknown = subprocess.run([*command, "--point", "s9-r9"], capture_output=True, text=True)
        assert unknown.returncode == 2
        assert "s1-r1" in unknown.stderr


def test_a_short_run_of_the_fuzzer() -> None:
    """The same program runs a million inputs; see docs/serving.md."""
    command = [sys.executable, ROOT / "benchmarks" / "strangers" / "fuzz.py", "--inputs", "3000", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3000 inputs" in done.stdout
