"""A new bundle for some clients first: real servers, real devices, bundles that answer differently."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.consumers.operator import CANARY, MARK, begin, call, serving
from bitneck_testing.devices.streaming import PHOTOS, Device, documents, until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import free_port, running_server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

POINT = "s1-r2"


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A folder of candidates: one that is right, and some that are not."""
    folder = tmp_path_factory.mktemp("candidates")
    make_tiny_bundle(folder / "new", seed=1)
    make_tiny_bundle(folder / "else", name="else")
    shutil.copytree(tiny_bundle.root, folder / "same")
    broken = make_tiny_bundle(folder / "broken", seed=2).root / "units" / "s1-r1" / "decoder.onnx"
    broken.write_bytes(broken.read_bytes()[:-1])
    (folder / "empty").mkdir()
    (folder / "Not An Id").mkdir()
    return folder


@pytest.fixture(scope="module")
def new(candidates: Path) -> Bundle:
    return Bundle.open(candidates / "new")


def labels_of(bundle: Bundle) -> list[int]:
    frames = Frames(bundle)
    return [int(np.argmax(frames.logits(POINT, frames.payload(POINT, seed)))) for seed in range(PHOTOS)]


# Going over


@pytest.mark.parametrize("pack", [1, 3])
async def test_running_sessions_go_over_and_each_frame_is_answered_once(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path, pack: int
) -> None:
    """Under load, at the beginning, at the end, and when it is promoted."""
    old_id, new_id = tiny_bundle.bundle_id, new.bundle_id
    right = {old_id: labels_of(tiny_bundle), new_id: labels_of(new)}
    assert right[old_id] != right[new_id]
    with serving(tiny_bundle.root, candidates, "--kept-answers", 1_000_000) as server:
        async with (
            Device.sending(server.grpc, tmp_path, "cam-1", pack=pack, pack_ms=10) as cam,
            Device.sending(server.grpc, tmp_path, "door-1") as door,
        ):
            assert (cam.bundle_id, door.bundle_id) == (old_id, old_id)
            begun = await begin(server)
            assert (begun["told"], begun["canary"]["bundle_id"], begun["bundle_id"]) == (1, new_id, old_id)
            await cam.has(new_id)
            await door.has(old_id)
            assert (await call(server, "DELETE", CANARY))["told"] == 1
            await cam.has(old_id)
            await begin(server)
            await cam.has(new_id)
            promoted = await call(server, "POST", f"{CANARY}/promote")
            assert (promoted["told"], promoted["bundle_id"]) == (1, new_id)
            await door.has(new_id)
            await cam.has(new_id)
        found = await documents(server, len(cam.results) + len(door.results))
        for device, name, bundles in ((cam, "cam-1", {old_id, new_id}), (door, "door-1", {old_id, new_id})):
            failed = [each for each in device.results if isinstance(each, Failure)]
            assert failed == [], name
            assert [int(each.file) for each in device.results if isinstance(each, Answer)] == list(range(device.taken))
            own = [each for each in found if each["client"] == name]
            times = [each["captured"] for each in own]
            assert len(times) == len(set(times)), "a frame was answered twice"
            assert len(own) == device.taken
            assert {each["bundle"] for each in own} == bundles
            assert len({(each["session"], each["bundle"]) for each in own}) == len({each["session"] for each in own})
            for each in own:
                seed = (int(each["captured"][-7:-1]) - 1) % PHOTOS
                assert each["labels"][0]["index"] == right[each["bundle"]][seed]
        assert len(found) == cam.taken + door.taken


