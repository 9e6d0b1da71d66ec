"""The engine: a bounded queue, one thread that computes, and threads that decode meanwhile.

A single frame never waits while the engine is idle: one hop takes it through decoding and the tail. Frames that arrive
while the engine is busy are decoded beside it, and form the next batch. Abandoned and late frames are dropped before
each step: before they are taken, before they are decoded, and before the tail.

    submit -> queue --(engine busy: decode threads)--> batch -> decode the rest -> tail -> results
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import BitneckError, ModelFailure, Overloaded, Unavailable
from bitneck.wire.messages import Output
from bitneck.workers import Workers, tell
from bitneck_cloud.abandoned import abandon
from bitneck_cloud.answers.publishing import Pass, Publishing
from bitneck_cloud.engine.batch_time import BatchTime
from bitneck_cloud.engine.fair_queue import FairQueue
from bitneck_cloud.engine.job import INTERNAL_ERROR, Computed, Job
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["Engine"]

_LOG = logging.getLogger(__name__)

_STOP_S = 30.0
"""Seconds that a stopping server waits for its last batch."""


class Engine:
    """Runs on one event loop; `start` it there.

    Args:
        max_batch: frames in one batch; models with large tensors take fewer, see `ServedModel.max_frames`.
        max_queue: frames that may wait.
        max_batch_s: a batch takes no more frames once it is expected to take as long as this. A frame waits for the
            batch before its own.
        decode_threads: threads that decode beside the tail; 0 leaves decoding to the engine's own thread.
        metrics: counts what happens.
        publishing: takes the answers of each pass. None settles the frames at once.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_queue: int,
        max_batch_s: float = math.inf,
        decode_threads: int = 1,
        metrics: Metrics | None = None,
        publishing: Publishing | None = None,
    ) -> None:
        self._publishing = publishing
        self._max_batch = max_batch
        self._max_batch_s = max_batch_s
        self._times: WeakKeyDictionary[ServedModel, BatchTime] = WeakKeyDictionary()
        self.max_queue = max_queue
        self._metrics = metrics or Metrics()
        self._queue: FairQueue[Job] = FairQueue(max_queue)
        self._thread = Workers(1, "bitneck-engine")
        self._decoders = Workers(decode_threads, "bitneck-decode") if decode_threads else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waking = False
        self._in_hand: list[Job] = []
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()
        self.dropped = 0
        self.batches = 0
        self.frames = 0

    @property
    def waiting(self) -> int:
        """Frames in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to compute."""
        self._loop = asyncio.get_running_loop()
        self._wake()

    async def stop(self) -> None:
        """Stop after the current batch. Frames that still wait fail with `Unavailable`."""
        self._loop = None
        stopping = Unavailable("the server is stopping; connect again and resend")
        for job in self._queue.drain():
            job.settle(stopping)
        for job in self._in_hand:
            job.settle(stopping)
        if self._decoders is not None:
            await asyncio.to_thread(self._decoders.close, wait=True)
        try:
            async with asyncio.timeout(_STOP_S):
                await self._idle.wait()
        except TimeoutError:  # the disk of a publisher does not answer
            _LOG.error("a batch is still not done after %.0f s; the server stops without it", _STOP_S)
            abandon("a batch")
            return
        await asyncio.to_thread(self._thread.close, wait=True)

    def submit(self, job: Job, on_settled: Callable[[Job, Computed | BitneckError], None]) -> None:
        """Queue a frame. A full queue settles the newest frame of whoever has many in it, see `FairQueue`.

        Args:
            job: the frame.
            on_settled: called once on the event loop with the result or the error, unless the frame is abandoned.

        Raises:
            Overloaded: the queue is full, and nobody has more frames in it.
        """
        job.on_settled(on_settled)
        displaced = self._queue.push(job, *job.turn)
        if displaced is not None:
            displaced.settle(Overloaded("the server has too much to do; send more slowly, or try again later"))
        if self._in_hand:
            if self._decoders is not None:
                self._decoders.post(job.decode_ahead)
        else:
            self._wake()

    def compute(self, job: Job) -> Coroutine[Any, Any, Computed]:
        """Queue a frame, and return an awaitable of its output. Cancelling the wait abandons the frame.

        Raises:
            Overloaded: the queue is full.
            BitneckError: the frame has no output; raised by the wait.
        """
        settled: asyncio.Future[Computed | BitneckError] = asyncio.get_running_loop().create_future()
        self.submit(job, lambda _job, result: None if settled.done() else settled.set_result(result))
        return self._output(job, settled)

    async def _output(self, job: Job, settled: "asyncio.Future[Computed | BitneckError]") -> Computed:
        try:
            result = await settled
        finally:
            job.abandon()
        if isinstance(result, BitneckError):
            raise result
        return result

    def _wake(self) -> None:
        """Take a batch after the event loop has read everything that has arrived."""
        if self._loop is not None and not self._waking and self._queue:
            self._waking = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """Give the next batch to the engine's thread, unless it is at work."""
        self._waking = False
        while self._loop is not None and self._queue and not self._in_hand:
            self._in_hand = self._take()
            if self._in_hand:
                self._idle.clear()
                self._thread.post(functools.partial(self._compute, self._in_hand, self._loop))

    def _compute(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        """In the engine's thread: compute one batch, and hand the results to the event loop."""
        published: Pass | None = None
        try:
            passed = _pass(batch)
            if self._publishing is not None:
                answers = (job.answered(result) for job, result in zip(batch, passed.results, strict=True))
                known = [answer for answer in answers if answer is not None]
                published = self._publishing.passed(known, at_once=not self._queue)
        except Exception:  # noqa: BLE001  a bug must not end the engine: these frames fail, the next are served
            _LOG.exception("the engine failed on a batch of %d frames", len(batch))
            passed = _Passed([ModelFailure(INTERNAL_ERROR)] * len(batch))
        tell(loop, self._finish, passed, published)  # not if the server has stopped without this batch

    def _finish(self, passed: "_Passed", published: Pass | None) -> None:
        (batch, self._in_hand), results = (self._in_hand, []), passed.results
        try:
            self._learn(batch[0].model, passed)
            self._idle.set()
            self._begin()  # the thread goes on while answers are sent
        finally:  # what has its numbers is handed on, whatever comes
            self.batches += 1
            self.frames += len(batch)
            settle = functools.partial(_settle, batch, results)
            if self._publishing is None or published is None:
                settle()
            else:
                self._publishing.answered(published, settle)
        asyncio.get_running_loop().call_soon(self._count, batch, results)  # behind the answers

    def _learn(self, model: ServedModel, passed: "_Passed") -> None:
        times = self._times.get(model)
        if times is None:
            times = self._times[model] = BatchTime()
        if passed.computed:
            times.learn(passed.computed, passed.computed_s)
        for point, seconds in passed.failed:
            times.learn_failed(point, seconds)

    def _count(self, batch: list[Job], results: list[Computed | BitneckError]) -> None:
        model = batch[0].model.name
        for job in batch:
            self._metrics.waited(model, job.taken - job.submitted)
            if job.decode_s:
                self._metrics.decoded(model, job.decode_s)
        first = next((result for result in results if isinstance(result, Computed)), None)
        if first is not None:
            self._metrics.computed(model, first.batch, first.compute_us / 1e6)

    def _take(self) -> list[Job]:
        """The next batch: frames of one model, by turns. Late and abandoned frames are dropped."""
        batch: list[Job] = []
        now, expected_s = time.monotonic(), 0.0

        def fits(job: Job) -> bool:
            return not batch or job.model is batch[0].model

        while not batch or (
            len(batch) < min(self._max_batch, batch[0].model.max_frames) and expected_s < self._max_batch_s
        ):
            job = self._queue.pop(fits)
            if job is None:
                break
            if not job.wanted:
                self.dropped += 1
                self._metrics.frame(job.model.name, "GONE")
            elif (late := job.late(now)) is not None:
                job.settle(late)
            else:
                job.take(now)
                batch.append(job)
                times = self._times.get(job.model)
                expected_s += times.of(job.point) if times is not None else 0.0
        return batch


def _settle(batch: list[Job], results: list[Computed | BitneckError]) -> None:
    for job, result in zip(batch, results, strict=True):
        job.settle(result)


@dataclass(frozen=True, slots=True)
class _Passed:
    """What became of a batch.

    Attributes:
        results: one of each frame.
        computed: operating points of the frames that went through the network, also of those that failed there.
        computed_s: seconds that the pass spent on these.
        failed: operating points of the other frames, each with the seconds that the pass spent on it.
    """

    results: list[Computed | BitneckError]
    computed: Sequence[str] = ()
    computed_s: float = 0.0
    failed: Sequence[tuple[str, float]] = ()


def _pass(batch: list[Job]) -> _Passed:
    """Decode the frames that are not decoded yet, and compute. Runs in the engine's thread."""
    start = time.perf_counter()
    results: list[Computed | BitneckError | None] = [job.late(time.monotonic()) for job in batch]
    latents: dict[int, NDArray[np.float32]] = {}
    failed: list[tuple[str, float]] = []
    for row, job in enumerate(batch):
        if results[row] is None:
            begin = time.perf_counter()
            latent = job.decode()
            if isinstance(latent, BitneckError):
                results[row] = latent
            elif (late := job.late(time.monotonic())) is not None:
                results[row] = late
            else:
                latents[row] = latent
                continue
            failed.append((job.point, time.perf_counter() - begin))
    begin = time.perf_counter()
    taken = [batch[row] for row in latents]
    points = [job.point for job in taken]
    outputs: list[Output | BitneckError] = []
    if latents:
        outputs = taken[0].model.compute(points, list(latents.values()), [job.map_step for job in taken])
    compute_us = round((time.perf_counter() - begin) * 1e6)
    for row, output in zip(latents, outputs, strict=True):
        job = batch[row]
        results[row] = (
            output
            if isinstance(output, BitneckError)
            else Computed(
                output=output,
                queued_us=round((job.taken - job.submitted) * 1e6),
                decode_us=round(job.decode_s * 1e6),
                compute_us=compute_us,
                batch=len(latents),
            )
        )
    return _Passed(
        [result if result is not None else ModelFailure("the frame was not computed") for result in results],
        points,
        time.perf_counter() - start - sum(seconds for _, seconds in failed),
        failed,
    )
