"""The edge when things go wrong under its feet: blocked writes, lost links, full disks, odd names, signals."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, DeadlineExceeded, ImageError, Overloaded, ProtocolError, Unavailable
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.bundles.fetch import take_bundle
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import Access
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import BIN
from bitneck_testing.rogue_servers import answer_all, opened, result, rogue_server

HANG_S = 60.0
"""Only a hang takes so long."""
LARGE = bytes(200_000)
"""A few dozen of these fill every buffer between a client and a server that does not read."""


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "retries": 1, "connect_timeout_s": 5.0, "threads": 1} | values


def link_to(address: str, *, answer_timeout_s: float = 600.0, retries: int = 3) -> Link:
    return Link(
        LinkSettings(
            access=Access(address=address), model="tiny", bundle_id="", client="test", connect_timeout_s=5.0,
            answer_timeout_s=answer_timeout_s, retries=retries,
        ),
        lambda _point, _reason: None,
    )  # fmt: skip


async def never_read(context: Any) -> None:
    await opened(context, window=64)
    await asyncio.sleep(HANG_S * 2)


async def run_edge(*arguments: object, **values: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        str(BIN / "bitneck-edge"), *map(str, arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **values
    )


async def test_a_server_that_stops_reading_is_given_up(tiny_bundle: Bundle) -> None:
    """The watchdog cancels the call below a write that blocks; nobody may take that for a cancellation of his own."""
    async with rogue_server(tiny_bundle, never_read) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(address, answer_timeout_s=0.5, retries=0)
        await link.open()

        async def send_all() -> str:
            try:
                while True:
                    await link.send("s1-r1", LARGE)
            except BitneckError as exc:
                return type(exc).__name__

        assert await asyncio.gather(send_all(), return_exceptions=True) == ["Unavailable"]
        await link.close()


async def test_frames_are_resent_to_a_server_that_does_not_read(tiny_bundle: Bundle) -> None:
    streams = 0

    async def converse(context: Any) -> None:
        nonlocal streams
        streams += 1
        if streams == 1:
            await opened(context, window=64)
            for _ in range(64):
                await context.read()
            return
        await never_read(context)

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(address, answer_timeout_s=1.0, retries=1)
        await link.open()
        sent = [await link.send("s1-r1", LARGE) for _ in range(64)]
        with pytest.raises(Unavailable, match="gave up"):
            await sent[0].answer
        await link.close()


async def test_a_caller_who_gives_up_in_mid_write_breaks_nothing(tiny_bundle: Bundle) -> None:
    """gRPC cancels a whole call when one write of it is cancelled; the link opens another and resumes."""
    streams = 0

    async def converse(context: Any) -> None:
        nonlocal streams
        streams += 1
        await (never_read if streams == 1 else answer_all)(context)

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(address)
        await link.open()
        sent = []
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.5):
                    sent.append(await link.send("s1-r1", LARGE))
        assert 0 < len(sent) < 64
        for one in sent:
            assert (await one.answer).result.seq == one.seq
        another = await link.send("s1-r1", b"x")
        assert (await another.answer).result.seq == another.seq == len(sent) + 2
        await link.close()


async def test_streams_that_end_while_frames_are_resent(tiny_bundle: Bundle) -> None:
    streams = 0

    async def converse(context: Any) -> None:
        nonlocal streams
        streams += 1
        await opened(context, window=64)
        if streams == 1:
            for _ in range(64):
                await context.read()
        elif streams > 4:
            while isinstance(message := await context.read(), pb.ClientMessage):
                await context.write(result(message.frame.seq))
        else:
            await context.read()

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(address, retries=8)
        await link.open()
        sent = [await link.send("s1-r1", LARGE) for _ in range(64)]
        for one in sent:
            assert (await one.answer).result.seq == one.seq
        assert link.reconnects == 4
        await link.close()


async def test_an_oversized_frame_is_refused_before_it_is_sent(tiny_bundle: Bundle) -> None:
    async with rogue_server(tiny_bundle) as (address, rogue), asyncio.timeout(HANG_S):
        link = link_to(address)
        await link.open()
        with pytest.raises(Overloaded, match="limit is 262144"):
            await link.send("s1-r1", bytes(1 << 18))
        good = await link.send("s1-r1", b"x")
        assert (await good.answer).result.seq == good.seq == 1
        assert (link.failure, rogue.streams) == (None, 1)
        await link.close()


async def test_a_dead_link_fails_the_rest_without_encoding_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async def cut(context: Any) -> None:
        await opened(context)
        await context.read()
        raise RuntimeError("cut")

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    async with contextlib.AsyncExitStack() as stack:
        async with rogue_server(tiny_bundle, cut) as (address, _):
            client = EdgeClient(address, **settings(tmp_path, retries=0, connect_timeout_s=1.0))
            await stack.enter_async_context(client)
            assert client.failure is None
            (first,) = [r async for r in client.stream([photo()])]
        rest = [r async for r in client.stream([bad] * 100)]  # encoding them would give an ImageError
        assert isinstance(client.failure, Unavailable)
    assert isinstance(first, Failure)
    assert {type(r.error) for r in rest if isinstance(r, Failure)} == {Unavailable}
    assert len(rest) == 100


@pytest.mark.parametrize(
    "labels", [[], [pb.Label(index=1, name="x", score=float("nan"))], [pb.Label(name="y", score=float("inf"))]]
)
async def test_an_answer_without_a_usable_label(tiny_bundle: Bundle, tmp_path: Path, labels: list[pb.Label]) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        await context.read()
        output = pb.Output(classification=pb.Classification(labels=labels))
        await context.write(pb.ServerMessage(result=pb.Result(seq=1, output=output)))
        await context.read()
        await context.write(result(2))

    async with rogue_server(tiny_bundle, converse) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            first, second = [r async for r in client.stream([photo(), photo()])]
    assert isinstance(first, Failure)
    assert isinstance(first.error, ProtocolError)
    assert isinstance(second, Answer)


async def test_a_picture_that_breaks_when_it_is_used(tiny_bundle: Bundle, tmp_path: Path) -> None:
    whole = photo_bytes(1)
    lazy = Image.open(io.BytesIO(whole[: len(whole) // 2]))  # Pillow reads the pixels when they are asked for
    async with rogue_server(tiny_bundle) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            first, second = [r async for r in client.stream([lazy, photo(2)])]
    assert isinstance(first, Failure)
    assert isinstance(first.error, ImageError)
    assert isinstance(second, Answer)


async def test_many_callers_share_a_client(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle) as (address, _):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            answers = await asyncio.gather(*[client.infer(photo(k)) for k in range(20)])
    assert sorted(a.seq for a in answers) == list(range(1, 21))
    assert all(a.labels[0].name == f"answer {a.seq}" for a in answers)


async def test_a_download_that_stalls_ends(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async def stall(path: str) -> None:
        await asyncio.sleep(HANG_S * 2 if path.endswith("encoder.onnx") else 0)

    async with rogue_server(tiny_bundle, before_fetch=stall) as (address, _), asyncio.timeout(HANG_S):
        with pytest.raises(DeadlineExceeded, match=r"encoder\.onnx"):
            async with EdgeClient(address, **settings(tmp_path, answer_timeout_s=0.5)):
                pass
    assert list((tmp_path / "cache").rglob(".part-*")) == []


async def test_a_disk_that_fills_up_in_mid_write(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The system takes all but the last byte of the largest file, as a full disk does."""
    limit = max(entry.size for entry in tiny_bundle.manifest.files_for("edge").values()) - 1
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["bitneck-edge", *sys.argv[1:]]
from bitneck_edge.cli.main import main
main()
"""
    async with rogue_server(tiny_bundle) as (address, _), asyncio.timeout(HANG_S):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, "fetch", "--server", address, "--cache-dir", str(tmp_path / "cache"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert b"cannot be written (File too large)" in err
    assert b"Traceback" not in err
    for path in (tmp_path / "cache" / "files").iterdir():
        assert path.stat().st_size < limit
    assert not list((tmp_path / "cache").rglob(".part-*"))


@pytest.mark.parametrize("options", [(), ("--json",), ("--verbose",)])
async def test_names_that_are_no_text_or_look_like_markup(
    tiny_bundle: Bundle, tmp_path: Path, options: tuple[str, ...]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"[bold]a.png", b"\xff\xfe.png", "ü.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(photo_bytes(1))

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            labels = [pb.Label(index=1, name="[/x] 鳥", score=1.0)]
            output = pb.Output(classification=pb.Classification(labels=labels))
            await context.write(pb.ServerMessage(result=pb.Result(seq=message.frame.seq, output=output)))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        take_bundle(tiny_bundle.root, EdgeSettings.load({"server": address} | settings(tmp_path)))
        for locale in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
            process = await run_edge(
                "run", *options, "--server", address, "--cache-dir", tmp_path / "cache", folder,
                env=os.environ | {"COLUMNS": "200"} | locale,
            )  # fmt: skip
            out, err = await process.communicate()
            assert process.returncode == 0
            assert err.startswith(b"3 frames: 3 answered")
            assert err.count(b"\n") == 1
            assert b"[bold]a.png" in out
            if options == ("--json",):
                assert json.loads(out)["frames"][0]["labels"][0]["name"] == "[/x] 鳥"
            else:
                assert b"[/x]" in out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_while_the_session_opens(tiny_bundle: Bundle, tmp_path: Path, signum: signal.Signals) -> None:
    reached = asyncio.Event()

    async def mute(context: Any) -> None:
        await context.read()
        reached.set()
        await asyncio.sleep(HANG_S * 2)

    await _stopped(tiny_bundle, tmp_path, mute, reached, signum, b"")


async def test_a_signal_while_answers_are_out(tiny_bundle: Bundle, tmp_path: Path) -> None:
    reached = asyncio.Event()

    async def forgetful(context: Any) -> None:
        await opened(context)
        await context.read()
        await context.write(result(1))
        while isinstance(await context.read(), pb.ClientMessage):
            reached.set()

    out = await _stopped(tiny_bundle, tmp_path, forgetful, reached, signal.SIGINT, b"closed before the answer came")
    assert [f["seq"] for f in json.loads(out)["frames"]] == [1]


async def _stopped(
    bundle: Bundle, tmp_path: Path, converse: Any, reached: asyncio.Event, signum: signal.Signals, said: bytes
) -> bytes:
    """Run against a server that never answers, send ONE signal, and give back what was printed on stdout."""
    (tmp_path / "a.png").write_bytes(photo_bytes(0))
    async with rogue_server(bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        process = await run_edge(
            "run", "--json", "--server", address, "--cache-dir", tmp_path / "cache", "--answer-timeout-s", 600,
            "--repeat", 9, tmp_path / "a.png",
        )  # fmt: skip
        try:
            await reached.wait()
            process.send_signal(signum)
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 128 + signum
    assert said in err
    assert b"Traceback" not in err
    return out
