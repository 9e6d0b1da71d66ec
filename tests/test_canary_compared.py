"""A canary compared with the current bundle, over restarts of the server, and in the console."""

import asyncio
import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpx
import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import StateUnusable
from bitneck.runtime import ModulePool
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.canary import photographs
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.edge_half import EdgeHalf
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.sessions.registry import Registry
from bitneck_testing.consumers.browser import BROWSER, browser
from bitneck_testing.consumers.canaries import Nobody
from bitneck_testing.consumers.operator import CANARY, begin, call, serving
from bitneck_testing.devices.streaming import Device, until
from bitneck_testing.photographs import add_photos
from bitneck_testing.processes import ProcessFailed, Server, running_server
from bitneck_testing.streams import Frames, open_stream, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

POINT = "s1-r2"


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates")
    make_tiny_bundle(folder / "new", seed=1)
    return folder


@pytest.fixture(scope="module")
def new(candidates: Path) -> Bundle:
    return Bundle.open(candidates / "new")


async def compared(server: Server, path: str = CANARY) -> dict[str, Any]:
    """The comparison on photographs, once it has come to its end."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        found: dict[str, Any] = (await call(server, "GET", path))["photographs"]
        if found["state"] not in ("waiting", "running"):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("the photographs are not compared")


# Comparing


async def test_frames_are_counted_for_the_bundle_that_decodes_them(
    tiny_bundle: Bundle, new: Bundle, candidates: Path
) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        await begin(server)
        async with stub(server.grpc) as cloud:
            sizes: dict[str, list[int]] = {}
            for bundle, client, count in ((tiny_bundle, "door", 6), (new, "cam-1", 4)):
                frames = Frames(bundle)
                stream = await open_stream(cloud, bundle.bundle_id, client=client)
                for seq in range(1, count + 1):
                    frame = frames.frame(seq, ("s1-r1", POINT)[seq % 2], seed=seq)
                    assert (await stream.ask(frame)).HasField("result")
                    sizes.setdefault(bundle.bundle_id, []).append(len(frame.payload))
                bad = frames.frame(99, POINT)
                bad.crc32c ^= 1
                for _ in range(2 if bundle is new else 0):
                    assert (await stream.ask(bad)).HasField("fault")
            single = Frames(new).frame(1, POINT)
            await cloud.Infer(pb.InferRequest(bundle_id=new.bundle_id, frame=single))
            sizes[new.bundle_id].append(len(single.payload))
            found = (await call(server, "GET", CANARY))["comparison"]
        current, candidate = found["current"], found["candidate"]
        assert (current["frames"], current["faults"], current["fault_share"]) == (6, 0, 0.0)
        assert (candidate["frames"], candidate["faults"]) == (5, 2)
        assert candidate["faults_by_code"] == {"15": 2}
        assert candidate["fault_share"] == pytest.approx(2 / 7)
        low, high = candidate["fault_interval"]
        assert low < 2 / 7 < high
        for group, bundle in ((current, tiny_bundle), (candidate, new)):
            assert group["bundle_id"] == bundle.bundle_id
            assert group["payload_bytes_mean"] == pytest.approx(np.mean(sizes[bundle.bundle_id]))
            assert group["link_bytes_mean"] > group["payload_bytes_mean"]
            assert 0 < group["best_score_mean"] <= 1
            assert sum(each["share"] for each in group["labels"]) == pytest.approx(1)
            assert sum(point["frames"] for point in group["points"]) == group["frames"]
            assert {point["id"] for point in group["points"]} == {"s1-r1", POINT}
        assert found["note"].startswith("too few frames to compare: 100 of each bundle are needed, so far the current")
        async with httpx.AsyncClient(base_url=server.http) as http:
            text = (await http.get("/metrics")).text
        assert 'bitneck_canary_frames_total{bundle="candidate",model="tiny",outcome="fault"} 2.0' in text


async def test_both_bundles_answer_the_same_photographs(tiny_bundle: Bundle, new: Bundle, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(5))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no photograph")
    make_tiny_bundle(tmp_path / "candidates" / "fewer", drop_points=("s2-r1",))
    shutil.copytree(new.root, tmp_path / "candidates" / "new")
    with serving(tiny_bundle.root, tmp_path / "candidates", "--canary-photos", tmp_path / "photos") as server:
        for bundle in ("fewer", "new"):
            await begin(server, bundle=bundle)
            found = await compared(server)
            assert (found["state"], found["problem"]) == ("done", "")
            assert (found["photographs"], found["done"], found["unreadable"]) == (6, 5, 1)
            for point in found["points"]:
                assert point["current"] == point["candidate"]
                assert point["photographs"] == 5
                assert 0 <= point["candidate_agreement"] <= 1
                if bundle == "fewer":  # the same networks: equal in everything
                    assert point["agreement"] == 1
                    assert point["current_payload_bytes"] == point["candidate_payload_bytes"]
                    assert point["current_agreement"] == point["candidate_agreement"]
            assert len(found["points"]) == (2 if bundle == "fewer" else 3)
            if bundle == "new":
                assert min(point["agreement"] for point in found["points"]) < 1
            ended = await call(server, "DELETE", CANARY)
            assert ended["photographs"] == found


async def test_class_maps_of_both_bundles_are_compared(scene_bundle: Bundle, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(3))
    make_tiny_bundle(tmp_path / "candidates" / "new", seed=1, name="scene", task="segmentation")
    with serving(scene_bundle.root, tmp_path / "candidates", "--canary-photos", tmp_path / "photos") as server:
        path = "/v1/models/scene/canary"
        begun = await call(server, "POST", path, {"bundle": "new", "clients": "*"})
        assert begun["comparison"]["current"]["best_score_mean"] is None
        found = await compared(server, path)
        assert (found["state"], found["done"]) == ("done", 3)
        for point in found["points"]:
            assert 0 < point["agreement"] < 1
            assert 0 < point["current_agreement"] <= 1


async def test_photographs_that_are_not_there(tiny_bundle: Bundle, candidates: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle.root, candidates, "--canary-photos", tmp_path / "nothing") as server:
        await begin(server)
        found = await compared(server)
        assert (found["state"], found["done"]) == ("impossible", 0)
        assert "no such file or folder" in found["problem"]


async def test_a_comparison_that_is_cut_short_says_so(tiny_bundle: Bundle, candidates: Path, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(200))
    with serving(tiny_bundle.root, candidates, "--canary-photos", tmp_path / "photos") as server:
        await begin(server)
        ended = (await call(server, "DELETE", CANARY))["photographs"]
        assert (ended["state"], ended["done"] < 200) == ("ended", True)


async def test_what_a_comparison_has_loaded_is_given_back_when_nothing_holds_it(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And beside the event loop, which must not wait for it."""
    made, halves, left, over = list[str](), WeakSet[EdgeHalf](), list[int](), threading.Event()

    class Half(EdgeHalf):
        def __init__(self, served: ServedModel, threads: int = 0) -> None:
            super().__init__(served, threads)
            made.append(self.bundle_id)
            halves.add(self)

    def give_back() -> None:
        left.append(len(halves))
        over.set()

    monkeypatch.setattr(photographs, "EdgeHalf", Half)
    monkeypatch.setattr(photographs, "return_freed_memory", give_back)
    add_photos(tmp_path / "photos", range(2))
    current, candidate = (ServedModel(bundle, threads=1) for bundle in (tiny_bundle, new))
    comparison = photographs.Photographs(tmp_path / "photos", current, candidate)
    await comparison.run()
    assert await asyncio.to_thread(over.wait, 60)
    assert (comparison.state, made, left) == ("done", [tiny_bundle.bundle_id, new.bundle_id], [0])


