"""The engine: what it batches, how long a batch takes, and what fails, without sockets."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import (
    BitneckError,
    DeadlineExceeded,
    MalformedFrame,
    ModelFailure,
    Overloaded,
    Unavailable,
)
from bitneck.wire.messages import Classification
from bitneck_cloud.engine.batch_time import BatchTime
from bitneck_cloud.engine.engine import Engine
from bitneck_cloud.engine.job import Computed, Job, JobState
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_testing.streams import Frames


class Slow:
    """A model that waits before it answers: real code around it, to fill the engine's queue."""

    def __init__(self, model: ServedModel, seconds: float = 0.05) -> None:
        self.model = model
        self.name = model.name
        self.max_frames = model.max_frames
        self.seconds = seconds
        self.batches: list[int] = []
        self.decoded_by: list[str] = []

    def decode(self, point: str, payload: bytes) -> Any:
        self.decoded_by.append(threading.current_thread().name)
        return self.model.decode(point, payload)

    def compute(self, points: Any, latents: Any, map_steps: Any) -> Any:
        time.sleep(self.seconds)
        self.batches.append(len(points))
        return self.model.compute(points, latents, map_steps)


@pytest.fixture
def slow(tiny_bundle: Bundle) -> Slow:
    return Slow(ServedModel(tiny_bundle, threads=1))


async def test_the_engine_batches_what_waits_and_drops_what_is_late_or_gone(slow: Slow, tiny_bundle: Bundle) -> None:
    payload = Frames(tiny_bundle).payload("s1-r2", 1)
    engine = Engine(max_batch=4, max_queue=8)
    engine.start()

    def submit(deadline: float | None = None) -> tuple[Job, Coroutine[Any, Any, Computed]]:
        job = Job(slow, "s1-r2", payload, deadline)  # type: ignore[arg-type]
        return job, engine.compute(job)

    try:
        job, first = submit()
        await asyncio.sleep(0.01)  # the engine takes it: a lone frame never waits
        assert job.state is JobState.TAKEN
        (_, late), (gone, never) = submit(time.monotonic() - 1), submit()
        assert gone.abandon()
        never.close()
        rest = [submit()[1] for _ in range(6)]
        with pytest.raises(Overloaded, match="wait already"):
            submit()
        await asyncio.gather(first, *rest)
        assert job.state is JobState.SETTLED
        with pytest.raises(DeadlineExceeded, match="beyond its deadline"):
            await late
        assert slow.batches == [1, 4, 2]
        assert engine.dropped == 1
        waiting = [submit()[1] for _ in range(6)]
    finally:
        await engine.stop()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert any(isinstance(o, Unavailable) for o in outcomes)


async def test_a_model_of_large_tensors_gets_smaller_batches(slow: Slow, tiny_bundle: Bundle) -> None:
    payload = Frames(tiny_bundle).payload("s1-r2", 1)
    slow.max_frames = 2
    engine = Engine(max_batch=4, max_queue=8)
    engine.start()
    try:
        jobs = [Job(slow, "s1-r2", payload, None) for _ in range(5)]  # type: ignore[arg-type]
        outcomes = await asyncio.gather(*[engine.compute(job) for job in jobs])
    finally:
        await engine.stop()
    assert slow.batches == [2, 2, 1]
    assert [outcome.batch for outcome in outcomes] == [2, 2, 2, 2, 1]


async def test_a_batch_that_will_take_long_gets_no_more_frames(slow: Slow, tiny_bundle: Bundle) -> None:
    payload = Frames(tiny_bundle).payload("s1-r2", 1)
    slow.seconds = 0.5
    engine = Engine(max_batch=8, max_queue=8, max_batch_s=0.95)
    engine.start()

    def submit() -> Coroutine[Any, Any, Computed]:
        return engine.compute(Job(slow, "s1-r2", payload, None))  # type: ignore[arg-type]

    try:
        await submit()
        await asyncio.gather(*[submit() for _ in range(8)])
    finally:
        await engine.stop()
    assert slow.batches[:2] == [1, 2]  # 0.5 s each, as far as anyone knows then; a busy machine may make that 0.9
    assert max(slow.batches) <= 4


def test_the_time_of_a_batch_is_learned_by_operating_point() -> None:
    times = BatchTime()
    assert times.of("s1") == 0.0
    times.learn(["s1"], 0.002)
    assert times.of("s1") == times.of("s4") == 0.002
    for _ in range(30):
        times.learn(["s4"] * 3, 0.06)
        times.learn(["s1"] * 10, 0.02)
    assert times.of("s4") == pytest.approx(0.02, rel=0.02)
    assert times.of("s1") == pytest.approx(0.002, rel=0.02)
    assert times.of("new") == times.of("s4")
    times.learn(["s1", "s4"], 10.0)  # held up by something else
    assert times.of("s1") < 0.003
    times.learn(["s1"], 0.0)
    assert times.of("s1") > 0


def test_a_frame_that_is_not_computed_says_nothing_of_the_tail() -> None:
    times = BatchTime()
    times.learn(["s1"], 0.02)
    for _ in range(30):
        times.learn_failed("s1", 0.001)
        times.learn_failed("new", 0.001)
    assert times.of("s1") == times.of("new") == 0.02
    for _ in range(30):
        times.learn_failed("s1", 0.05)  # what fails takes longer than what is known of the others
    assert times.of("s1") == pytest.approx(0.05, rel=0.02)
    assert times.of("new") == 0.02
    times.learn_failed("new", 5.0)  # one that was held up
    for _ in range(30):
        times.learn(["s1"], 0.02)
        times.learn(["new"], 0.02)
    assert times.of("s1") == times.of("new") == pytest.approx(0.02)


