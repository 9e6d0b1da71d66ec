"""Disks that do not answer while a bundle is changed: all other calls are answered, and a canary can be taken back."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import CanaryRefused, StateUnusable, Unavailable, UnknownCandidate
from bitneck_cloud.bundles import changes
from bitneck_cloud.canary import control, photographs
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.loading import CandidateLoader
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.reload import Reloader
from bitneck_testing.consumers.canaries import Operated
from bitneck_testing.devices.hanging import HANG_S, Disk
from bitneck_testing.devices.streaming import until
from bitneck_testing.photographs import add_photos
from bitneck_testing.tiny_bundles import make_tiny_bundle


@pytest.fixture
def new(tmp_path: Path) -> Bundle:
    return make_tiny_bundle(tmp_path / "candidates" / "new", seed=1)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """It hangs as soon as a test says so, for whoever reads a candidate."""
    monkeypatch.setattr(changes, "_LOOK_S", 0.1)
    monkeypatch.setattr(changes, "_OVER_S", 0.2)
    monkeypatch.setattr(changes, "_STUCK_S", 0.1)
    one = Disk(monkeypatch)
    one.slows(CandidateLoader, "load")
    yield one
    one.go_on()


@pytest.fixture
async def operated(own_tiny_bundle: Bundle, tmp_path: Path) -> AsyncIterator[Operated]:
    other = make_tiny_bundle(tmp_path / "other", name="other")
    one = Operated([ServedModel(each, threads=1) for each in (own_tiny_bundle, other)], tmp_path / "candidates")
    async with asyncio.timeout(HANG_S):
        yield one
    await one.close()


def choice(base: Bundle, bundle: Bundle, kind: str = "canary") -> BundleChoice:
    return BundleChoice(
        model="tiny", kind="promoted" if kind == "promoted" else "canary", base=base.bundle_id, bundle="new",
        bundle_id=bundle.bundle_id, clients="" if kind == "promoted" else "*", since="", by="",
    )  # fmt: skip


async def test_a_canary_that_waits_for_a_disk_is_seen_and_taken_back(
    operated: Operated, new: Bundle, own_tiny_bundle: Bundle, disk: Disk
) -> None:
    canaries = operated.canaries
    disk.hang()
    beginning = asyncio.create_task(canaries.begin("tiny", "new", "*"))
    await until(lambda: disk.waiting)
    await canaries.look("tiny")  # what GET does
    assert canaries.under_way("tiny").startswith("canary begin new, for ")
    with pytest.raises(CanaryRefused, match=r"no canary of other runs"):
        await canaries.end("other")
    ended = await canaries.end("tiny")
    assert (ended.compared, ended.told) == (None, 0)
    with pytest.raises(CanaryRefused, match="given up for another call"):
        await beginning
    assert canaries.under_way("tiny") == ""
    with pytest.raises(CanaryRefused, match="no canary of tiny runs"):
        await canaries.end("tiny")
    with pytest.raises(Unavailable, match="still waits for a disk"):
        await canaries.begin("tiny", "new", "*")  # no second thread waits for it
    assert disk.waiting == 1
    disk.go_on()
    await until(lambda: not disk.waiting)
    await asyncio.sleep(0.2)
    assert operated.registry.candidate("tiny") is None, "what was given up is not served"
    running, _ = await canaries.begin("tiny", "new", "*")
    assert running.candidate.bundle.bundle_id == new.bundle_id
    assert (await canaries.end("tiny")).compared is not None
    assert operated.registry.model("tiny").bundle.bundle_id == own_tiny_bundle.bundle_id


async def test_a_disk_that_does_not_answer_ends_a_beginning(
    operated: Operated, new: Bundle, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    assert new.bundle_id
    disk.slows(changes, "_answers")
    disk.hang()
    with pytest.raises(Unavailable, match=r"new does not answer; nothing is changed"):
        await operated.canaries.begin("tiny", "new", "*")
    assert "the canary new of tiny does not begin" in caplog.text
    assert operated.canaries.running == {}


async def test_a_disk_that_answers_without_giving_anything_ends_a_beginning(
    operated: Operated, new: Bundle, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and sizes may come from memory."""
    assert new.bundle_id
    monkeypatch.setattr(changes, "_MOST_S", 0.5)
    disk.hang()
    with pytest.raises(Unavailable, match="does not answer"):
        await operated.canaries.begin("tiny", "new", "*")


