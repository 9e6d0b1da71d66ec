"""Answers before anyone reads them: the order of committing and sending, the buffer, the filters. Real engine."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.coding.class_map import encode_map
from bitneck.errors import BitneckError, InvalidConfig, UnknownModel
from bitneck.wire.messages import Classification, ClassShare, CodedMap, Label
from bitneck_cloud.answers.answered import Answered, Origin
from bitneck_cloud.answers.document import MapForm, Published
from bitneck_cloud.answers.filters import AnswerFilter, Wanted
from bitneck_cloud.answers.hub import Hub
from bitneck_cloud.answers.publishing import Pass, Publishing
from bitneck_cloud.answers.subscriptions import Subscription, Subscriptions
from bitneck_cloud.engine import engine as engine_module
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.job import Computed, Job
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.patterns import Groups, Pattern
from bitneck_cloud.observe.metrics import Metrics
from bitneck_testing.streams import Frames

EPOCH = "0123abcd"
GROUPS = Groups({"letters": ("[a-z]",), "digits": ("[0-9]",)})
LABELS = {"tiny": ("cat", "dog", "7"), "scene": ("sky", "road")}


def answered(seq: int = 1, *, client: str = "c", model: str = "tiny", map_bytes: int = 0) -> Answered:
    output: Any = Classification((Label(1, "dog", 0.75), Label(0, "cat", 0.25)))
    if map_bytes:
        output = CodedMap(height=4, width=4, map=bytes(map_bytes), classes=(ClassShare(1, "road", 1.0),))
    origin = Origin(client=client, session="s-1", seq=seq, received_us=1_700_000_000_000_000)
    return Answered(origin=origin, model=model, bundle="sha256:0", point="p", output=output, queued_us=1, decode_us=2,
                    compute_us=3)  # fmt: skip


def published(number: int, **values: Any) -> Published:
    return Published(number, "server", answered(number, **values))


def subscriptions(most: int = 100, most_bytes: int = 1 << 30) -> Subscriptions:
    hub = Hub(EPOCH, most=most, most_bytes=most_bytes)
    return Subscriptions(hub, most=10, metrics=Metrics(), heartbeat_s=60.0, stall_s=0.0, groups=GROUPS)


def everything(_: Published) -> bool:
    return True


# The seam


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


# The buffer


@given(
    st.lists(st.one_of(st.integers(0, 5000), st.tuples(st.integers(0, 3), st.integers(1, 9))), max_size=60),
    st.integers(1, 8),
    st.integers(2000, 30_000),
)
def test_readers_get_everything_or_are_told(steps: list[int | tuple[int, int]], most: int, most_bytes: int) -> None:
    """An int keeps an answer with a map of so many bytes; a pair lets a reader take some."""
    hub = Hub(EPOCH, most=most, most_bytes=most_bytes)
    positions, seen, missed = [1] * 4, [0] * 4, [0] * 4
    for step in steps:
        if isinstance(step, int):
            hub.keep([published(hub.end, map_bytes=step)])
            continue
        who, count = step
        reading = hub.read(positions[who], everything, most=count, look_at=99)
        if reading.missed is not None:
            assert reading.missed.before == positions[who] + (reading.missed.count or 0)
            missed[who] += reading.missed.count or 0
        for it in reading.answers:
            it.text(MapForm.RUNS)
            hub.count(it)
        seen[who] += len(reading.answers)
        positions[who] = reading.position
        assert len(hub) <= most
        assert hub.bytes <= most_bytes or len(hub) == 1
    for who, position in enumerate(positions):
        assert seen[who] + missed[who] == position - 1


def test_documents_count_as_bytes() -> None:
    hub = Hub(EPOCH, most=10, most_bytes=9000)
    hub.keep([published(k, map_bytes=1000) for k in (1, 2, 3)])
    assert (len(hub), hub.bytes) == (3, 7500)
    newest = hub.read(3, everything, most=1, look_at=1).answers[0]
    newest.text(MapForm.RUNS)  # more than 1333 bytes of base64
    hub.count(newest)
    assert len(hub) == 2
    assert hub.bytes == sum(it.size for it in hub.read(2, everything, most=9, look_at=9).answers)


@pytest.mark.parametrize("after", ["x", "5", "0123abcd", "0123abcd-", "0123ABCD-1", "0123abcd-1\n", "-1", "0" * 30])
def test_only_ids_are_taken(after: str) -> None:
    with pytest.raises(InvalidConfig, match="no id of an answer"):
        Hub(EPOCH, most=1, most_bytes=1).begin(after)


async def test_those_who_want_the_same_are_told_the_same() -> None:
    """One text is made for all of them, however many there are."""
    own = subscriptions()

    def opened(form: MapForm = MapForm.NONE, after: str = "", **wanted: Any) -> Subscription:
        return own.open(Wanted(**wanted), LABELS, form=form, after=after, holder=None)

    first, second, behind, of_cats, with_maps = (
        opened(), opened(), opened(), opened(classes=("cat",)), opened(MapForm.RUNS)
    )  # fmt: skip
    own.keep([published(1), published(2)])
    told = await first.next(30.0)
    assert await second.next(30.0) is told
    for other in (of_cats, with_maps):
        assert (await other.next(30.0)).answers == told.answers
        assert first.sent == second.sent == other.sent == 2
    own.keep([published(3)])
    newer = await first.next(30.0)
    assert await second.next(30.0) is newer
    assert (await behind.next(30.0)).answers == (*told.answers, *newer.answers)
    late = opened(after=f"{EPOCH}-2")
    assert (await late.next(30.0)).answers == newer.answers
    assert late.sent == 1


async def test_a_subscriber_looks_at_many_answers_without_keeping_the_loop() -> None:
    readers = subscriptions(most=10_000)
    readers.keep([published(k, client="other") for k in range(1, 5001)])
    wanted = Wanted(client=("me",))
    it = readers.open(wanted, LABELS, form=MapForm.NONE, after="0", holder=None, who="test")
    readers.keep([published(5001, client="me")])
    async with asyncio.timeout(30):
        news = await it.next(30.0)
    assert [json.loads(text)["number"] for _, text in news.answers] == [5001]
    assert news.upto == f"{EPOCH}-5001"
    readers.close(it)
    assert len(readers) == 0


# Filters


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Wanted(classes=("dog",), min_score=0.75), True),
        (Wanted(classes=("1",)), True),
        (Wanted(classes=("cat",), min_score=0.26), False),
        (Wanted(classes=("[7]",)), False),  # the name of a class that was not found
        (Wanted(classes=("cat", "[7]"), min_score=0.2), True),
        (Wanted(classes=("d?g", "c*"), min_score=0.75), True),
        (Wanted(classes=("2",)), False),
        (Wanted(min_score=0.76), False),
        (Wanted(client=("c",)), True),
        (Wanted(client=("C",)), False),
        (Wanted(client=("[abc]", "x*")), True),
        (Wanted(client=("@letters",)), True),
        (Wanted(client=("@digits", "x*")), False),
        (Wanted(session=("s-2",)), False),
        (Wanted(model=("scene",)), False),
        (Wanted(model=("scene", "t*")), True),
    ],
)
def test_a_filter_fits(wanted: Wanted, fits: bool) -> None:
    """Of what a subscriber gets, and of the document that sinks look at."""
    chosen = AnswerFilter(wanted, GROUPS)
    chosen.check_served(LABELS)
    assert chosen(published(1)) is fits
    found = [(1, "dog", 0.75), (0, "cat", 0.25)]
    assert chosen.takes("c", "tiny", "s-1", found) is fits


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(classes=("raod",)), "nearest names are 'road'"),
        (Wanted(classes=("raod",), model=("t*",)), "indices are 0 to 2"),
        (Wanted(classes=("2",), model=("scene",)), "indices are 0 to 1"),
        (Wanted(classes=("[7",)), r"nearest names are '\[7\]'"),
        (Wanted(model=("none*",)), "no model 'none\\*' is served; there are: tiny, scene"),
    ],
)
def test_a_filter_names_what_it_does_not_know(wanted: Wanted, message: str) -> None:
    with pytest.raises((InvalidConfig, UnknownModel), match=message):
        AnswerFilter(wanted, GROUPS).check_served(LABELS)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(client=("@nobody",)), "no group 'nobody' in the settings; there are: letters, digits"),
        (Wanted(client=("",)), "a pattern has 1 to 128 characters, got 0"),
        (Wanted(model=("a\n",)), "control characters"),
        (Wanted(classes=("x",) * 65), "65 values of class, at most 64"),
        (Wanted(session=("x" * 257,)), "at most 256 characters"),
        (Wanted(min_score=1.1), "give 0 to 1"),
    ],
)
def test_what_is_no_filter_is_refused(wanted: Wanted, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        AnswerFilter(wanted, GROUPS)


def test_a_pattern_that_means_harm_is_matched_in_no_time() -> None:
    hard = AnswerFilter(Wanted(client=("*a" * 64,)), GROUPS)
    assert not hard(published(1, client="a" * 127 + "b"))


def test_what_one_look_costs_is_bounded() -> None:
    """Repeats are no patterns of their own, names are looked up, and all groups together have a bound."""
    names = {f"g{k}": tuple(f"cam-{k}-{i}" for i in range(1024)) for k in range(64)}
    wild = {f"w{k}": tuple(f"cam-{k}-{i}-*" for i in range(1024)) for k in range(3)}
    groups = Groups(names | wild)
    chosen = AnswerFilter(Wanted(client=("@w0",) * 64), groups)
    looked: list[str] = []
    match = Pattern.matches

    def counted(pattern: Pattern, name: str) -> bool:
        looked.append(name)
        return match(pattern, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pattern, "matches", counted)
        assert not chosen.takes_client("cam-1-1-1", "tiny")
        assert len(looked) == 1024
        every = AnswerFilter(Wanted(client=tuple(f"@{name}" for name in names)), groups)
        assert every.takes_client("cam-63-1023", "tiny")
        assert not every.takes_client("cam-63-1024", "tiny")
        assert len(looked) == 1024
    assert AnswerFilter(Wanted(client=("@w0", "@w1")), groups).takes_client("cam-1-1-1", "tiny")
    with pytest.raises(InvalidConfig, match="3072 patterns of clients, those of groups included; at most 2048"):
        AnswerFilter(Wanted(client=("@w0", "@w1", "@w2")), groups)


def test_a_picture_of_a_map_is_made_once() -> None:
    import numpy as np

    coded = encode_map(np.arange(16, dtype=np.uint8).reshape(4, 4))
    output = CodedMap(height=4, width=4, map=coded, classes=())
    it = Published(1, "server", answered(map_bytes=1))
    object.__setattr__(it.answered, "output", output)
    assert it.takes_long(MapForm.PNG)
    assert it.made(MapForm.PNG) is None
    text = it.text(MapForm.PNG)
    assert it.made(MapForm.PNG) is text
    assert it.text(MapForm.PNG) is text
