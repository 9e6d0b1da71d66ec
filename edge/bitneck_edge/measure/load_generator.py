"""A load generator: many sessions from one process, closed or open loop, with the server's own breakdown.

Photographs are encoded once, before the clock starts: what is measured is the link and the cloud. In the open loop a
frame's time counts from when it was due, not from when it could be sent, so a server that stalls is not flattered.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitneck.errors import BitneckError, InvalidConfig
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder, Photo
from bitneck_edge.link.link import Link, LinkSettings, Received
from bitneck_edge.settings import EdgeSettings

__all__ = ["LoadPlan", "LoadResult", "run_load", "summarize"]

_PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send.

    Attributes:
        clients: sessions at once.
        seconds: for how long, after the warm-up.
        warm_s: seconds before that which do not count.
        points: operating points; client k uses the k-th, over and over. Empty for all of the ladder.
        fps: frames a second of each client, at random moments (open loop); 0 sends the next frame when one is
            answered (closed loop).
        in_flight: frames that each client of a closed loop keeps unanswered.
    """

    clients: int = 8
    seconds: float = 10.0
    warm_s: float = 1.0
    points: tuple[str, ...] = ()
    fps: float = 0.0
    in_flight: int = 1


@dataclass(slots=True)
class LoadResult:
    """What came back: one row per answered frame after the warm-up, (round trip, queued, decode, compute) in ms."""

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
        InvalidConfig: no photograph, or a plan that asks for nothing.
        UnknownPoint, ImageError, Unavailable, BitneckError: see `EdgeClient`.
    """
    if not photos or plan.clients < 1 or plan.in_flight < 1 or plan.seconds <= 0 or plan.fps < 0 or plan.warm_s < 0:
        raise InvalidConfig("a load needs photographs, a client or more, and a duration above zero")
    bundle = await fetch_bundle(settings)
    encoder = EdgeEncoder(bundle, threads=settings.threads)
    points = plan.points or tuple(point.id for point in encoder.ladder)
    payloads = {
        point: [(await asyncio.to_thread(encoder.encode, photo, point)).encoded.payload for photo in photos]
        for point in dict.fromkeys(points)
    }
    result = LoadResult(plan)
    links = [
        Link(
            LinkSettings(
                access=settings.access,
                model=settings.model,
                bundle_id=bundle.bundle_id,
                client=f"{settings.client}-{k}",
                connect_timeout_s=settings.connect_timeout_s,
                answer_timeout_s=settings.answer_timeout_s,
                retries=settings.retries,
            ),
            lambda _point, _reason: None,
        )
        for k in range(plan.clients)
    ]
    try:
        await asyncio.gather(*[link.open() for link in links])
        clock = _Clock(plan)
        await asyncio.gather(
            *[
                _client(link, points[k % len(points)], payloads[points[k % len(points)]], settings, clock, result, k)
                for k, link in enumerate(links)
            ]
        )
        result.seconds = plan.seconds
        result.reconnects = sum(link.reconnects for link in links)
    finally:
        await asyncio.gather(*[link.close() for link in links])
    return result


class _Clock:
    """When counting begins, and when sending ends."""

    def __init__(self, plan: LoadPlan) -> None:
        self.begin = time.perf_counter() + plan.warm_s
        self.end = self.begin + plan.seconds


async def _client(
    link: Link, point: str, payloads: list[bytes], settings: EdgeSettings, clock: _Clock, result: LoadResult, k: int
) -> None:
    if not result.plan.fps:
        await asyncio.gather(
            *[_closed(link, point, payloads, settings, clock, result, k + j) for j in range(result.plan.in_flight)]
        )
        return
    moments = random.Random(k)  # noqa: S311  a load that can be repeated, no secret
    due = clock.begin - result.plan.warm_s
    pending: set[asyncio.Task[None]] = set()
    count = k
    while (due := due + moments.expovariate(result.plan.fps)) < clock.end:
        if (pause := due - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        if link.failure is not None:
            break
        count += 1
        task = asyncio.create_task(_one(link, point, payloads[count % len(payloads)], settings, due, clock, result))
        pending.add(task)
        task.add_done_callback(pending.discard)
    if pending:
        await asyncio.wait(pending)


async def _closed(
    link: Link, point: str, payloads: list[bytes], settings: EdgeSettings, clock: _Clock, result: LoadResult, k: int
) -> None:
    count = k
    while time.perf_counter() < clock.end and link.failure is None:
        count += 1
        await _one(link, point, payloads[count % len(payloads)], settings, None, clock, result)


async def _one(
    link: Link, point: str, payload: bytes, settings: EdgeSettings, due: float | None, clock: _Clock, result: LoadResult
) -> None:
    """One frame; `due` is when it was to be sent, None for now."""
    begin = due if due is not None else time.perf_counter()
    try:
        sent = await link.send(point, payload, deadline_ms=settings.deadline_ms)
        received: Received = await sent.answer
    except BitneckError as exc:
        if begin >= clock.begin:
            result.failures[type(exc).__name__] += 1
        return
    if begin < clock.begin:
        return
    if received.at <= clock.end:
        result.answered += 1
    timings = received.result.timings
    result.times.append(
        ((received.at - begin) * 1e3, timings.queued_us / 1e3, timings.decode_us / 1e3, timings.compute_us / 1e3)
    )
    result.batches.append(timings.batch)
    result.payload_bytes += len(payload)


def summarize(result: LoadResult) -> dict[str, Any]:
    """A load as one document: frames a second, percentiles in milliseconds, failures by kind."""
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
