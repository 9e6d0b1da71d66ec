"""From the engine's passes to devices: the order of committing and sending. Real engine."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError
from bitneck_cloud.answers.answered import Origin
from bitneck_cloud.answers.document import MapForm, Published
from bitneck_cloud.answers.publishing import Pass, Publishing
from bitneck_cloud.engine import engine as engine_module
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.job import Computed, Job
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.metrics import Metrics
from bitneck_testing.consumers.published import answered, everything, subscriptions
from bitneck_testing.streams import Frames


class Disk:
    """A publisher that takes its time: `go` lets one commit end."""

    def __init__(self, *, fails: bool = False, waits: bool = True) -> None:
        self.waits = waits
        self.commits: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.fails = fails

    def commit(self, answers: Sequence[Published]) -> None:
        self.threads.add(threading.get_ident())
        self.commits.append([it.number for it in answers])
        self.begun.release()
        assert self.go.acquire(timeout=60)
        if self.fails:
            raise OSError("the disk is full")


@pytest.fixture(scope="module")
def model(tiny_bundle: Bundle) -> ServedModel:
    return ServedModel(tiny_bundle, threads=1)


def job(model: ServedModel, payload: bytes, seq: int, point: str = "s1-r2") -> Job:
    origin = Origin(client="c", session="s-1", seq=seq, received_us=1)
    return Job(model, point, payload, None, origin=origin)


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_is_sent_before_its_pass_is_committed(
    model: ServedModel, frames: Frames, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, readers = Disk(fails=fails), subscriptions()
    publishing = Publishing("server", readers, Metrics(), disk)
    passes: list[int] = []
    right = publishing.answered

    def handed(passed: Pass, send: Callable[[], None]) -> None:
        right(passed, send)
        passes.append(len(passed.answers))

    monkeypatch.setattr(publishing, "answered", handed)
    engine = Engine(max_batch=4, max_queue=100, publishing=publishing)
    engine.start()
    payload = frames.payload("s1-r2", 0)
    sent: list[int] = []

    def settled(done: Job, result: Computed | BitneckError) -> None:
        assert isinstance(result, Computed)
        assert done.origin is not None
        sent.append(done.origin.seq)

    async with asyncio.timeout(60):
        for seq in range(1, 5):
            engine.submit(job(model, payload, seq), settled)
        assert await asyncio.to_thread(disk.begun.acquire)
        for seq in range(5, 11):
            engine.submit(job(model, payload, seq), settled)
        while passes != [4, 4, 2]:  # noqa: ASYNC110  the engine goes on while the disk works
            await asyncio.sleep(0.01)
        assert (sent, len(readers.hub)) == ([], 0)
        disk.go.release()
        assert await asyncio.to_thread(disk.begun.acquire)
        assert sent == disk.commits[0] == [1, 2, 3, 4]
        assert len(readers.hub) == 4
        disk.go.release()
        await publishing.close()
    assert disk.commits == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]  # passes that waited, together
    assert sent == list(range(1, 11))
    assert [it.answered.origin.seq for it in readers.hub.read(1, everything, most=99, look_at=99).answers] == sent
    assert len(disk.threads) == 1
    await engine.stop()


async def test_the_next_commit_does_not_wait_for_the_event_loop() -> None:
    disk, readers = Disk(fails=False), subscriptions()
    publishing = Publishing("server", readers, Metrics(), disk)
    sent: list[int] = []
    publishing.answered(publishing.passed([answered(1)], at_once=False), lambda: sent.append(1))
    assert await asyncio.to_thread(disk.begun.acquire)
    publishing.answered(publishing.passed([answered(2)], at_once=False), lambda: sent.append(2))
    publishing.answered(publishing.passed([answered(3)], at_once=False), lambda: sent.append(3))
    disk.go.release()
    assert disk.begun.acquire(timeout=20)  # and the loop stands still meanwhile
    assert sent == []
    disk.go.release()
    await publishing.close()
    assert (sent, disk.commits) == ([1, 2, 3], [[1], [2, 3]])


async def test_an_engine_without_work_commits_itself(model: ServedModel, frames: Frames) -> None:
    disk, readers = Disk(waits=False), subscriptions()
    publishing = Publishing("server", readers, Metrics(), disk)
    engine = Engine(max_batch=1, max_queue=100, publishing=publishing)
    engine.start()
    payload = frames.payload("s1-r2", 0)
    sent: list[int] = []
    async with asyncio.timeout(60):
        engine.submit(job(model, payload, 1), lambda *_: sent.append(1))
        assert await asyncio.to_thread(disk.begun.acquire)
        assert sent == []
        for seq in (2, 3):  # the second ends while the third waits: it is committed beside that
            engine.submit(job(model, payload, seq), lambda it, _: sent.append(it.origin.seq if it.origin else 0))
        for _ in range(3):
            disk.go.release()
        while sent != [1, 2, 3]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    assert sorted(names[ident].rpartition("_")[0] for ident in disk.threads) == ["bitneck-commit", "bitneck-engine"]
    assert [number for commit in disk.commits for number in commit] == [1, 2, 3]
    await engine.stop()
    await publishing.close()


async def test_an_engine_stops_while_a_commit_hangs(
    model: ServedModel, frames: Frames, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "_STOP_S", 0.1)
    disk = Disk(waits=False)
    publishing = Publishing("server", subscriptions(), Metrics(), disk)
    engine = Engine(max_batch=1, max_queue=100, publishing=publishing)
    engine.start()
    async with asyncio.timeout(60):
        engine.submit(job(model, frames.payload("s1-r2", 0), 1), lambda *_: None)
        assert await asyncio.to_thread(disk.begun.acquire)
        await engine.stop()
    assert "a batch is still not done" in caplog.text
    disk.go.release()


async def test_passes_keep_their_order_wherever_they_are_committed() -> None:
    """The engine's thread at its fastest, with a publisher that takes now less time than a pass, now more."""
    readers, loop, chance = subscriptions(most=10_000), asyncio.get_running_loop(), random.Random(0)
    committed: list[int] = []
    places: set[str] = set()

    class Uneven:
        waits = False

        def commit(self, answers: Sequence[Published]) -> None:
            time.sleep(chance.choice((0.0, 0.0, 0.0005)))
            committed.extend(it.number for it in answers)
            places.add(threading.current_thread().name)

    publishing, sent = Publishing("server", readers, Metrics(), Uneven()), list[int]()

    def engine() -> None:
        for seq in range(1, 2001):
            passed = publishing.passed([answered(seq)], at_once=seq % 7 > 2)
            loop.call_soon_threadsafe(publishing.answered, passed, lambda seq=seq: sent.append(seq))
            time.sleep(0.0001 if seq % 3 else 0.0)

    async with asyncio.timeout(60):
        await asyncio.to_thread(engine)
        while len(sent) < 2000:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await publishing.close()
    assert committed == sent == list(range(1, 2001))
    assert len(places) == 2
    assert len(readers.hub) == 2000


