"""Threads beside the event loop."""

import asyncio
import threading

import pytest

from bitneck.errors import Unavailable
from bitneck.workers import Workers


async def test_results_and_errors_come_back() -> None:
    workers = Workers(2, "test")
    assert await asyncio.gather(*[workers.run(pow, 2, n) for n in range(50)]) == [2**n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 1, 0)
    names = await asyncio.gather(*[workers.run(lambda: threading.current_thread().name) for _ in range(8)])
    assert {name.rsplit("_", 1)[0] for name in names} == {"test"}
    workers.close(wait=True)


async def test_closing_drops_what_waits_and_lets_nobody_wait() -> None:
    workers = Workers(1, "test")
    begun, go_on = threading.Event(), threading.Event()

    def block() -> str:
        begun.set()
        assert go_on.wait(10)
        return "done"

    first = asyncio.create_task(workers.run(block))
    second = asyncio.create_task(workers.run(str))
    await asyncio.to_thread(begun.wait, 10)
    await asyncio.sleep(0)
    workers.close()
    go_on.set()
    assert await first == "done"
    for late in (second, workers.run(str)):
        with pytest.raises(Unavailable, match="closed"):
            await late
    workers.close(wait=True)


async def test_a_caller_who_gives_up_costs_no_thread() -> None:
    workers = Workers(1, "test")
    go_on, ran = threading.Event(), []
    blocked = asyncio.create_task(workers.run(go_on.wait, 10))
    given_up = asyncio.create_task(workers.run(ran.append, 1))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    go_on.set()
    assert await blocked
    await workers.run(str)
    assert not ran
    workers.close(wait=True)