async def test_a_reload_that_waits_for_a_disk_holds_up_no_other_model(
    operated: Operated, tmp_path: Path, new: Bundle, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the calls for its own model are refused, with the reason."""
    assert new.bundle_id
    monkeypatch.setattr(changes, "_PATIENT_S", 0.3)
    disk.slows(Reloader, "_load")
    disk.hang()
    reloading = asyncio.create_task(operated.reloader.reload("tiny"))
    await until(lambda: disk.waiting)
    for call in (operated.canaries.begin("tiny", "new", "*"), operated.reloader.reload("tiny")):
        with pytest.raises(Unavailable, match=r"the bundle of tiny is being changed \(reload, for \d+ s\)"):
            await call
    with pytest.raises(Unavailable, match=r"being changed \(reload"):
        await operated.canaries.end("tiny")  # a reload is not given up for it
    assert disk.waiting == 1
    beginning = asyncio.create_task(operated.canaries.begin("other", "next", "*"))
    await asyncio.sleep(0)
    make_tiny_bundle(tmp_path / "candidates" / "next", name="other", seed=2)
    await until(lambda: disk.waiting == 2)
    disk.go_on()
    assert (await beginning)[0].choice.model == "other"
    assert not (await reloading).changed


async def test_a_promotion_that_waits_for_a_disk_is_given_up(
    operated: Operated, new: Bundle, own_tiny_bundle: Bundle, disk: Disk
) -> None:
    """The canary goes on until it is ended by the call that took its place."""
    disk.slows(control, "hold_files")
    running, _ = await operated.canaries.begin("tiny", "new", "*")
    disk.hang()
    promoting = asyncio.create_task(operated.canaries.promote("tiny"))
    await until(lambda: disk.waiting)
    assert (await operated.canaries.end("tiny")).compared is not None
    with pytest.raises(CanaryRefused, match="given up"):
        await promoting
    assert operated.registry.model("tiny").bundle.bundle_id == own_tiny_bundle.bundle_id != new.bundle_id
    assert running.candidate.bundle.bundle_id == new.bundle_id


async def test_a_folder_of_earlier_bundles_that_does_not_answer_ends_a_promotion(
    own_tiny_bundle: Bundle, new: Bundle, tmp_path: Path, disk: Disk
) -> None:
    assert new.bundle_id
    operated = Operated([ServedModel(own_tiny_bundle, threads=1)], tmp_path / "candidates", tmp_path / "earlier")
    await operated.canaries.begin("tiny", "new", "*")
    disk.slows(EarlierBundles, "keep")
    disk.slows(changes, "_answers")
    disk.hang()
    with pytest.raises(Unavailable, match=r"earlier does not answer"):
        await operated.canaries.promote("tiny")
    assert list(operated.canaries.running) == ["tiny"]
    disk.go_on()
    await operated.close()


@pytest.mark.parametrize("kind", ["canary", "promoted"])
async def test_a_server_starts_and_a_kept_canary_begins_when_its_disk_answers(
    kind: str, operated: Operated, new: Bundle, own_tiny_bundle: Bundle, disk: Disk
) -> None:
    """The manifest is there, and the rest of the bundle does not come."""
    canaries = operated.canaries
    disk.slows(changes, "_answers")
    await operated.fleet.choose("tiny", [choice(own_tiny_bundle, new, kind)])
    disk.hang()
    await canaries.resume()
    assert operated.registry.model("tiny").bundle.bundle_id == own_tiny_bundle.bundle_id
    assert list(canaries.waiting) == (["tiny"] if kind == "canary" else [])
    if kind == "promoted":
        return  # it counts again at the next start
    assert "does not answer" in canaries.waiting["tiny"].problem
    before = time.monotonic()
    await canaries.look("tiny")
    assert time.monotonic() - before < HANG_S / 4
    assert disk.waiting <= 2, "one thread that loads, one that looks"
    disk.go_on()
    while "tiny" not in canaries.running:
        await canaries.look("tiny")
        await asyncio.sleep(0.05)
    assert (canaries.waiting, operated.registry.offered("tiny", "cam").bundle.bundle_id) == ({}, new.bundle_id)


async def test_a_kept_canary_whose_disk_does_not_answer_is_ended(
    operated: Operated, new: Bundle, own_tiny_bundle: Bundle, disk: Disk
) -> None:
    """Also in the moment in which it is tried again."""
    canaries, manifest = operated.canaries, new.root / "manifest.json"
    data = manifest.read_bytes()
    manifest.unlink()
    await operated.fleet.choose("tiny", [choice(own_tiny_bundle, new)])
    await canaries.resume()
    assert "no bundle 'new'" in canaries.waiting["tiny"].problem
    manifest.write_bytes(data)
    disk.hang()
    await asyncio.gather(*[canaries.look("tiny") for _ in range(3)])
    assert disk.waiting == 1
    assert canaries.under_way("tiny").startswith("canary new goes on, for ")
    assert (await canaries.end("tiny")).compared is None
    assert (canaries.waiting, canaries.running, operated.fleet.choices) == ({}, {}, [])
    disk.go_on()
    await until(lambda: not disk.waiting)
    await asyncio.sleep(0.1)
    assert operated.registry.candidate("tiny") is None


async def test_candidates_that_do_not_answer_are_listed_by_one_thread(
    operated: Operated, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.slows(control.Candidates, "all")
    monkeypatch.setattr(control, "_LIST_S", 0.2)
    one = Operated(list(operated.registry.models.values()), Path("nowhere"))
    disk.hang()
    for _ in range(3):
        with pytest.raises(Unavailable, match="the folder of candidates does not answer"):
            await one.canaries.listed()
    assert disk.waiting == 1
    disk.go_on()
    await until(lambda: not disk.waiting)
    with pytest.raises(CanaryRefused, match="cannot be read"):
        await one.canaries.listed()
    await one.close()


async def test_the_folder_of_a_candidate_is_looked_up_once(
    operated: Operated, new: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there is no failed beginning."""
    assert new.bundle_id
    asked, right = list[str](), Candidates.folder_of

    def folder_of(self: Candidates, name: str) -> Path:
        asked.append(name)
        return right(self, name)

    monkeypatch.setattr(Candidates, "folder_of", folder_of)
    await operated.canaries.begin("tiny", "new", "*")
    assert asked == ["new"]
    with pytest.raises(UnknownCandidate):
        await operated.canaries.begin("other", "nothing", "*")


async def test_earlier_bundles_on_a_disk_that_does_not_answer(
    own_tiny_bundle: Bundle, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's spool is told to try again, and a server's start says what the matter is."""
    from bitneck_cloud import earlier as module

    monkeypatch.setattr(module, "_FIRST_S", 0.2)
    monkeypatch.setattr(module, "_MOST_S", 0.5)
    operated = Operated([ServedModel(own_tiny_bundle, threads=1)], tmp_path / "candidates")
    old = make_tiny_bundle(tmp_path / "old", seed=2)
    kept = EarlierBundles(tmp_path / "earlier", most=2, most_age_s=1e9)
    await kept.keep_first(old)
    await kept.keep_first(own_tiny_bundle)
    disk.slows(EarlierBundles, "_load")
    disk.slows(EarlierBundles, "keep")
    disk.hang()
    pool, loads = operated.reloader._pool, []
    for _ in range(3):
        loads.append(kept.generation(operated.registry, "tiny", old.bundle_id, pool, 1))
    found = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(each) for each in found] == [Unavailable] * 3
    assert disk.waiting == 1
    with pytest.raises(StateUnusable, match="has not answered for 0 s"):
        await kept.keep_first(own_tiny_bundle)
    disk.go_on()
    await until(lambda: not disk.waiting)
    monkeypatch.setattr(module, "_MOST_S", HANG_S)
    served = await kept.generation(operated.registry, "tiny", old.bundle_id, pool, 1)
    assert served.bundle.bundle_id == old.bundle_id
    await operated.close()


async def test_photographs_whose_disk_does_not_answer_are_not_compared(
    tiny_bundle: Bundle, new: Bundle, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canary goes on without them. A server that ends beside them leaves the thread behind."""
    left: list[str] = []
    monkeypatch.setattr(photographs, "_MOST_S", 0.3)
    monkeypatch.setattr(photographs, "_CLOSE_S", 0.3)
    monkeypatch.setattr(photographs, "abandon", left.append)
    disk.slows(photographs, "opened_reduced")
    add_photos(tmp_path / "photos", range(2))
    compared = photographs.Photographs(
        tmp_path / "photos", *(ServedModel(bundle, threads=1) for bundle in (tiny_bundle, new))
    )
    disk.hang()
    async with asyncio.timeout(HANG_S / 2):
        await compared.run()
    assert (compared.state, compared.done) == ("impossible", 0)
    assert "has not answered" in compared.problem
    assert disk.waiting == 1
    assert left == ["comparing bundles on photographs"]


async def test_a_server_waits_for_the_comparison_of_a_canary_that_has_just_ended(
    own_tiny_bundle: Bundle, new: Bundle, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be inside of ONNX Runtime, and the interpreter must not end beside that."""
    assert new.bundle_id
    left: list[str] = []
    monkeypatch.setattr(photographs, "abandon", left.append)
    disk.slows(photographs, "opened_reduced")
    add_photos(tmp_path / "photos", range(2))
    one = Operated([ServedModel(own_tiny_bundle, threads=1)], tmp_path / "candidates", photos=tmp_path / "photos")
    async with asyncio.timeout(HANG_S / 2):
        await one.canaries.begin("tiny", "new", "*")
        disk.hang()
        await until(lambda: disk.waiting)
        await one.canaries.end("tiny")
        closing = asyncio.create_task(one.close())
        await asyncio.sleep(0.2)
        assert not closing.done()
        disk.go_on()
        await closing
    assert not disk.waiting
    assert left == []