# Over restarts


async def test_a_canary_and_a_promotion_survive_a_restart(
    own_tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """As long as the folder of --bundle holds what it held."""
    folder, old_id, new_id = own_tiny_bundle.root, own_tiny_bundle.bundle_id, new.bundle_id
    state = ("--state-db", tmp_path / "state.db")

    async def offered(server: Server, client: str) -> str:
        async with stub(server.grpc) as cloud:
            return str((await cloud.GetManifest(pb.GetManifestRequest(client=client))).bundle_id)

    with serving(folder, candidates, *state) as server:
        assert (await begin(server))["kept"]
    with serving(folder, candidates, *state) as server:
        found = await call(server, "GET", CANARY)
        assert (found["canary"]["clients"], found["canary"]["bundle_id"]) == ("cam-*", new_id)
        assert [await offered(server, name) for name in ("cam-1", "door")] == [new_id, old_id]
        promoted = await call(server, "POST", f"{CANARY}/promote")
        assert promoted["kept"]
        assert "survives a restart" in promoted["note"]
    with serving(folder, candidates, *state) as server:
        assert [each["bundle_id"] for each in server.ready["models"]] == [new_id]
        found = await call(server, "GET", CANARY)
        assert (found["bundle_id"], found["base_bundle_id"], found["canary"]) == (new_id, old_id, None)
        assert found["promoted"]["bundle"] == "new"
        assert await offered(server, "door") == new_id
    with running_server(folder, options=("--state-db", str(tmp_path / "state.db"))) as server:  # no candidates just now
        assert await offered(server, "door") == old_id
        assert "is not served" in server.read_log()
    with serving(folder, candidates, *state) as server:
        assert await offered(server, "door") == new_id
        assert (await call(server, "POST", "/v1/models/tiny/reload"))["bundle_id"] == old_id  # means the folder
    with serving(folder, candidates, *state) as server:
        assert await offered(server, "door") == old_id
        await begin(server)
    last = make_tiny_bundle(folder, seed=5)
    with serving(folder, candidates, *state) as server:
        assert [await offered(server, name) for name in ("cam-1", "door")] == [last.bundle_id] * 2
        assert "counts no more" in server.read_log()
    shutil.rmtree(folder)
    shutil.copytree(make_tiny_bundle(tmp_path / "first").root, folder)  # as at first: it is forgotten all the same
    with serving(folder, candidates, *state) as server:
        assert await offered(server, "cam-1") == old_id


async def test_sinks_are_checked_against_the_bundle_that_was_promoted(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A class that only this bundle has does not keep the server from starting, nor does an old one pass."""
    make_tiny_bundle(tmp_path / "candidates" / "new", task="segmentation")
    options = ("--state-db", tmp_path / "state.db")
    with serving(tiny_bundle.root, tmp_path / "candidates", *options) as server:
        await begin(server)
        await call(server, "POST", f"{CANARY}/promote")
    config = tmp_path / "config.toml"
    for name, known in (("sky", True), ("class 1", False)):
        config.write_text(
            f'sinks_queue = "{tmp_path}/queue.db"\n[[sinks]]\nkind = "jsonl"\nname = "file"\n'
            f'path = "{tmp_path}/a.jsonl"\nclass = "{name}"\n'
        )
        with contextlib.nullcontext() if known else pytest.raises(ProcessFailed, match="has a class 'class 1'"):
            with serving(tiny_bundle.root, tmp_path / "candidates", *options, "--config", config):
                pass


async def test_a_reload_forgets_a_promotion_that_could_not_be_served(
    own_tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path
) -> None:
    """Its folder was away; the operator has chosen the bundle of --bundle meanwhile."""
    folder, state = own_tiny_bundle.root, ("--state-db", str(tmp_path / "state.db"))
    with serving(folder, candidates, *state) as server:
        await begin(server)
        assert (await call(server, "POST", f"{CANARY}/promote"))["bundle_id"] == new.bundle_id
    with running_server(folder, options=state) as server:
        assert "is not served" in server.read_log()
        await call(server, "POST", "/v1/models/tiny/reload")
    with serving(folder, candidates, *state) as server:
        found = await call(server, "GET", CANARY)
        assert (found["bundle_id"], found["promoted"]) == (own_tiny_bundle.bundle_id, None)


async def test_without_a_state_database_the_answer_says_what_to_start_with(
    tiny_bundle: Bundle, new: Bundle, candidates: Path
) -> None:
    with serving(tiny_bundle.root, candidates) as server:
        assert not (await begin(server))["kept"]
        promoted = await call(server, "POST", f"{CANARY}/promote")
        assert not promoted["kept"]
        assert promoted["folder"] == str(new.root)
        assert f"start it with --bundle {new.root}" in promoted["note"]
        assert tiny_bundle.bundle_id in promoted["note"]


async def test_a_change_that_cannot_be_kept_is_none(tiny_bundle: Bundle, candidates: Path, tmp_path: Path) -> None:
    served = ServedModel(tiny_bundle, threads=1)
    registry = Registry(
        [served], window=1, max_sessions=1, resume_s=1, assumed_fps=1, max_bytes_per_s=0, adopt=False,
        signer=TokenSigner(b"a key of the test", max_age_s=1),
    )  # fmt: skip
    fleet = Fleet(Groups(), None, tmp_path / "state.db", 10)
    await fleet.open()
    earlier = EarlierBundles(None, most=1, most_age_s=1)
    canaries = Canaries(
        registry, Candidates(candidates), fleet, Nobody(), ModulePool(), 1, earlier, None, Changes()
    )  # fmt: skip
    assert fleet._state is not None

    async def allow(changes: bool) -> None:
        await fleet._on_disk(fleet._state._connection.execute, f"PRAGMA query_only = {'OFF' if changes else 'ON'}")

    await allow(False)
    with pytest.raises(StateUnusable, match="readonly"):
        await canaries.begin("tiny", "new", "*")
    assert registry.candidate("tiny") is None
    assert served.tally is None
    assert not canaries.running
    await allow(True)
    running, _ = await canaries.begin("tiny", "new", "*")
    await allow(False)
    for change in (canaries.promote, canaries.end):
        with pytest.raises(StateUnusable, match="readonly"):
            await change("tiny")
        assert registry.candidate("tiny") is running.candidate
        assert registry.model("tiny") is served
    await allow(True)
    await canaries.promote("tiny")
    assert registry.model("tiny") is running.candidate
    await allow(False)
    with pytest.raises(StateUnusable, match="readonly"):
        await canaries.folder_read("tiny", tiny_bundle.bundle_id)
    assert canaries.promoted("tiny") is not None
    await allow(True)
    await fleet.close()


# In the browser


@pytest.mark.skipif(None in BROWSER, reason="chromium and chromedriver are not installed (Debian: chromium-driver)")
async def test_a_canary_in_the_console(tiny_bundle: Bundle, new: Bundle, candidates: Path, tmp_path: Path) -> None:
    """Begun, compared, taken back, begun again and given to all, on the page of a phone; a reader may only look."""
    from axe_core_python.selenium import Axe

    add_photos(tmp_path / "photos", range(3))
    file, token = tmp_path / "tokens.txt", {role: f"a-token-of-the-role-{role}" for role in ("read", "operate")}
    file.write_text("".join(f"{role} someone {token[role]}\n" for role in token))
    options = ("--canary-photos", tmp_path / "photos", "--http-tokens", file)

    def drive(server: Server, moved: threading.Event) -> None:
        with browser(390, 800) as phone:

            def sign_in(role: str) -> None:
                phone.open(f"{server.http}/console/")
                phone.run("sessionStorage.clear(); location.hash = 'server'; location.reload()")
                phone.labelled("Token").send_keys(token[role])
                phone.button("Sign in").click()

            sign_in("operate")
            phone.until_text(tiny_bundle.bundle_id[7:19])
            phone.find_by("//select/option[starts-with(., 'new')]")
            phone.labelled("Clients").send_keys("cam-*")
            phone.button("Begin").click()
            phone.until_text("1 stream was told")
            assert moved.wait(60)
            phone.until_text("3 of 3 compared")
            phone.until_text("s1-r2", "section")
            phone.until_text("Faults: ", "section")
            serious = [
                each for each in Axe().run(phone.driver)["violations"] if each["impact"] in ("serious", "critical")
            ]
            assert serious == []
            wide = phone.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0
            phone.button("Take it back").click()
            phone.until_text(f"All clients get {tiny_bundle.bundle_id[7:19]} again")
            phone.labelled("Clients").send_keys("[")
            phone.labelled("Clients").clear()
            phone.labelled("Clients").send_keys("@nobody")
            phone.button("Begin").click()
            phone.until_text("there is no group 'nobody'")
            phone.labelled("Clients").clear()
            phone.labelled("Clients").send_keys("cam-1")
            phone.button("Begin").click()
            phone.button("Give it to all clients").click()
            phone.until_text(f"All clients get {new.bundle_id[7:19]} now")
            phone.until_text("--bundle")
            sign_in("read")
            phone.until_text("It was promoted")
            assert not [
                each for each in phone.driver.find_elements("xpath", "//section//button") if each.is_displayed()
            ]

    with serving(tiny_bundle.root, candidates, *options) as server:
        moved = threading.Event()
        async with Device.sending(server.grpc, tmp_path, "cam-1") as device:
            driving = asyncio.create_task(asyncio.to_thread(drive, server, moved))
            await until(lambda: device.bundle_id == new.bundle_id or driving.done())
            moved.set()
            await driving
            await device.has(new.bundle_id)