async def test_a_pass_that_cannot_be_sent_keeps_no_other_back() -> None:
    readers = subscriptions()
    publishing = Publishing("server", readers, Metrics())
    sent: list[int] = []

    def broken() -> None:
        raise RuntimeError("a bug")

    publishing.answered(publishing.passed([answered(1)], at_once=False), broken)
    publishing.answered(publishing.passed([answered(2)], at_once=False), lambda: sent.append(2))
    kept = readers.hub.read(1, everything, most=9, look_at=9).answers
    assert (sent, [each.answered.origin.seq for each in kept]) == ([2], [1, 2])
    await publishing.close()


async def test_faults_and_frames_that_nobody_waits_for_are_no_answers(model: ServedModel, frames: Frames) -> None:
    readers = subscriptions()
    publishing = Publishing("server", readers, Metrics())
    engine = Engine(max_batch=4, max_queue=100, publishing=publishing)
    engine.start()
    good = frames.payload("s1-r2", 0)
    gone, bad, whole = job(model, good, 1), job(model, b"\xff" * 5, 2), job(model, good, 3)
    done: list[int] = []
    async with asyncio.timeout(60):
        for it in (gone, bad, whole):
            engine.submit(it, lambda each, _: done.append(each.origin.seq if each.origin else 0))
        gone.abandon()
        while done != [2, 3]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    kept = readers.hub.read(1, everything, most=9, look_at=9).answers
    assert [(it.number, it.answered.origin.seq) for it in kept] == [(1, 3)]
    assert kept[0].made(MapForm.NONE) is None  # nobody reads: no document is made
    await engine.stop()
    await publishing.close()
