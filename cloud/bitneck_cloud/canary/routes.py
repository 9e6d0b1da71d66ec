"""Paths of the control API for canaries, and their metrics."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.canary.records import Ended, Running
from bitneck_cloud.canary.schemas import (
    CanaryBegun,
    CanaryEnded,
    CanaryInfo,
    CanaryPromoted,
    CanaryRequest,
    CandidateInfo,
    choice_info,
    comparison_of,
    photographs_of,
)
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Session

__all__ = ["CanaryMetrics", "add_canary"]


def add_canary(
    app: FastAPI,
    canaries: Canaries,
    registry: Registry,
    connected: Callable[[Session], bool],
    guarded: Sequence[Any],
    problems: dict[int | str, dict[str, Any]],
) -> None:
    """Add the paths to the application.

    Args:
        app: the control API.
        canaries: what they show and change.
        registry: knows the sessions.
        connected: whether a session has a stream.
        guarded: dependencies of routes that need a token.
        problems: the responses that errors have.
    """
    shared: dict[str, Any] = {"dependencies": list(guarded), "responses": problems, "tags": ["models"]}

    def sessions(model: str) -> Callable[[str], int]:
        found = Counter(
            session.bundle_id
            for session in registry.sessions(time.monotonic())
            if session.model == model and connected(session)
        )
        return found.__getitem__

    def info(name: str) -> dict[str, Any]:
        served = registry.model(name)
        running: Running | None = canaries.running.get(served.name)
        shown = running or canaries.waiting.get(served.name)
        return {
            "model": served.name,
            "bundle_id": served.bundle.bundle_id,
            "base_bundle_id": canaries.base(served.name),
            "kept": canaries.kept,
            "promoted": choice_info(canaries.promoted(served.name)),
            "canary": choice_info(shown.choice if shown is not None else None),
            "problem": shown.problem if shown is not None else "",
            "changing": canaries.under_way(served.name),
            "comparison": comparison_of(running, running.tallies, sessions(served.name)) if running else None,
            "photographs": photographs_of(running.photographs) if running else None,
        }

    def ended(name: str, done: Ended) -> dict[str, Any]:
        return {
            "model": name,
            "bundle_id": registry.model(name).bundle.bundle_id,
            "told": done.told,
            "comparison": comparison_of(*done.compared, sessions(name)) if done.compared else None,
            "photographs": photographs_of(done.compared[0].photographs) if done.compared else None,
        }

    @app.get("/v1/models/{name}/candidates", **shared)
    async def candidates(name: str) -> list[CandidateInfo]:
        """Bundles of this model that may be tried, by name; and folders whose manifest cannot be read."""
        served = registry.model(name)
        found = await canaries.listed()
        return [
            CandidateInfo(
                bundle=each.name,
                bundle_id=each.bundle_id,
                points=each.points,
                served=each.bundle_id == served.bundle.bundle_id,
                problem=each.problem,
            )
            for each in found
            if each.model in ("", served.name)
        ]

    @app.get("/v1/models/{name}/canary", **shared)
    async def canary(name: str) -> CanaryInfo:
        """The canary that runs, and how its bundle compares with the current one."""
        await canaries.look(registry.model(name).name)
        return CanaryInfo(**info(name))

    @app.post("/v1/models/{name}/canary", **shared)
    async def begin(name: str, request: CanaryRequest) -> CanaryBegun:
        """Give another bundle to some clients. If it cannot be loaded, nothing changes."""
        _, told = await canaries.begin(name, request.bundle, request.clients)
        return CanaryBegun(**info(name), told=told)

    @app.post("/v1/models/{name}/canary/promote", **shared)
    async def promote(name: str) -> CanaryPromoted:
        """Give the canary's bundle to all clients."""
        name = registry.model(name).name
        done = await canaries.promote(name)
        folder = str(registry.model(name).bundle.root)
        return CanaryPromoted(
            **ended(name, done), kept=canaries.kept, folder=folder, note=_note(canaries, name, folder)
        )

    @app.delete("/v1/models/{name}/canary", **shared)
    async def end(name: str) -> CanaryEnded:
        """End the canary: its clients go back to the current bundle. Its folder need not be there."""
        name = registry.model(name).name
        return CanaryEnded(**ended(name, await canaries.end(name)))


def _note(canaries: Canaries, name: str, folder: str) -> str:
    base = canaries.base(name)
    if canaries.promoted(name) is None:
        return f"this is the bundle that the folder of --bundle holds, {base}: nothing has to be done"
    if canaries.kept:
        return (
            f"this survives a restart as long as the folder of --bundle holds {base} and {folder} this bundle; a "
            "reload, and another bundle in that folder, take its place"
        )
    return (
        f"this server keeps no state (--state-db): start it with --bundle {folder} from now on, or export the bundle "
        f"to the folder of --bundle, else a restart serves {base} again"
    )


class CanaryMetrics(Collector):
    """Metrics of canaries, read when they are asked for. The counts are there while a canary runs.

    Args:
        canaries: of the server.
        registry: knows the models.
    """

    def __init__(self, canaries: Canaries, registry: Registry) -> None:
        self._canaries = canaries
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        runs = GaugeMetricFamily("bitneck_canary", "1 while a canary of a model runs.", labels=("model",))
        frames = CounterMetricFamily(
            "bitneck_canary_frames",
            "Frames since a canary began, by bundle (current, candidate) and outcome (answered, fault).",
            labels=("model", "bundle", "outcome"),
        )
        for name in self._registry.models:
            running = self._canaries.running.get(name)
            runs.add_metric((name,), float(running is not None))
            if running is None:
                continue
            for bundle, tally in zip(("current", "candidate"), running.tallies, strict=True):
                frames.add_metric((name, bundle, "answered"), tally.all.frames)
                frames.add_metric((name, bundle, "fault"), tally.faults.total())
        return runs, frames
