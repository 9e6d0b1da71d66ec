"""The engine: a bounded queue, and one thread that computes whatever waits, in batches.

Work-conserving: a lone frame never waits while the thread is idle, and what arrives while it is busy becomes the next
batch. A frame that went away or is late is dropped before it is computed.
"""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from bitneck.errors import BitneckError, DeadlineExceeded, ModelFailure, Overloaded, Unavailable
from bitneck_cloud.models import Computed, ServedModel

__all__ = ["Engine", "Job"]

_LOG = logging.getLogger(__name__)


class Job:
    """One frame on its way through the engine.

    Args:
        model: that computes it.
        point: its operating point.
        payload: its coded bytes.
        deadline: on `time.monotonic`'s clock, or None.
    """

    def __init__(self, model: ServedModel, point: str, payload: bytes, deadline: float | None) -> None:
        self.model = model
        self.point = point
        self.payload = payload
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.queued_us = 0
        self.started = False
        self.result: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()


class Engine:
    """Runs on one event loop; `start` it there.

    Args:
        max_batch: frames in one pass.
        max_queue: frames that may wait.
    """

    def __init__(self, *, max_batch: int, max_queue: int) -> None:
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="bitneck-engine")
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0
        self.batches = 0
        self.frames = 0

    def start(self) -> None:
        """Begin to compute."""
        self._task = asyncio.get_running_loop().create_task(self._work(), name="bitneck-engine")

    async def stop(self) -> None:
        """Stop after the batch in hand; what still waits fails with `Unavailable`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        while self._queue:
            _settle(self._queue.popleft(), Unavailable("the server is stopping; connect again and resend"))
        await asyncio.to_thread(self._executor.shutdown)

    def submit(self, job: Job) -> None:
        """Queue a frame; await ``job.result``.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} frames wait already; send more slowly, or try again later")
        self._queue.append(job)
        self._wake.set()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            batch = self._take()
            if not batch:
                continue
            frames = [(job.point, job.payload) for job in batch]
            try:
                results = await loop.run_in_executor(self._executor, batch[0].model.run, frames)
            except asyncio.CancelledError:
                for job in batch:
                    _settle(job, Unavailable("the server is stopping; connect again and resend"))
                raise
            except Exception:  # noqa: BLE001  a bug must not end the engine: these frames fail, the next are served
                _LOG.exception("the engine failed on a batch of %d frames", len(batch))
                results = None
            self.batches += 1
            self.frames += len(batch)
            for k, job in enumerate(batch):
                failure = ModelFailure("an internal error; the server's log says why")
                _settle(job, failure if results is None else results[k])

    def _take(self) -> list[Job]:
        """The next batch: frames of one model, oldest first; late and abandoned ones fall out."""
        batch: list[Job] = []
        passed: list[Job] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._max_batch:
            job = self._queue.popleft()
            if job.result.cancelled():
                self.dropped += 1
            elif job.deadline is not None and now > job.deadline:
                late_ms = (now - job.deadline) * 1e3
                _settle(job, DeadlineExceeded(f"the frame waited {late_ms:.0f} ms beyond its deadline; it was dropped"))
            elif batch and job.model is not batch[0].model:
                passed.append(job)
            else:
                job.started = True
                job.queued_us = round((now - job.submitted) * 1e6)
                batch.append(job)
        self._queue.extendleft(reversed(passed))
        return batch


def _settle(job: Job, result: Computed | BitneckError) -> None:
    if job.result.done():
        return
    if isinstance(result, BitneckError):
        job.result.set_exception(result)
    else:
        job.result.set_result(result)