class Failing(Slow):
    """A model that fails, in decoding or in the tail, and takes its time for it."""

    def __init__(self, model: ServedModel, seconds: float, where: str) -> None:
        super().__init__(model, 0.0)
        self.fails_after_s, self.where = seconds, where

    def decode(self, point: str, payload: bytes) -> Any:
        if self.where == "decode" and payload == b"bad":
            time.sleep(self.fails_after_s)
            raise MalformedFrame("this one")
        return super().decode(point, payload)

    def compute(self, points: Any, latents: Any, map_steps: Any) -> Any:
        if self.where == "tail":
            time.sleep(self.fails_after_s * len(points))
            return [ModelFailure("these")] * len(points)
        return super().compute(points, latents, map_steps)


@pytest.mark.parametrize("where", ["decode", "tail"])
async def test_batches_of_frames_that_fail_are_short_too(where: str, tiny_bundle: Bundle) -> None:
    """Others wait for them as long as for a batch that succeeds."""
    payload = b"bad" if where == "decode" else Frames(tiny_bundle).payload("s1-r2", 1)
    failing = Failing(ServedModel(tiny_bundle, threads=1), 0.3, where)
    engine = Engine(max_batch=8, max_queue=8, max_batch_s=0.55, decode_threads=0)
    engine.start()

    def submit() -> Coroutine[Any, Any, Computed]:
        return engine.compute(Job(failing, "s1-r2", payload, None))  # type: ignore[arg-type]

    try:
        first = await asyncio.gather(submit(), return_exceptions=True)
        others = await asyncio.gather(*[submit() for _ in range(8)], return_exceptions=True)
    finally:
        await engine.stop()
    assert all(isinstance(outcome, BitneckError) for outcome in (*first, *others))
    assert engine.batches >= 5  # one, and then two at most


async def test_frames_that_fail_do_not_make_others_look_slow(tiny_bundle: Bundle) -> None:
    good, failing = Frames(tiny_bundle).payload("s1-r2", 1), Failing(ServedModel(tiny_bundle, threads=1), 0.5, "decode")
    engine = Engine(max_batch=4, max_queue=8, max_batch_s=1.4, decode_threads=0)
    engine.start()

    def submit(point: str, payload: bytes) -> Coroutine[Any, Any, Computed]:
        return engine.compute(Job(failing, point, payload, None))  # type: ignore[arg-type]

    try:
        bad = [submit("s1-r1", b"bad") for _ in range(3)]
        await asyncio.gather(submit("s1-r2", good), *bad, return_exceptions=True)
        await asyncio.gather(*[submit("s1-r2", good) for _ in range(4)])
    finally:
        await engine.stop()
    assert failing.batches == [1, 4]


async def test_frames_are_decoded_beside_the_tail(slow: Slow, tiny_bundle: Bundle) -> None:
    good = Frames(tiny_bundle).payload("s1-r2", 1)
    slow.seconds = 1.0
    engine = Engine(max_batch=8, max_queue=8, decode_threads=2)
    engine.start()

    def submit(payload: bytes) -> Coroutine[Any, Any, Computed]:
        return engine.compute(Job(slow, "s1-r2", payload, None))  # type: ignore[arg-type]

    waiting = [submit(good)]
    try:
        await asyncio.sleep(0.05)
        waiting += [submit(payload) for payload in (good, b"\xff" * 40, good)]
        gone = Job(slow, "s1-r2", good, None)  # type: ignore[arg-type]
        gone.abandon()
        engine.submit(gone, lambda _job, _result: pytest.fail("nobody waits for it"))
        results = await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        await engine.stop()
    assert [type(result).__name__ for result in results] == ["Computed", "Computed", "MalformedFrame", "Computed"]
    assert slow.batches == [1, 2]  # the malformed one failed alone, before the pass
    assert slow.decoded_by[0].startswith("bitneck-engine")  # a lone frame takes one hop
    assert [name.rsplit("_", 1)[0] for name in slow.decoded_by[1:]] == ["bitneck-decode"] * 3  # each once


async def test_a_deadline_is_honoured_before_the_tail(tiny_bundle: Bundle) -> None:
    class Sluggish(Slow):
        def decode(self, point: str, payload: bytes) -> Any:
            time.sleep(0.1)
            return self.model.decode(point, payload)

    sluggish = Sluggish(ServedModel(tiny_bundle, threads=1))
    engine = Engine(max_batch=8, max_queue=8)
    engine.start()
    try:
        payload = Frames(tiny_bundle).payload("s1-r2", 1)
        job = Job(sluggish, "s1-r2", payload, time.monotonic() + 0.05)  # type: ignore[arg-type]
        with pytest.raises(DeadlineExceeded):
            await engine.compute(job)
    finally:
        await engine.stop()
    assert sluggish.batches == []


async def test_a_bug_in_a_batch_fails_its_frames_and_the_next_are_served(tiny_bundle: Bundle) -> None:
    frames, model = Frames(tiny_bundle), ServedModel(tiny_bundle, threads=1)
    engine = Engine(max_batch=4, max_queue=8)
    engine.start()
    try:
        bad = Job(model, "no such point", b"", None)
        with pytest.raises(BitneckError, match="internal error"):
            await engine.compute(bad)
        good = Job(model, "s1-r2", frames.payload("s1-r2", 1), None)
        assert isinstance((await engine.compute(good)).output, Classification)
    finally:
        await engine.stop()