async def test_a_link_that_breaks_while_a_device_goes_over(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """It is cut before the device is told, and again and again while it goes over: no picture is lost."""
    with serving(tiny_bundle.root, candidates) as server:
        async with (
            Proxy(server.grpc) as link,
            Device.sending(link.address, tmp_path, "cam-1", connect_timeout_s=2.0) as device,
        ):
            for change in ("POST", "DELETE", "POST"):
                link.cut()
                body = {"bundle": "new", "clients": "*"} if change == "POST" else None
                await call(server, change, CANARY, body)
                for pause_s in (0.1, 0.3, 0.5):
                    link.mend()
                    await asyncio.sleep(pause_s)
                    link.cut()
                link.mend()
                await device.has(new.bundle_id if change == "POST" else tiny_bundle.bundle_id)
        assert [each for each in device.results if isinstance(each, Failure)] == []
        assert [int(each.file) for each in device.results if isinstance(each, Answer)] == list(range(device.taken))


async def test_a_device_that_cannot_use_the_candidate_goes_on_with_its_bundle(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(new.root, tmp_path / "candidates" / "new")
    file = tmp_path / "candidates" / "new" / "units" / POINT / "encoder.onnx"
    good = file.read_bytes()
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        async with (
            Proxy(server.grpc) as link,
            Device.sending(link.address, tmp_path, "cam-1", connect_timeout_s=2.0) as device,
        ):
            link.cut()
            await begin(server)
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # after the server has read it
            link.mend()
            await until(lambda: "the server's new bundle cannot be used" in caplog.text)
            await device.has(tiny_bundle.bundle_id)
            file.write_bytes(good)
            await device.has(new.bundle_id)
        assert [each for each in device.results if isinstance(each, Failure)] == []


async def test_who_gets_which_bundle(tiny_bundle: Bundle, new: Bundle, candidates: Path) -> None:
    """By the name in the request; files of both, and sessions with either."""
    old_id, new_id = tiny_bundle.bundle_id, new.bundle_id
    with serving(tiny_bundle.root, candidates, "--groups", '{"doors": ["door-*", "gate"]}') as server:
        async with stub(server.grpc) as cloud:

            async def offered(client: str) -> str:
                reply = await cloud.GetManifest(pb.GetManifestRequest(client=client))
                return str(reply.bundle_id)

            async def file_of(bundle: Bundle) -> bytes:
                path = "units/s1-r2/encoder.onnx"
                chunks = cloud.FetchFile(pb.FetchFileRequest(bundle_id=bundle.bundle_id, path=path))
                return b"".join([chunk.data async for chunk in chunks])

            assert await offered("gate") == old_id
            await begin(server, "@doors")
            assert [await offered(name) for name in ("gate", "door-7", "cam-1", "")] == [new_id, new_id, old_id, old_id]
            for bundle in (tiny_bundle, new):
                assert await file_of(bundle) == (bundle.root / "units/s1-r2/encoder.onnx").read_bytes()
                stream = await open_stream(cloud, bundle.bundle_id, client="cam-1")
                if bundle is new:  # one that others have: it is told which one is its own
                    message = await stream.read()
                    assert message.new_bundle.bundle_id == old_id
                answer = await stream.ask(Frames(bundle).frame(1, POINT))
                labels = answer.result.output.classification.labels
                assert labels[0].index == labels_of(bundle)[0]
            await call(server, "DELETE", CANARY)
            assert await offered("gate") == old_id
            assert (await open_stream(cloud, new_id, client="gate")).opened.window > 0  # it came a moment too late
            await begin(server, "*")
            assert [await offered("cam-1"), await offered("")] == [new_id, old_id]


async def test_a_pinned_device_and_one_that_opens_later(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        await begin(server)
        async with Device.sending(server.grpc, tmp_path, "cam-1") as late:
            assert late.bundle_id == new.bundle_id
        async with Device.sending(server.grpc, tmp_path, "door-1", bundle_id=tiny_bundle.bundle_id) as pinned:
            await call(server, "POST", f"{CANARY}/promote")
            await until(lambda: pinned.client._opened().link.new_bundle == new.bundle_id)
            count = len(pinned.results)
            await until(lambda: len(pinned.results) > count + 20)
            assert pinned.bundle_id == tiny_bundle.bundle_id
        assert all(isinstance(each, Answer) for each in (*late.results, *pinned.results))


async def test_frames_of_a_spool_are_decoded_by_the_bundle_that_coded_them(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """With the candidate, after it was taken back, the server was started again, and one more bundle was served."""
    address, spooled = f"127.0.0.1:{free_port()}", list[Answer | Failure]()
    earlier = ("--earlier", tmp_path / "earlier")
    values: dict[str, Any] = {
        "cache_dir": tmp_path / "cache", "spool": tmp_path / "spool", "spool_age": 1e5, "model": "tiny",
        "client": "cam-1", "threads": 1, "connect_timeout_s": 1.0, "point": POINT,
    }  # fmt: skip
    async with asyncio.timeout(120):
        with serving(tiny_bundle.root, candidates, *earlier, grpc=address) as server:
            await begin(server)
            async with EdgeClient(address, **values) as client:
                await client.infer(photo())
                assert client.bundle.bundle_id == new.bundle_id
        async with EdgeClient(address, **values, on_spooled=spooled.append) as client:
            assert client.bundle.bundle_id == new.bundle_id
            kept = [Capture(photo(k % PHOTOS), str(k)) for k in range(12)]
            assert [each async for each in client.stream(kept)] == []
            with serving(tiny_bundle.root, candidates, *earlier, grpc=address):
                await until(lambda: len(spooled) == len(kept))
                await until(lambda: client.bundle.bundle_id == tiny_bundle.bundle_id)
                live = await client.infer(photo(1))
                assert not live.spool
    right = labels_of(new)
    assert sorted(int(each.file) for each in spooled) == list(range(12))
    for each in spooled:
        assert isinstance(each, Answer)
        assert each.labels[0].index == right[int(each.file) % PHOTOS]


@pytest.mark.parametrize("name", ["cam-1", "door-1"])
async def test_a_device_with_a_spool_goes_over_and_keeps_nothing(
    tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path, name: str
) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        async with Device.sending(server.grpc, tmp_path, name, spool=tmp_path / "spool") as device:
            await begin(server)
            await device.has(new.bundle_id if name == "cam-1" else tiny_bundle.bundle_id)
            await call(server, "POST", f"{CANARY}/promote")
            await device.has(new.bundle_id)
        assert device.client.spool is not None
        await until(lambda: device.client.spool is not None and device.client.spool.kept == 0)
        assert [int(each.file) for each in device.results if isinstance(each, Answer)] == list(range(device.taken))
        found = await documents(server, device.taken)
        assert len(found) == device.taken


async def test_a_device_with_a_spool_leaves_no_session_before_the_other_one_is_open(
    tiny_bundle: Bundle, candidates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has room for one session: the device goes on with its bundle, and spools nothing."""
    with serving(tiny_bundle.root, candidates, "--max-sessions", 1) as server:
        async with Device.sending(server.grpc, tmp_path, "cam-1", spool=tmp_path / "spool") as device:
            await begin(server)
            await until(lambda: "the server's new bundle cannot be used" in caplog.text)
            assert "1 sessions are open already" in caplog.text
            await device.has(tiny_bundle.bundle_id)
        assert [int(each.file) for each in device.results if isinstance(each, Answer)] == list(range(device.taken))


# What is refused


async def test_what_cannot_be_a_canary_changes_nothing(tiny_bundle: Bundle, new: Bundle, candidates: Path) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        async with httpx.AsyncClient(base_url=server.http, headers=MARK, timeout=60) as http:
            for body, status, text in (
                ({"bundle": "nothing", "clients": "*"}, 404, "no bundle 'nothing' among the candidates"),
                ({"bundle": "empty", "clients": "*"}, 404, "no bundle 'empty'"),
                ({"bundle": "else", "clients": "*"}, 409, "is a bundle of 'else', expected 'tiny'"),
                ({"bundle": "same", "clients": "*"}, 409, "is the bundle that is served"),
                ({"bundle": "broken", "clients": "*"}, 409, "cannot be served"),
                ({"bundle": "new", "clients": "@doors"}, 400, "there is no group 'doors'"),
                (
                    {"bundle": "../new", "clients": "*"},
                    422,
                    "bundle: a bundle is the name of a folder: a-z, digits, dot",
                ),
                ({"bundle": "new"}, 422, "clients"),
                ({"bundle": "new", "clients": "*", "x": 1}, 422, "x"),
            ):
                answer = await http.post(CANARY, json=body)
                assert answer.status_code == status, body
                assert answer.headers["content-type"] == "application/problem+json"
                assert text in answer.json()["detail"], body
            for method, path in (("DELETE", CANARY), ("POST", f"{CANARY}/promote")):
                answer = await http.request(method, path)
                assert (answer.status_code, answer.json()["title"]) == (409, "CanaryRefused")
                assert "no canary of tiny runs" in answer.json()["detail"]
            assert (await http.get("/v1/models/nothing/canary")).status_code == 404
            state = (await http.get(CANARY)).json()
            assert (state["canary"], state["promoted"], state["bundle_id"]) == (None, None, tiny_bundle.bundle_id)
            listed = {each["bundle"]: each for each in (await http.get("/v1/models/tiny/candidates")).json()}
            assert listed.keys() == {"new", "same", "broken", "empty"}  # no other model's, no name that is no id
            assert (listed["new"]["bundle_id"], listed["new"]["served"]) == (new.bundle_id, False)
            assert listed["same"]["served"]
            assert listed["empty"]["problem"] == "it has no manifest.json"
        async with stub(server.grpc) as cloud:
            stream = await open_stream(cloud, tiny_bundle.bundle_id, client="cam-1")
            assert (await stream.ask(Frames(tiny_bundle).frame(1, POINT))).HasField("result")
        await begin(server)
        async with httpx.AsyncClient(base_url=server.http, headers=MARK, timeout=60) as http:
            for path in (CANARY, "/v1/models/tiny/reload"):
                second = await http.post(path, json={"bundle": "new", "clients": "*"})
                assert second.status_code == 409, path
                assert "a canary of tiny runs" in second.json()["detail"]
            metrics = (await http.get("/metrics")).text
            assert 'bitneck_canary{model="tiny"} 1.0' in metrics
            changes = (await http.get("/v1/audit")).json()
            assert [each["action"] for each in changes[:2]] == ["reload", "canary begin"]
            assert json.loads(changes[1]["after"])["clients"] == "cam-*"


async def test_a_candidate_whose_folder_is_gone_is_not_given_to_all(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    """No device could fetch it."""
    folder = tmp_path / "candidates" / "new"
    shutil.copytree(new.root, folder)
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        await begin(server)
        folder.rename(tmp_path / "away")
        async with httpx.AsyncClient(base_url=server.http, headers=MARK, timeout=60) as http:
            refused = await http.post(f"{CANARY}/promote")
            assert (refused.status_code, refused.json()["title"]) == (409, "CanaryRefused")
            make_tiny_bundle(folder, seed=7)
            refused = await http.post(f"{CANARY}/promote")
            assert f"it was {new.bundle_id}" in refused.json()["detail"]
        assert (await call(server, "GET", CANARY))["canary"]["bundle_id"] == new.bundle_id
        shutil.rmtree(folder)
        (tmp_path / "away").rename(folder)
        assert (await call(server, "POST", f"{CANARY}/promote"))["bundle_id"] == new.bundle_id


def test_without_a_folder_of_candidates_there_is_no_canary(tiny_bundle: Bundle) -> None:
    with running_server(tiny_bundle.root) as server, httpx.Client(base_url=server.http, headers=MARK) as http:
        for answer in (
            http.post(CANARY, json={"bundle": "new", "clients": "*"}),
            http.get("/v1/models/tiny/candidates"),
        ):
            assert answer.status_code == 409
            assert "--candidates" in answer.json()["detail"]
        assert http.get(CANARY).json()["canary"] is None


def test_only_operators_change_it(tiny_bundle: Bundle, candidates: Path, tmp_path: Path) -> None:
    tokens = {role: f"a-token-of-the-role-{role}" for role in ("metrics", "read", "operate")}
    file = tmp_path / "tokens.txt"
    file.write_text("".join(f"{role} someone {token}\n" for role, token in tokens.items()))
    with (
        serving(tiny_bundle.root, candidates, "--http-tokens", file) as server,
        httpx.Client(base_url=server.http) as http,
    ):
        body = {"bundle": "new", "clients": "*"}
        for role, reads, changes in ((None, 401, 401), ("metrics", 403, 403), ("read", 200, 403)):
            headers = {"Authorization": f"Bearer {tokens[role]}"} if role else {}
            assert http.get(CANARY, headers=headers).status_code == reads
            assert http.get("/v1/models/tiny/candidates", headers=headers).status_code == reads
            assert http.post(CANARY, json=body, headers=headers).status_code == changes
            assert http.post(f"{CANARY}/promote", headers=headers | MARK).status_code == changes
            assert http.delete(CANARY, headers=headers | MARK).status_code == changes
        headers = {"Authorization": f"Bearer {tokens['operate']}"}
        assert http.post(CANARY, json=body, headers=headers).json()["canary"]["by"].startswith("operate someone")
