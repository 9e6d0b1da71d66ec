"""Devices that go over to another bundle: what they take with them, and what they leave behind on the server."""

import asyncio
import contextlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import StateUnusable
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.photographs import Photographs
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.fleet.state_file import StateFile
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.reopening import keep_current
from bitneck_testing.consumers.operator import CANARY, call, serving
from bitneck_testing.devices.streaming import Device, until
from bitneck_testing.photographs import add_photos, photo
from bitneck_testing.processes import Server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

NEW = {"bundle": "new", "clients": "cam-*"}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates")
    make_tiny_bundle(folder / "new", seed=1)
    return folder


@pytest.fixture(scope="module")
def new(candidates: Path) -> Bundle:
    return Bundle.open(candidates / "new")


async def sessions_of(server: Server) -> list[dict[str, Any]]:
    found = await call(server, "GET", "/v1/sessions")
    return list(found["sessions"] if isinstance(found, dict) else found)


async def only(server: Server, bundle_id: str) -> None:
    """Wait until there is one session, with this bundle."""
    async with asyncio.timeout(60):
        while [each["bundle_id"] for each in await sessions_of(server)] != [bundle_id]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_each_device_waits_for_a_time_of_its_own() -> None:
    moved, wanted = asyncio.Event(), asyncio.Event()

    async def move() -> None:
        moved.set()

    for spread_s, expected in ((3600.0, False), (0.0, True)):
        wanted.set()
        task = asyncio.create_task(keep_current(wanted, move, spread_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60 if expected else 0.3):
                await moved.wait()
        assert moved.is_set() == expected
        task.cancel()


async def test_a_device_that_goes_over_leaves_no_session_behind(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """The server has room for two sessions, and keeps one that was only cut off for ten minutes."""
    with serving(tiny_bundle.root, candidates, "--max-sessions", 2, "--resume-s", 600) as server:
        async with Device.sending(server.grpc, tmp_path, "cam-1") as device:
            for _ in range(2):
                for method, body, bundle in (("POST", NEW, new), ("DELETE", None, tiny_bundle)):
                    await call(server, method, CANARY, body)
                    await device.has(bundle.bundle_id)
                    await only(server, bundle.bundle_id)
            assert device.client.reconnects == 0  # nothing broke
        answers = [each for each in device.results if isinstance(each, Answer)]
        assert len(answers) == device.taken
        assert len({each.session for each in answers}) == 5
        assert len({(each.session, each.seq) for each in answers}) == device.taken > len({each.seq for each in answers})
        assert json.loads(json.dumps(answers[0].to_dict()))["session"] == answers[0].session


async def test_a_session_that_was_left_takes_no_frame_any_more(tiny_bundle: Bundle, candidates: Path) -> None:
    """What was sent before is answered; the token is worth nothing, while that of a stream that was cut still is."""
    frames = Frames(tiny_bundle)
    with serving(tiny_bundle.root, candidates) as server:
        async with stub(server.grpc) as cloud:
            for leaves in (True, False):
                stream = await open_stream(cloud, tiny_bundle.bundle_id)
                await stream.send(frames.frame(1))
                if leaves:
                    await stream.call.write(pb.ClientMessage(leave=pb.Leave()))
                assert (await stream.read()).result.seq == 1
                if leaves:
                    assert await stream.call.code() is not None
                stream.call.cancel()
                again = await open_stream(cloud, tiny_bundle.bundle_id, token=stream.opened.resume_token)
                assert (again.opened.session_id == stream.opened.session_id) == (not leaves)


async def test_nobody_waits_for_a_bundle_that_is_fetched(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """While a device fetches it, the link of the session in use may be opened again."""
    held: list[bool] = []
    with serving(tiny_bundle.root, candidates) as server:
        client = EdgeClient(
            server.grpc, client="cam-1", model="tiny", cache_dir=tmp_path, threads=1, point="s1-r2", going_over_s=0.0,
            on_fetch=lambda _done, _all: held.append(client._renewing.locked()),
        )  # fmt: skip
        async with client:
            held.clear()
            await call(server, "POST", CANARY, NEW)
            await until(lambda: client.bundle.bundle_id == new.bundle_id)
            assert held
            assert not any(held)
            await client.infer(photo())


async def test_the_rate_of_a_session_goes_over_with_its_device(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """One of its own, and one of a rule that is no more; a device without keeps the point that it was started with."""
    limit = {"max_bytes_per_frame": 1e6}
    with serving(tiny_bundle.root, candidates) as server:
        async with (
            Device.sending(server.grpc, tmp_path, "cam-1", point="s1-r2") as own,
            Device.sending(server.grpc, tmp_path, "cam-2", point="s1-r1") as ruled,
            Device.sending(server.grpc, tmp_path, "cam-3", point="s1-r1") as free,
        ):
            await call(server, "PUT", f"/v1/sessions/{own.client.session_id}/rate", {"point": "s1-r1"})
            await call(server, "PUT", "/v1/rate", {"clients": "cam-2", "running": True, **limit})
            await call(server, "DELETE", "/v1/rate?clients=cam-2")
            await until(lambda: own.client.point == "s1-r1" and ruled.client.point != "s1-r1")
            asked = ruled.client.point
            await call(server, "POST", CANARY, NEW)
            for device, point in ((own, "s1-r1"), (ruled, asked), (free, "s1-r1")):
                await device.has(new.bundle_id)
                assert device.client.point == point
                last = device.results[-1]
                assert isinstance(last, Answer)
                assert last.point == point
            policies = {each["client"]: each["policy"] for each in await sessions_of(server)}
            assert policies["cam-1"] == {"point": "s1-r1"}
            assert policies["cam-2"] == limit
            assert policies["cam-3"] in (None, {"auto": True})


async def test_a_token_of_another_client_brings_no_rate(tiny_bundle: Bundle, candidates: Path) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        async with stub(server.grpc) as cloud:
            before = await open_stream(cloud, tiny_bundle.bundle_id, client="cam-1")
            await call(server, "PUT", f"/v1/sessions/{before.opened.session_id}/rate", {"point": "s1-r1"})
            good = before.opened.resume_token
            for token, point in ((good, "s1-r1"), (good[:-2], ""), ("x", ""), ("", "")):
                stream = cloud.Stream()
                opening = pb.Open(bundle_id=tiny_bundle.bundle_id, client="cam-2", follows=token)
                await stream.write(pb.ClientMessage(open=opening))
                opened = (await stream.read()).opened
                assert opened.session_id != before.opened.session_id
                assert opened.point == point


async def test_sessions_of_a_canary_before_count_with_the_second_one(
    tiny_bundle: Bundle, new: Bundle, candidates: Path
) -> None:
    frames = Frames(new)
    with serving(tiny_bundle.root, candidates) as server:
        await call(server, "POST", CANARY, NEW)
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, new.bundle_id, client="cam-1")
            await call(server, "DELETE", CANARY)
            assert (await stream.read()).HasField("new_bundle")
            await call(server, "POST", CANARY, NEW)
            assert (await stream.ask(frames.frame(1))).HasField("result")
            found = await call(server, "GET", CANARY)
    assert found["comparison"]["candidate"]["frames"] == 1


async def test_a_kept_canary_whose_group_is_gone_is_for_nobody(
    tiny_bundle: Bundle, candidates: Path, tmp_path: Path
) -> None:
    state = ("--state-db", tmp_path / "state.db")
    with serving(tiny_bundle.root, candidates, *state, "--groups", '{"doors": ["door-*"]}') as server:
        await call(server, "POST", CANARY, {"bundle": "new", "clients": "@doors"})
    with serving(tiny_bundle.root, candidates, *state) as server:
        assert (await call(server, "GET", CANARY))["canary"]["clients"] == "@doors"
        assert "is for @doors, but the settings have no such group" in server.read_log()


def test_a_choice_of_another_kind_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    choice = BundleChoice(
        model="tiny", kind="canary", base="a", bundle="new", bundle_id="b", clients="*", since="", by=""
    )
    state = StateFile.open(path)
    state.save_choices("tiny", [choice])
    assert state.choices() == [choice]
    state.close()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE bundle_choices SET kind = 'both'")
    state = StateFile.open(path)
    with pytest.raises(StateUnusable, match="cannot be read"):
        state.choices()
    state.close()


def test_a_manifest_is_read_again_only_if_it_has_changed(tmp_path: Path) -> None:
    path = make_tiny_bundle(tmp_path / "new").root / "manifest.json"
    listed = Candidates(tmp_path)
    (first,) = listed.all()
    (second,) = listed.all()
    assert second is first
    found, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-2] + b"!!")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    (broken,) = listed.all()
    assert broken.problem
    path.unlink()
    assert listed.all()[0].problem == "it has no manifest.json"
    path.write_bytes(data)
    assert listed.all() == [first]


async def test_a_comparison_says_how_long_it_takes(tiny_bundle: Bundle, new: Bundle, tmp_path: Path) -> None:
    """And its thread gives way to nobody: it may hold the interpreter's lock."""
    add_photos(tmp_path / "photos", range(12))
    current, candidate = (ServedModel(bundle, threads=1) for bundle in (tiny_bundle, new))
    comparison = Photographs(tmp_path / "photos", current, candidate)
    niceness, compare = set[int](), comparison._compare

    def watched(*arguments: Any) -> None:
        niceness.add(os.getpriority(os.PRIO_PROCESS, 0))
        compare(*arguments)

    comparison._compare = watched  # type: ignore[method-assign]
    assert comparison.left_s is None
    task = asyncio.create_task(comparison.run())
    left: list[float] = []
    while not task.done():
        if comparison.left_s is not None:
            left.append(comparison.left_s)
        await asyncio.sleep(0.001)
    assert left
    assert all(each >= 0 for each in left)
    assert comparison.left_s is None
    assert (comparison.state, comparison.done) == ("done", 12)
    assert niceness == {os.getpriority(os.PRIO_PROCESS, os.getpid())}
