"""A disk does not answer that answers are written to, or pictures are read from: a device goes on, and can end."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitneck import workers
from bitneck.errors import ImageError, InvalidConfig, Unavailable
from bitneck_edge.answers import finishing
from bitneck_edge.answers.finishing import Finishing
from bitneck_edge.answers.maps import MapWriter
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.cli import run
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources import photo as pictures_of_sources
from bitneck_edge.sources import watch
from bitneck_edge.sources.arrivals import Stamp
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.photo import Photo
from bitneck_edge.sources.watch import Watch, watched
from bitneck_testing.devices.answers import answer_to
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


async def test_answers_that_cannot_be_written_fail_and_those_after_them_are_written(
    server: Server, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
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


class Hands:
    """What a program does with answers: it waits with those whose files are named, and takes a while with others.

    Attributes:
        go_on: set, by file, to wait no longer.
        begun: files, as they were taken.
    """

    def __init__(self, *held: str, takes_s: float = 0.0) -> None:
        self._takes_s = takes_s
        self.go_on = {file: threading.Event() for file in held}
        self.begun: list[str] = []

    def finish(self, _photo: Photo, answer: Answer) -> Answer:
        """As a program does."""
        self.begun.append(answer.file)
        if answer.file in self.go_on:
            assert self.go_on[answer.file].wait(HANG_S)
        threading.Event().wait(self._takes_s)
        return answer


@pytest.fixture
def threads() -> Callable[[], int]:
    """Threads of `Finishing` that are not those of a test before, which may still be about to end."""

    def those() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name == "bitneck-finish"}

    before = those()
    return lambda: len(those() - before)


async def test_one_answer_that_hangs_holds_up_no_other() -> None:
    hands = Hands("0")
    finishing_ = Finishing(hands.finish)
    async with asyncio.timeout(HANG_S / 2):
        tasks = [asyncio.create_task(finishing_(photo(k), answer_to(str(k)))) for k in range(12)]
        assert [each.file for each in await asyncio.gather(*tasks[1:])] == [str(k) for k in range(1, 12)]
        assert not tasks[0].done()
        tasks[0].cancel()  # as a program with a time limit does; its thread is still there
        await asyncio.gather(tasks[0], return_exceptions=True)
        for k in range(20, 26):
            await finishing_(photo(k), answer_to(str(k)))
        hands.go_on["0"].set()
        await finishing_.close()


async def test_an_answer_waits_as_long_as_others_get_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own time counts, not that behind others."""
    monkeypatch.setattr(finishing, "_MOST_S", 0.8)
    finishing_ = Finishing(Hands(takes_s=0.2).finish)
    found = await asyncio.gather(*(finishing_(photo(0), answer_to(str(k))) for k in range(40)))
    assert len(found) == 40
    await finishing_.close()


@pytest.mark.parametrize(("error", "seen"), [(TimeoutError, TimeoutError), (StopIteration, RuntimeError)])
async def test_what_a_program_raises_comes_through(error: type[Exception], seen: type[Exception]) -> None:
    def finish(_photo: Photo, _answer: Answer) -> Answer:
        raise error

    finishing_ = Finishing(finish)
    with pytest.raises(seen):
        await finishing_(photo(0), answer_to("0"))
    await finishing_.close()


async def test_closing_fails_what_waits_and_lets_end_what_has_begun(
    threads: Callable[[], int],
) -> None:
    """Within a bound, and no thread is left but those that hang."""
    hands = Hands("0", "1", "2", "3")
    finishing_ = Finishing(hands.finish)
    tasks = [asyncio.create_task(finishing_(photo(k), answer_to(str(k)))) for k in range(8)]
    await until(lambda: len(hands.begun) == finishing._THREADS)
    async with asyncio.timeout(HANG_S / 2):
        closing = asyncio.create_task(finishing_.close())
        await asyncio.gather(*tasks[4:], return_exceptions=True)
        for k in range(1, 4):
            hands.go_on[str(k)].set()
        await asyncio.gather(*tasks[1:4])
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(each, Answer) for each in found] == [False, True, True, True, False, False, False, False]
    assert all(isinstance(each, Answer | Unavailable) for each in found)
    with pytest.raises(Unavailable, match="closed"):
        await finishing_(photo(0), answer_to("x"))
    await until(lambda: threads() == 1)
    for _ in range(3):  # as a client that is opened again and again
        finishing_.open()
        await asyncio.gather(*(finishing_(photo(k), answer_to(str(k))) for k in range(1, 9)))
        await until(lambda: threads() <= finishing._THREADS)  # those of before may still be about to end
        await finishing_.close()
    hands.go_on["0"].set()
    await until(lambda: not threads())


async def test_closing_that_is_cancelled_fails_what_has_begun() -> None:
    hands = Hands("0")
    finishing_ = Finishing(hands.finish)
    task = asyncio.create_task(finishing_(photo(0), answer_to("0")))
    await until(lambda: hands.begun)
    closing = asyncio.create_task(finishing_.close())
    await asyncio.sleep(0.1)
    closing.cancel()
    async with asyncio.timeout(HANG_S / 6):
        with pytest.raises(Unavailable, match="closed"):
            await task
    hands.go_on["0"].set()


