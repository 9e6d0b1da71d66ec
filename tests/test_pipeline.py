"""The pipeline: order, bounds and failures, whatever the stages take."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import BitneckError, ImageError
from bitneck_edge.pipeline import Slots, pipeline

STAGES = ("encode", "send", "answer")


@dataclass
class Log:
    """What the jobs of one pipeline did."""

    encoding: int = 0
    most_encoding: int = 0
    sending: int = 0
    under_way: int = 0
    most_under_way: int = 0
    sent: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class Step:
    """A job whose stages give way to the others a number of times, and fail where they are told to."""

    def __init__(self, number: int, turns: Sequence[int], fails: str, log: Log) -> None:
        self.number, self.turns, self.fails, self.log = number, turns, fails, log

    async def _stage(self, name: str) -> None:
        for _ in range(self.turns[STAGES.index(name)]):
            await asyncio.sleep(0)
        if self.fails == name:
            raise ImageError(name)
        if self.fails == f"bug in {name}":
            raise ZeroDivisionError(name)

    def encode(self) -> None:
        self.encoding = asyncio.create_task(self._encode())

    async def _encode(self) -> None:
        self.log.encoding += 1
        self.log.most_encoding = max(self.log.most_encoding, self.log.encoding)
        try:
            await self._stage("encode")
        finally:
            self.log.encoding -= 1

    def drop(self) -> None:
        self.encoding.cancel()
        self.log.dropped.append(self.number)

    def told(self) -> None:
        self.log.told.append(self.number)

    async def send(self) -> None:
        await self.encoding
        assert self.log.sending == 0
        self.log.sending += 1
        try:
            await self._stage("send")
            self.log.sent.append(self.number)
        finally:
            self.log.sending -= 1

    async def answer(self) -> tuple[int, str]:
        await self._stage("answer")
        return self.number, ""

    def failed(self, error: BitneckError) -> tuple[int, str]:
        return self.number, str(error)


async def steps(plan: Sequence[tuple[Sequence[int], str]], log: Log, end: Exception | None) -> AsyncGenerator[Step]:
    for number, (turns, fails) in enumerate(plan):
        log.under_way += 1
        log.most_under_way = max(log.most_under_way, log.under_way)
        yield Step(number, turns, fails, log)
    if end is not None:
        raise end


async def run(
    plan: Sequence[tuple[Sequence[int], str]],
    log: Log,
    *,
    encoders: int = 2,
    limit: int = 4,
    ordered: bool = True,
    end: Exception | None = None,
) -> list[tuple[int, str]]:
    found = []
    async for result in pipeline(steps(plan, log, end), encoders=encoders, slots=Slots(lambda: limit), ordered=ordered):
        log.under_way -= 1
        found.append(result)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return found


TURNS = st.tuples(*[st.integers(0, 6)] * 3)
PLAN = st.lists(st.tuples(TURNS, st.sampled_from(["", "", "", *STAGES])), max_size=20)


@given(PLAN, st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_sent_in_order_bounded_and_each_answered_once(
    plan: list[tuple[tuple[int, int, int], str]], encoders: int, limit: int, ordered: bool
) -> None:
    log = Log()
    results = asyncio.run(run(plan, log, encoders=encoders, limit=limit, ordered=ordered))
    expected = [(k, fails) for k, (_, fails) in enumerate(plan)]
    assert (results if ordered else sorted(results)) == expected
    assert log.sent == [k for k, (_, fails) in enumerate(plan) if fails not in ("encode", "send")]
    assert log.most_encoding <= encoders
    assert log.most_under_way <= limit
    assert (log.told, log.dropped) == ([number for number, _ in results], [])


async def test_encoding_overlaps_and_unordered_results_come_at_once() -> None:
    log = Log()
    plan = [((5, 0, 50), ""), ((5, 0, 0), ""), ((5, 0, 0), "")]
    assert await run(plan, log, ordered=False) == [(1, ""), (2, ""), (0, "")]
    assert log.most_encoding == 2


async def test_an_error_of_the_source_comes_after_the_results_before_it() -> None:
    found: list[tuple[int, str]] = []
    jobs = steps([((3, 3, 3), "")] * 3, Log(), RuntimeError("the camera is gone"))
    with pytest.raises(RuntimeError, match="the camera is gone"):
        async for result in pipeline(jobs, encoders=2, slots=Slots(lambda: 4), ordered=True):
            found.append(result)
    assert found == [(0, ""), (1, ""), (2, "")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ordered", [True, False])
async def test_a_bug_in_a_stage_is_raised_and_nothing_goes_on(stage: str, ordered: bool) -> None:
    plan = [((1, 1, 1), ""), ((1, 1, 1), f"bug in {stage}"), *[((1, 1, 1), "")] * 50]
    with pytest.raises(ZeroDivisionError, match=stage):
        await run(plan, Log(), ordered=ordered)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_early_ends_every_task_and_closes_the_source() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Step]:
        try:
            while True:
                yield Step(0, (1, 1, 1), "", Log())
        finally:
            closed.set()

    results = pipeline(endless(), encoders=2, slots=Slots(lambda: 4), ordered=True)
    assert await anext(results) == (0, "")
    await results.aclose()
    assert closed.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_job_knows_when_its_result_was_taken() -> None:
    """When the reader asks for the next one, or goes away; others learn that nobody waits for them."""
    log = Log()
    results = pipeline(steps([((1, 1, 1), "")] * 6, log, None), encoders=2, slots=Slots(lambda: 6), ordered=True)
    for number in range(3):
        assert await anext(results) == (number, "")
        await asyncio.sleep(0.01)
        assert log.told == list(range(number)), "not while the reader is at work with it"
    await results.aclose()
    assert log.told == [0, 1, 2]
    assert sorted(log.dropped) == [3, 4, 5]


async def test_stop_ends_after_what_is_under_way() -> None:
    stop, log = asyncio.Event(), Log()
    found = []
    jobs = steps([((1, 1, 1), "")] * 100, log, None)
    async for number, _ in pipeline(jobs, encoders=2, slots=Slots(lambda: 4), ordered=True, stop=stop):
        found.append(number)
        if number == 5:
            stop.set()
    assert found == log.sent == list(range(len(found)))
    assert 6 <= len(found) <= 10


async def test_a_job_that_failed_does_not_wait_for_a_link_that_is_down() -> None:
    """Its turn comes when the one before it has been sent, or has failed too."""
    plan = [((0, 9, 0), "send"), ((0, 0, 0), "encode"), ((0, 0, 0), "")]
    assert await run(plan, Log()) == [(0, "send"), (1, "encode"), (2, "")]
