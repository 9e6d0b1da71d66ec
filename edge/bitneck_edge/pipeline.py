"""Many photographs at once: encoded side by side, sent one after another in order, answered in any order.

    jobs --> encode (some at once) --> send (one at a time, in order) --> answer (all at once) --> results
                    `----------------- bounded by `Slots` -------------------------------'

The order holds by construction: one task starts the jobs and puts them into a queue, another takes them out and sends
them. Nothing here knows what a job encodes or where it sends it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol, TypeVar

from bitneck.errors import BitneckError

__all__ = ["Job", "Slots", "pipeline"]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Job(Protocol[R_co]):
    """One photograph's way through the pipeline. A stage that raises a `BitneckError` ends this job and no other."""

    def encode(self) -> None:
        """Begin the first stage; other jobs may be in it at the same time."""

    def send(self) -> Awaitable[None]:
        """The end of the first stage, then the second one, which the jobs before this one have left already."""

    def drop(self) -> None:
        """Nobody waits for its result any more."""

    def told(self) -> None:
        """Whoever reads the results has its own, and has asked for the next one, or for none."""

    def answer(self) -> Awaitable[R_co | None]:
        """The last stage; gives the result, or None if there is none to wait for."""

    def failed(self, error: BitneckError) -> R_co:
        """The result in place of an answer."""


class Slots:
    """A number of places, which may change while some of them are taken.

    Args:
        limit: asked whenever one is taken.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._changed = asyncio.Event()
        self.taken = 0

    async def take(self) -> None:
        """Take one; waits while there is none. For one taker at a time."""
        while self.taken >= max(1, self._limit()):
            self._changed.clear()
            await self._changed.wait()
        self.taken += 1

    def give(self) -> None:
        """Give one back."""
        self.taken -= 1
        self._changed.set()


async def pipeline(
    jobs: AsyncGenerator[Job[R]],
    *,
    encoders: int,
    slots: Slots,
    ordered: bool,
    stop: asyncio.Event | None = None,
    all_sent: Callable[[], Awaitable[None]] | None = None,
) -> AsyncGenerator[R]:
    """The results of some jobs.

    Args:
        jobs: taken one by one, when there is room for one; closed at the end.
        encoders: jobs that may be encoded or wait for their turn to be sent.
        slots: jobs that may be under way.
        ordered: results in the order of the jobs; else as they come.
        stop: set it to end after the jobs that are under way.
        all_sent: called when the last job has been sent.

    Raises:
        Exception: what `jobs` raises, after the results of the jobs before; or what a job raises that is no
            `BitneckError`.
    """
    tasks: dict[asyncio.Task[R | None], Job[R]] = {}  # whose results were not taken
    encoding: asyncio.Queue[Job[R] | None] = asyncio.Queue()
    results: asyncio.Queue[asyncio.Task[R | None] | None] = asyncio.Queue()
    free_encoders = asyncio.Semaphore(encoders)

    def stopped() -> bool:
        return stop is not None and stop.is_set()

    async def encode_all() -> None:
        try:
            async with contextlib.aclosing(jobs):
                while not stopped():
                    await free_encoders.acquire()
                    await slots.take()
                    job = await anext(jobs, None)
                    if job is None or stopped():
                        return
                    job.encode()
                    encoding.put_nowait(job)
        finally:
            encoding.put_nowait(None)

    async def send_all() -> None:
        while (job := await encoding.get()) is not None:
            error: BitneckError | None = None
            try:
                await job.send()
            except BitneckError as exc:
                error = exc
            free_encoders.release()
            task = asyncio.create_task(_answer(job, error))
            tasks[task] = job
            if ordered:
                results.put_nowait(task)
            else:
                task.add_done_callback(results.put_nowait)
        if all_sent is not None:
            await all_sent()
        if not ordered and (left := [task for task in tasks if not task.done()]):
            await asyncio.wait(left)

    reading, sending = asyncio.create_task(encode_all()), asyncio.create_task(send_all())
    sending.add_done_callback(lambda _: results.put_nowait(None))
    try:
        while (answer := await results.get()) is not None:
            job = tasks[answer]
            try:
                result = await answer
                slots.give()
                if result is not None:
                    yield result
            except Exception:  # the reader has it now
                job.told()
                raise
            except GeneratorExit:
                job.told()
                del tasks[answer]
                raise
            del tasks[answer]
            if result is not None:
                job.told()
        await sending
        await reading
    finally:
        for each in (reading, sending, *tasks):
            each.cancel()
        await asyncio.gather(reading, sending, *tasks, return_exceptions=True)
        while not encoding.empty():
            if (unsent := encoding.get_nowait()) is not None:
                unsent.drop()
        for job in tasks.values():
            job.drop()


async def _answer(job: Job[R], error: BitneckError | None) -> R | None:
    """The result of a job that was sent, or that failed before."""
    if error is not None:
        return job.failed(error)
    try:
        return await job.answer()
    except BitneckError as exc:
        return job.failed(exc)
