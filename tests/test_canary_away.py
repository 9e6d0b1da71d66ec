"""A canary whose bundle is away: its folder was deleted, moved, or is on a disk that is not mounted."""

import asyncio
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from bitneck.bundle import MANIFEST_NAME, Bundle
from bitneck.runtime import ModulePool
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.bundles.folder import BundleFolder
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.sessions.registry import Registry
from bitneck_edge.answers.results import Answer
from bitneck_testing.consumers.canaries import Nobody
from bitneck_testing.consumers.operator import CANARY, MARK, begin, call, serving
from bitneck_testing.devices.streaming import Device
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import edge_client, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

FILE = "units/s1-r2/encoder.onnx"


@pytest.fixture
def new(tmp_path: Path) -> Bundle:
    return make_tiny_bundle(tmp_path / "candidates" / "new", seed=1)


async def offered(server: Server, client: str = "cam-9") -> str:
    async with stub(server.grpc) as cloud:
        return str((await cloud.GetManifest(pb.GetManifestRequest(client=client))).bundle_id)


async def bundle_of_a_new_device(server: Server, folder: Path) -> str:
    async with edge_client(server.grpc, folder, client="cam-9", retries=1) as client:
        assert isinstance(await client.infer(photo(1)), Answer)
        return client.bundle.bundle_id


