"""A disk does not answer that answers are written to, or pictures are read from: a device goes on, and can end."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitneck import workers
from bitneck.errors import InvalidConfig, Unavailable
from bitneck_edge.answers import finishing
from bitneck_edge.answers.maps import MapWriter
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.cli import run
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources import photo as pictures_of_sources
from bitneck_edge.sources import watch
from bitneck_edge.sources.photo import Photo
from bitneck_edge.sources.watch import Watch, watched
from bitneck_testing.devices.hanging import HANG_S, Disk
from bitneck_testing.devices.streaming import until
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import Server

SOON_S = 0.5


class Written:
    """Keeps the answers that were written."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def write(self, _photo: Photo, answer: Answer) -> Answer:
        """As a program does with an answer."""
        self.files.append(answer.file)
        return answer


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    one = Disk(monkeypatch)
    yield one
    one.go_on()


async def test_answers_that_cannot_be_written_fail_and_those_after_them_are_written(
    server: Server, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not wait for the disk."""
    monkeypatch.setattr(finishing, "_MOST_S", SOON_S)
    disk.slows(Written, "write")
    written = Written()
    async with asyncio.timeout(HANG_S / 2):
        async with EdgeClient(server.grpc, model="tiny", threads=1, cache_dir=tmp_path, finish=written.write) as client:
            assert isinstance(await client.infer(photo(0)), Answer)
            disk.hang()
            found = [result async for result in client.stream(photo(k) for k in range(20))]
            assert [type(each) for each in found] == [Failure] * 20
            assert all(isinstance(each, Failure) and isinstance(each.error, Unavailable) for each in found)
            assert disk.waiting == finishing._THREADS, "no more threads wait for it"
            begin = asyncio.get_running_loop().time()
            for k in range(20):
                with pytest.raises(Unavailable, match="does the disk"):
                    await client.infer(photo(k))
            assert asyncio.get_running_loop().time() - begin < 20 * SOON_S, "while it hangs, they fail at once"
            disk.go_on()
            await until(lambda: not disk.waiting)
            before = len(written.files)
            assert isinstance(await client.infer(photo(1)), Answer)
            assert len(written.files) == before + 1
            disk.hang()
            last = asyncio.create_task(client.infer(photo(2)))
            await until(lambda: disk.waiting)
        assert disk.waiting
        await asyncio.gather(last, return_exceptions=True)


async def test_one_answer_that_hangs_holds_up_no_other(server: Server, tmp_path: Path) -> None:
    go_on, hanging = threading.Event(), threading.Event()

    def finish(_photo: Photo, answer: Answer) -> Answer:
        if not hanging.is_set():
            hanging.set()
            assert go_on.wait(HANG_S)
        return answer

    async with (
        asyncio.timeout(HANG_S / 2),
        EdgeClient(server.grpc, model="tiny", threads=1, cache_dir=tmp_path, finish=finish) as client,
    ):
        first = asyncio.create_task(client.infer(photo(0)))
        await until(hanging.is_set)
        for k in range(10):
            await client.infer(photo(k))
        assert not first.done()
        go_on.set()
        await first


async def test_a_folder_for_maps_whose_disk_does_not_answer_is_refused(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_PREPARE_S", SOON_S)
    disk.slows(Path, "mkdir")
    disk.hang()
    with pytest.raises(InvalidConfig, match="choose another folder"):
        await run._prepared(MapWriter(tmp_path / "maps"))
    disk.go_on()
    await run._prepared(MapWriter(tmp_path / "maps"))


@pytest.mark.parametrize("how", [Watch(), Watch(poll=True)])
async def test_a_watched_folder_whose_disk_does_not_answer_stops_nothing_else(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, how: Watch
) -> None:
    """The event loop goes on, and the watching can end. When the disk answers, what came meanwhile is seen."""
    monkeypatch.setattr(watch, "_LOOK_S", 1.0)
    disk.slows(watch, "list_photos")
    disk.slows(watch, "_identity_of")
    pictures = watched(tmp_path, how)
    async with asyncio.timeout(HANG_S / 2):
        following = asyncio.ensure_future(anext(pictures))
        await asyncio.sleep(0.2)
        disk.hang()
        await until(lambda: disk.waiting)
        (tmp_path / "new.png.part").write_bytes(photo_bytes(1))
        (tmp_path / "new.png.part").rename(tmp_path / "new.png")
        await asyncio.sleep(0.2)
        assert not following.done()
        disk.go_on()
        assert Path((await following).name).name == "new.png"
        following = asyncio.ensure_future(anext(pictures))
        disk.hang()
        await until(lambda: disk.waiting)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await pictures.aclose()
        assert disk.waiting


async def test_a_client_can_be_closed_though_a_photograph_is_on_a_disk_that_does_not_answer(
    server: Server, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_CLOSE_S", SOON_S)
    disk.slows(pictures_of_sources, "opened_reduced")
    (tmp_path / "one.png").write_bytes(photo_bytes(1))
    async with asyncio.timeout(HANG_S / 2):
        async with EdgeClient(server.grpc, model="tiny", threads=1, cache_dir=tmp_path / "cache") as client:
            assert isinstance(await client.infer(tmp_path / "one.png"), Answer)
            disk.hang()
            waiting = asyncio.create_task(client.infer(tmp_path / "one.png"))
            await until(lambda: disk.waiting)
        assert disk.waiting
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