async def test_a_thread_that_cannot_be_had_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    finishing_ = Finishing(Hands().finish)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(Unavailable, match="can't start new thread"):
            await finishing_(photo(0), answer_to("0"))
    async with asyncio.timeout(HANG_S / 6):
        await finishing_(photo(0), answer_to("0"))
    await finishing_.close()


async def test_a_client_is_closed_beside_an_answer_that_hangs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "_CLOSE_S", SOON_S)
    hands = Hands("held")
    async with asyncio.timeout(HANG_S / 3):
        async with EdgeClient(server.grpc, model="tiny", threads=1, cache_dir=tmp_path, finish=hands.finish) as client:
            task = asyncio.create_task(client.infer(Capture(photo(0), "held")))
            await until(lambda: hands.begun)
        with pytest.raises(Unavailable, match="closed"):
            await task
    hands.go_on["held"].set()


async def test_an_answer_that_is_finished_while_a_client_closes_leaves_the_spool(
    server: Server, tmp_path: Path
) -> None:
    """Else the next one would send its frame again."""
    again: list[Answer | Failure] = []
    hands = Hands(takes_s=1.2)  # longer than a frame stays in memory alone
    values: dict[str, Any] = {
        "model": "tiny",
        "threads": 1,
        "cache_dir": tmp_path / "cache",
        "spool": tmp_path / "spool",
    }
    async with asyncio.timeout(HANG_S / 2):
        async with EdgeClient(server.grpc, finish=hands.finish, **values) as client:
            task = asyncio.create_task(client.infer(photo(0)))
            await until(lambda: hands.begun)
            await asyncio.sleep(0.8)
        assert isinstance(await task, Answer)
        async with EdgeClient(server.grpc, on_spooled=again.append, **values) as client:
            assert isinstance(await client.infer(photo(1)), Answer)
            await asyncio.sleep(1.0)
    assert again == []


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


ENDS = """
import asyncio, sys, threading, time
from pathlib import Path
import bitneck_edge.sources.watch as watch
import watchdog.observers.inotify_c as inotify
hangs, entered = threading.Event(), threading.Event()
def slow(right):
    def call(*arguments, **named):
        if hangs.is_set():
            entered.set()
            time.sleep(3600)
        return right(*arguments, **named)
    return call
class Slow:
    def __getattr__(self, name):
        return slow(getattr(watch.os, name)) if name == "walk" else getattr(watch.os, name)
if sys.argv[2] == "watchdog":
    inotify.os = Slow()
else:
    watch.list_photos = slow(watch.list_photos)
    watch._LOOK_S = 0.2
async def main():
    folder = Path(sys.argv[1])
    async with watch.watching(folder, watch.Watch(poll=sys.argv[2] == "poll")) as pictures:
        following = asyncio.ensure_future(anext(pictures))
        await asyncio.sleep(0.5)
        hangs.set()
        (folder / "new").mkdir()
        while not entered.is_set():
            await asyncio.sleep(0.02)
        following.cancel()
asyncio.run(main())
"""


@pytest.mark.parametrize("who", ["watchdog", "look", "poll"])
def test_a_program_ends_beside_a_watched_folder_whose_disk_does_not_answer(tmp_path: Path, who: str) -> None:
    """Also if it is watchdog that waits for the disk, with its lock."""
    command = [sys.executable, "-c", ENDS, str(tmp_path), who]
    subprocess.run(command, check=True, timeout=HANG_S / 2)


async def test_a_watched_folder_that_is_large_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BEGIN_S", SOON_S)
    right, pause = watch._stamp_of, threading.Event()

    def slow(path: Path) -> Stamp | None:
        pause.wait(SOON_S / 5)
        return right(path)

    monkeypatch.setattr(watch, "_stamp_of", slow)
    for k in range(10):
        (tmp_path / f"{k}.png").write_bytes(photo_bytes(1))
    pictures = watched(tmp_path, Watch(existing=True))
    async with asyncio.timeout(HANG_S / 2):
        assert Path((await anext(pictures)).name).name == "0.png"
    await pictures.aclose()


async def test_a_watched_folder_whose_disk_does_not_answer_at_the_start_is_refused(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_BEGIN_S", SOON_S)
    monkeypatch.setattr(watch, "_CLOSE_S", SOON_S)
    disk.slows(watch, "list_photos")
    disk.hang()
    async with asyncio.timeout(HANG_S / 2):
        with pytest.raises(ImageError, match="has not answered"):
            await anext(watched(tmp_path, Watch()))


LOADS = """
import asyncio, sys, time
from bitneck import workers
from bitneck.bundle import Bundle
from bitneck_edge.client import EdgeClient
workers._CLOSE_S = 1.0
Bundle.labels = lambda self: time.sleep(3600)
async def main():
    try:
        async with asyncio.timeout(2):
            async with EdgeClient(sys.argv[1], model="tiny", threads=1, cache_dir=sys.argv[2]):
                pass
    except TimeoutError:
        print("given up")
asyncio.run(main())
"""


def test_a_program_ends_beside_a_cache_whose_disk_does_not_answer(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS, server.grpc, str(tmp_path)]
    ended = subprocess.run(command, check=True, timeout=HANG_S / 2, capture_output=True, text=True)
    assert ended.stdout == "given up\n"
