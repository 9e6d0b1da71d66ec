"""A load generator: many sessions from one process, in a closed or an open loop, with the times that the cloud reports.

Photographs are encoded once, before the clock starts: the link and the cloud are measured. In the open loop, a frame's
time counts from the moment when it was due, not from its sending. So a server that stalls looks no better than it is.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitneck.errors import BitneckError, InvalidConfig
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder, Photo
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.settings import EdgeSettings

__all__ = ["LoadPlan", "LoadResult", "run_load", "summarize"]

_PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send.

    Attributes:
        clients: sessions at once.
        seconds: duration after the warm-up.
        warm_s: duration of the warm-up, which does not count.
        points: operating points, shared out to the clients in turn; empty for the whole ladder.
        fps: frames a second of each client, at random moments (open loop); 0 to send the next frame when one is
            answered (closed loop).
        in_flight: unanswered frames of each client in a closed loop.
        seed: of the random moments; the same seed gives the same moments.
    """

    clients: int = 8
    seconds: float = 10.0
    warm_s: float = 1.0
    points: tuple[str, ...] = ()
    fps: float = 0.0
    in_flight: int = 1
    seed: int = 0

    def moments(self, client: int) -> Iterator[float]:
        """Endless moments at which a client's frames are due, in seconds from the start of the warm-up.

        Args:
            client: its number.

        Raises:
            ZeroDivisionError: without `fps`, when the first one is taken.
        """
        random_moments = random.Random(f"{self.seed} {client}")  # noqa: S311  a load that can be repeated, no secret
        return itertools.accumulate(random_moments.expovariate(self.fps) for _ in itertools.count())