async def refused(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> str:
    """The sentence of a call that is refused as things are."""
    async with httpx.AsyncClient(base_url=server.http, headers=MARK, timeout=60) as http:
        answer = await http.request(method, path, json=body)
    assert (answer.status_code, answer.json()["title"]) == (409, "CanaryRefused")
    return str(answer.json()["detail"])


@pytest.mark.parametrize("what", ["folder", "file"])
async def test_a_new_device_gets_the_current_bundle_while_the_candidates_is_away(
    what: str, tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    """Devices that have the candidate keep it, also over a link that breaks."""
    gone = new.root if what == "folder" else new.root / FILE
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        await begin(server)
        async with Proxy(server.grpc) as link, Device.sending(link.address, tmp_path, "cam-1") as device:
            await device.has(new.bundle_id)
            gone.rename(tmp_path / "away")
            assert await bundle_of_a_new_device(server, tmp_path / "first") == tiny_bundle.bundle_id
            state = await call(server, "GET", CANARY)
            assert state["canary"]["bundle_id"] == new.bundle_id
            assert "cannot be read (No such file or directory)" in state["problem"]
            assert "devices that do not have its bundle get the current one" in server.read_log()
            link.cut()
            link.mend()
            count = len(device.results)
            while len(device.results) < count + 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            assert (device.bundle_id, device.client.reconnects) == (new.bundle_id, 1)
            (tmp_path / "away").rename(gone)
            assert (await call(server, "GET", CANARY))["problem"] == ""
            assert await bundle_of_a_new_device(server, tmp_path / "second") == new.bundle_id
        assert all(isinstance(each, Answer) for each in device.results)


async def test_a_device_that_has_the_manifest_already_is_told_to_get_it_again(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        await begin(server)
        assert await offered(server) == new.bundle_id
        new.root.rename(tmp_path / "away")
        async with stub(server.grpc) as cloud:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cloud.FetchFile(pb.FetchFileRequest(bundle_id=new.bundle_id, path=FILE)).read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "get the manifest again" in str(caught.value.details())
        assert await offered(server) == tiny_bundle.bundle_id
        assert "cannot be read" in await refused(server, "POST", f"{CANARY}/promote")
        assert (await call(server, "DELETE", CANARY))["bundle_id"] == tiny_bundle.bundle_id


async def test_a_kept_canary_whose_bundle_is_away_can_be_ended(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    state = ("--state-db", tmp_path / "state.db")
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        await begin(server)
    new.root.rename(tmp_path / "away")
    make_tiny_bundle(tmp_path / "candidates" / "other", seed=2)
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        found = await call(server, "GET", CANARY)
        assert (found["canary"]["bundle_id"], found["comparison"]) == (new.bundle_id, None)
        assert "no bundle 'new' among the candidates" in found["problem"]
        assert await offered(server) == tiny_bundle.bundle_id
        for method, path, body in (
            ("POST", f"{CANARY}/promote", None),
            ("POST", CANARY, {"bundle": "other", "clients": "*"}),
            ("POST", "/v1/models/tiny/reload", None),
        ):
            assert f"DELETE {CANARY}" in await refused(server, method, path, body)
        ended = await call(server, "DELETE", CANARY)
        assert (ended["bundle_id"], ended["comparison"], ended["told"]) == (tiny_bundle.bundle_id, None, 0)
        assert (await call(server, "GET", "/v1/audit"))[0]["action"] == "canary end"
        assert "no canary of tiny runs" in await refused(server, "DELETE", CANARY)
        assert (await begin(server, bundle="other"))["problem"] == ""
        await call(server, "DELETE", CANARY)
    (tmp_path / "away").rename(new.root)
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        assert (await call(server, "GET", CANARY))["canary"] is None
        assert await offered(server) == tiny_bundle.bundle_id


async def test_a_kept_canary_begins_when_its_bundle_is_back(tiny_bundle: Bundle, new: Bundle, tmp_path: Path) -> None:
    state = ("--state-db", tmp_path / "state.db")
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        await begin(server)
    new.root.rename(tmp_path / "away")
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        async with Device.sending(server.grpc, tmp_path, "cam-1") as device:
            await device.has(tiny_bundle.bundle_id)
            (tmp_path / "away").rename(new.root)
            await device.has(new.bundle_id)  # the server looks by itself
        found = await call(server, "GET", CANARY)
        assert (found["problem"], found["comparison"]["candidate"]["bundle_id"]) == ("", new.bundle_id)


async def test_a_promotion_whose_bundle_is_away_outlives_a_canary(
    own_tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    """Only a reload, or another promotion, takes its place."""
    folder, state = own_tiny_bundle.root, ("--state-db", tmp_path / "state.db")
    with serving(folder, tmp_path / "candidates", *state) as server:
        await begin(server)
        await call(server, "POST", f"{CANARY}/promote")
    make_tiny_bundle(tmp_path / "candidates" / "other", seed=2)
    new.root.rename(tmp_path / "away")
    with serving(folder, tmp_path / "candidates", *state) as server:
        assert await offered(server, "door") == own_tiny_bundle.bundle_id
        await begin(server, bundle="other")
        await call(server, "DELETE", CANARY)
    (tmp_path / "away").rename(new.root)
    with serving(folder, tmp_path / "candidates", *state) as server:
        assert await offered(server, "door") == new.bundle_id


async def test_a_server_without_candidates_lets_a_kept_canary_be_ended(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    state = ("--state-db", str(tmp_path / "state.db"))
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        await begin(server)
    with running_server(tiny_bundle.root, options=state) as server:
        assert "start it with --candidates" in (await call(server, "GET", CANARY))["problem"]
        await call(server, "DELETE", CANARY)
        assert (await call(server, "GET", CANARY))["canary"] is None


async def test_a_disk_that_does_not_answer_is_away(new: Bundle, tmp_path: Path) -> None:
    """A pipe in the place of the manifest blocks whoever reads it, as a network's disk does."""
    folder = BundleFolder(new)
    assert await folder.look() == ""
    manifest = new.root / MANIFEST_NAME
    shutil.move(manifest, tmp_path / "manifest")
    os.mkfifo(manifest)
    both = await asyncio.gather(folder.look(), folder.look())
    assert both == [f"its folder {new.root} does not answer"] * 2
    with manifest.open("wb") as pipe:  # the one thread that looks goes on
        pipe.write(new.manifest_json)
    assert await folder.look() == ""


async def test_a_server_stops_while_the_disk_of_a_candidate_does_not_answer(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path
) -> None:
    """It tells what the matter is now, and not what it was at first."""
    manifest = new.root / MANIFEST_NAME
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        await begin(server)
        manifest.unlink()
        assert "cannot be read" in (await call(server, "GET", CANARY))["problem"]
        os.mkfifo(manifest)
        assert "does not answer" in (await call(server, "GET", CANARY))["problem"]
        assert server.stop() == 0


async def test_a_server_starts_while_the_disk_of_a_candidate_does_not_answer(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canary that was kept begins when it answers."""
    registry = Registry(
        [ServedModel(tiny_bundle, threads=1)], window=1, max_sessions=1, resume_s=1, assumed_fps=1, max_bytes_per_s=0,
        adopt=False, signer=TokenSigner(b"a key of the test", max_age_s=1),
    )  # fmt: skip
    fleet, earlier = Fleet(Groups(), None, None, 10), EarlierBundles(None, most=1, most_age_s=1)
    candidates, changes, answers = Candidates(tmp_path / "candidates"), Changes(), threading.Event()
    canaries = Canaries(registry, candidates, fleet, Nobody(), ModulePool(), 1, earlier, None, changes)
    choice = BundleChoice(
        model="tiny", kind="canary", base=tiny_bundle.bundle_id, bundle="new", bundle_id=new.bundle_id, clients="*",
        since="", by="",
    )  # fmt: skip
    await fleet.choose("tiny", [choice])
    right = Candidates.version

    def version(self: Candidates, name: str) -> tuple[int, int]:
        assert answers.wait(60)
        return right(self, name)

    monkeypatch.setattr(Candidates, "version", version)
    await canaries.resume()
    assert "does not answer" in canaries.waiting["tiny"].problem
    await canaries.look("tiny")
    assert registry.candidate("tiny") is None
    answers.set()
    await canaries.look("tiny")
    assert (list(canaries.waiting), list(canaries.running)) == ([], ["tiny"])
    assert registry.offered("tiny", "cam-1").bundle.bundle_id == new.bundle_id
    await canaries.close()
    await fleet.close()
