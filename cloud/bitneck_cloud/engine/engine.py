"""The engine: a bounded queue, one thread that computes whatever waits, and threads that decode meanwhile.

Work-conserving: a lone frame never waits while the engine is idle, and one hop takes it through decoding and the tail.
What arrives while the engine is busy is decoded beside it and becomes the next batch. A frame that went away or is
late is dropped before each step: before it is taken, before it is decoded, and before the tail.

    submit -> queue --(engine busy: decoded in a decode thread)--> batch -> decode what is not -> tail -> results
"""

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.conditional_codec import Reference
from bitneck.errors import BitneckError, DeadlineExceeded, ModelFailure, Overloaded, Unavailable
from bitneck.v1 import inference_pb2 as pb
from bitneck.workers import Workers
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["Computed", "Engine", "Job"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Computed:
    """A frame's output, and what it took: microseconds, and the number of frames that shared the pass."""

    output: pb.Output
    queued_us: int
    decode_us: int
    compute_us: int
    batch: int


class Job:
    """One frame on its way through the engine.

    Args:
        model: that computes it.
        point: its operating point.
        payload: its coded bytes.
        deadline: on `time.monotonic`'s clock, or None.
        on_settled: called once on the event loop with what became of it, unless it was cancelled; None to await
            ``result``.
        reference: what the payload is coded against; None where it is coded by itself.
        keep: whether later frames may refer to this one: ``kept`` then has its symbols once it is decoded.
    """

    def __init__(
        self,
        model: ServedModel,
        point: str,
        payload: bytes,
        deadline: float | None,
        on_settled: "Callable[[Job, Computed | BitneckError], None] | None" = None,
        *,
        reference: Reference | None = None,
        keep: bool = False,
    ) -> None:
        self.model = model
        self.point = point
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.started = False
        self.taken = 0.0
        self.decode_s = 0.0
        self.kept: Reference | None = None
        self.result: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        self._on_settled = on_settled
        self._payload = payload
        self._reference = reference
        self._keep = keep
        self._latent: NDArray[np.float32] | BitneckError | None = None
        self._lock = threading.Lock()

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.result.cancelled()

    def settle(self, result: Computed | BitneckError) -> None:
        """Tell whoever waits what became of it; what comes after that, or after a cancellation, is ignored."""
        if self.result.done():
            return
        if self._on_settled is not None:
            self.result.cancel()
            self._on_settled(self, result)
        elif isinstance(result, BitneckError):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)

    def late(self, now: float) -> DeadlineExceeded | None:
        """The error of a frame whose deadline has passed."""
        if self.deadline is None or now <= self.deadline:
            return None
        return DeadlineExceeded(
            f"the frame waited {(now - self.deadline) * 1e3:.0f} ms beyond its deadline; it was dropped"
        )

    def decode(self) -> NDArray[np.float32] | BitneckError:
        """The latent, decoded once, by whichever thread asks first; or why there is none."""
        with self._lock:
            if self._latent is None:
                begin = time.perf_counter()
                try:
                    if self._keep or self._reference is not None:
                        latent, kept = self.model.decode_similar(self.point, self._payload, self._reference)
                        self._latent, self.kept = latent, kept if self._keep else None
                    else:
                        self._latent = self.model.decode(self.point, self._payload)
                except BitneckError as exc:
                    self._latent = exc
                except Exception:  # noqa: BLE001  a bug: this frame fails alone
                    _LOG.exception("decoding a frame of %s failed", self.point)
                    self._latent = ModelFailure("an internal error; the server's log says why")
                self.decode_s = time.perf_counter() - begin
            return self._latent

    def decode_ahead(self) -> None:
        """`decode`, if the frame is still wanted; called by a decode thread, whose failures are found again."""
        if not self.gone and self.late(time.monotonic()) is None:
            self.decode()


class Engine:
    """Runs on one event loop; `start` it there.

    Args:
        max_batch: frames in one pass; a model whose tensors are large takes fewer, see `ServedModel.max_frames`.
        max_queue: frames that may wait.
        decode_threads: that decode beside the tail; 0 leaves all to the engine's own thread.
        metrics: what happens is counted there.
    """

    def __init__(
        self, *, max_batch: int, max_queue: int, decode_threads: int = 1, metrics: Metrics | None = None
    ) -> None:
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._metrics = metrics or Metrics()
        self._queue: deque[Job] = deque()
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
        """Stop after the batch in hand; what still waits fails with `Unavailable`."""
        self._loop = None
        stopping = Unavailable("the server is stopping; connect again and resend")
        while self._queue:
            self._queue.popleft().settle(stopping)
        for job in self._in_hand:
            job.settle(stopping)
        if self._decoders is not None:
            await asyncio.to_thread(self._decoders.close, wait=True)
        await self._idle.wait()
        await asyncio.to_thread(self._thread.close, wait=True)

    def submit(self, job: Job) -> None:
        """Queue a frame; await ``job.result``, or be called.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._queue) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} frames wait already; send more slowly, or try again later")
        self._queue.append(job)
        if self._in_hand:
            if self._decoders is not None:
                self._decoders.post(job.decode_ahead)
        else:
            self._wake()

    def _wake(self) -> None:
        """Take a batch once the event loop has read what else has arrived."""
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
        """In the engine's thread: one pass, and back to the loop with it."""
        try:
            results = _pass(batch)
        except Exception:  # noqa: BLE001  a bug must not end the engine: these frames fail, the next are served
            _LOG.exception("the engine failed on a batch of %d frames", len(batch))
            results = [ModelFailure("an internal error; the server's log says why")] * len(batch)
        loop.call_soon_threadsafe(self._finish, results)

    def _finish(self, results: list[Computed | BitneckError]) -> None:
        batch, self._in_hand = self._in_hand, []
        self._idle.set()
        self._begin()  # the thread goes on while answers are sent
        self.batches += 1
        self.frames += len(batch)
        for job, result in zip(batch, results, strict=True):
            job.settle(result)
        asyncio.get_running_loop().call_soon(self._count, batch, results)  # behind the answers

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
        """The next batch: frames of one model, oldest first; late and abandoned ones fall out."""
        batch: list[Job] = []
        passed: list[Job] = []
        now = time.monotonic()
        while self._queue and (not batch or len(batch) < min(self._max_batch, batch[0].model.max_frames)):
            job = self._queue.popleft()
            if job.gone:
                self.dropped += 1
                self._metrics.frame(job.model.name, "GONE")
            elif (late := job.late(now)) is not None:
                job.settle(late)
            elif batch and job.model is not batch[0].model:
                passed.append(job)
            else:
                job.started = True
                job.taken = now
                batch.append(job)
        self._queue.extendleft(reversed(passed))
        return batch


def _pass(batch: list[Job]) -> list[Computed | BitneckError]:
    """Decode what is not decoded yet, and compute; runs in the engine's thread."""
    results: list[Computed | BitneckError | None] = [job.late(time.monotonic()) for job in batch]
    latents: dict[int, NDArray[np.float32]] = {}
    for row, job in enumerate(batch):
        if results[row] is None:
            latent = job.decode()
            if isinstance(latent, BitneckError):
                results[row] = latent
            elif (late := job.late(time.monotonic())) is not None:
                results[row] = late
            else:
                latents[row] = latent
    begin = time.perf_counter()
    outputs = batch[0].model.compute([batch[row].point for row in latents], list(latents.values())) if latents else []
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
    return [result if result is not None else ModelFailure("the frame was not computed") for result in results]