@dataclass(slots=True)
class LoadResult:
    """What came back after the warm-up.

    Attributes:
        plan: what was sent.
        seconds: duration.
        times: a row for each answered frame, (round trip, queued, decode, compute) in milliseconds.
        batches: frames in the batch of each.
        payload_bytes: of all answered frames.
        answered: frames that were answered before the end.
        failures: frames that failed, by kind of error.
        reconnects: of all clients.
    """

    plan: LoadPlan
    seconds: float = 0.0
    times: list[tuple[float, float, float, float]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    payload_bytes: int = 0
    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    reconnects: int = 0


async def run_load(settings: EdgeSettings, photos: Sequence[Photo], plan: LoadPlan) -> LoadResult:
    """Send a load.

    Args:
        settings: server and limits; ``point`` is not used.
        photos: at least one; each is encoded once at every operating point of the plan.
        plan: what to send.

    Raises:
        InvalidConfig: there is no photograph, or the plan asks for nothing.
        UnknownPoint, ImageError, Unavailable, BitneckError: see `EdgeClient`.
    """
    if not photos or plan.clients < 1 or plan.in_flight < 1 or plan.seconds <= 0 or plan.fps < 0 or plan.warm_s < 0:
        raise InvalidConfig("a load needs at least one photograph and one client, and a duration above zero")
    bundle = await fetch_bundle(settings, points=plan.points)
    encoder = EdgeEncoder(bundle, threads=settings.threads)
    points = plan.points or tuple(point.id for point in encoder.ladder)
    payloads = {
        point: [(await asyncio.to_thread(encoder.encode, photo, point)).encoded.payload for photo in photos]
        for point in dict.fromkeys(points)
    }
    result = LoadResult(plan)
    clients = [
        _Client(k, settings, bundle.bundle_id, points[k % len(points)], payloads[points[k % len(points)]], result)
        for k in range(plan.clients)
    ]
    try:
        await asyncio.gather(*[client.link.open() for client in clients])
        begin = time.perf_counter() + plan.warm_s
        await asyncio.gather(*[client.run(begin, begin + plan.seconds) for client in clients])
        result.seconds = plan.seconds
        result.reconnects = sum(client.link.reconnects for client in clients)
    finally:
        await asyncio.gather(*[client.link.close() for client in clients])
    return result


class _Client:
    """One session of a load, which sends its payloads over and over.

    Args:
        number: its number; each client begins with another payload and other random moments.
        settings: of all clients.
        bundle_id: of the server's bundle.
        point: operating point.
        payloads: coded at that point.
        result: what comes back is counted here.
    """

    def __init__(
        self,
        number: int,
        settings: EdgeSettings,
        bundle_id: str,
        point: str,
        payloads: Sequence[bytes],
        result: LoadResult,
    ) -> None:
        self.link = Link(
            LinkSettings(
                access=settings.access,
                model=settings.model,
                bundle_id=bundle_id,
                client=f"{settings.client}-{number}",
                connect_timeout_s=settings.connect_timeout_s,
                answer_timeout_s=settings.answer_timeout_s,
                retries=settings.retries,
            ),
            lambda _point, _reason: None,
        )
        self._number = number
        self._deadline_ms = settings.deadline_ms
        self._point, self._payloads = point, payloads
        self._result = result
        self._begin = self._end = 0.0

    async def run(self, begin: float, end: float) -> None:
        """Send until `end`; frames from `begin` on count. Both are on `time.perf_counter`'s clock."""
        self._begin, self._end = begin, end
        plan = self._result.plan
        if plan.fps:
            await self._open_loop(plan)
        else:
            await asyncio.gather(*[self._closed_loop(self._number + k) for k in range(plan.in_flight)])

    async def _closed_loop(self, count: int) -> None:
        """Send the next frame when one is answered."""
        while time.perf_counter() < self._end and self.link.failure is None:
            count += 1
            await self._frame(count, time.perf_counter())

    async def _open_loop(self, plan: LoadPlan) -> None:
        """Send frames at random moments, whether those before are answered or not."""
        begin = self._begin - plan.warm_s
        pending: set[asyncio.Task[None]] = set()
        count = self._number
        for moment in plan.moments(self._number):
            if (due := begin + moment) >= self._end:
                break
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            if self.link.failure is not None:
                break
            count += 1
            task = asyncio.create_task(self._frame(count, due))
            pending.add(task)
            task.add_done_callback(pending.discard)
        if pending:
            await asyncio.wait(pending)

    async def _frame(self, count: int, due: float) -> None:
        """Send one frame and wait for its answer; its time counts from `due`."""
        payload, result = self._payloads[count % len(self._payloads)], self._result
        try:
            sent = await self.link.send(self._point, payload, deadline_ms=self._deadline_ms)
            received = await sent.answer
        except BitneckError as exc:
            if due >= self._begin:
                result.failures[type(exc).__name__] += 1
            return
        if due < self._begin:
            return
        if received.at <= self._end:
            result.answered += 1
        timings = received.result.timings
        result.times.append(((received.at - due) * 1e3, *received.result.stages_ms))
        result.batches.append(timings.batch if timings is not None else 1)
        result.payload_bytes += len(payload)


def summarize(result: LoadResult) -> dict[str, Any]:
    """A load as one document for JSON: frames a second, percentiles in milliseconds, failures by kind."""
    plan = result.plan
    document: dict[str, Any] = {
        "loop": "open" if plan.fps else "closed",
        "clients": plan.clients,
        "points": list(plan.points),
        "seconds": result.seconds,
        "frames": len(result.times),
        "frames_per_s": result.answered / result.seconds if result.seconds else 0.0,
        "failed": sum(result.failures.values()),
        "failures": dict(result.failures),
        "reconnects": result.reconnects,
    }
    if plan.fps:
        document["offered_per_s"] = plan.fps * plan.clients
        document["seed"] = plan.seed
    if result.times:
        columns = np.array(result.times)  # (frames, 4)
        link = columns[:, 0] - columns[:, 1:].sum(axis=1)
        named = zip(("round_trip", "queued", "decode", "compute", "rest"), [*columns.T, link], strict=True)
        document["ms"] = {
            name: {f"p{q:g}": float(np.percentile(values, q)) for q in _PERCENTILES} | {"mean": float(values.mean())}
            for name, values in named
        }
        document["batch_mean"] = float(np.mean(result.batches))
        document["payload_bytes_mean"] = result.payload_bytes / len(result.times)
    return document
