"""How sinks are shown: ``GET /v1/sinks``, and metrics."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field

from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.state import SinkState

__all__ = ["SinkInfo", "SinkMetrics", "add_sinks"]


class SinkInfo(BaseModel):
    """A sink. Counts begin with the server's start."""

    name: str
    kind: str
    queued: int = Field(description="answers that wait")
    queue_bytes: int
    behind_s: float = Field(description="how long the oldest of them has waited")
    delivered: int
    failed: int = Field(description="attempts that delivered nothing, or not all")
    refused: int = Field(description="answers that the other side will never take")
    dropped: dict[str, int] = Field(
        description="answers that fell out: of too many bytes, of age, of their own size, because of the disk, or "
        "because the connection ended each time when one was sent"
    )
    failing: bool = Field(description="whether the last attempt failed")
    last_error: str
    last_error_at: float | None = Field(description="seconds since 1970")
    last_delivered_at: float | None = Field(description="seconds since 1970")


def add_sinks(app: FastAPI, outgoing: Outgoing, guarded: Sequence[Any], problems: dict[int | str, Any]) -> None:
    """Add the route to the control API.

    Args:
        app: the control API.
        outgoing: the sinks.
        guarded: dependencies of routes that ask for a token.
        problems: responses that the description lists.
    """

    @app.get("/v1/sinks", dependencies=list(guarded), responses=problems, tags=["answers"])
    async def sinks() -> list[SinkInfo]:
        """Every sink of answers, as it is now."""
        return [_info(state) for state in outgoing.states()]


def _info(state: SinkState) -> SinkInfo:
    return SinkInfo(
        name=state.name,
        kind=state.kind,
        queued=state.queued,
        queue_bytes=state.queue_bytes,
        behind_s=state.behind_s,
        delivered=state.delivered,
        failed=state.failed,
        refused=state.refused,
        dropped=dict(state.dropped),
        failing=state.failing,
        last_error=state.last_error,
        last_error_at=state.last_error_at,
        last_delivered_at=state.last_delivered_at,
    )


class SinkMetrics(Collector):
    """Metrics of sinks, read when they are asked for. Labels hold names from the settings only.

    Args:
        outgoing: the sinks.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        label = ("sink",)
        queued = GaugeMetricFamily("bitneck_sink_queued_answers", "Answers that wait for a sink.", labels=label)
        size = GaugeMetricFamily("bitneck_sink_queue_bytes", "Bytes of answers that wait for a sink.", labels=label)
        behind = GaugeMetricFamily(
            "bitneck_sink_behind_seconds", "How long the oldest answer has waited for a sink.", labels=label
        )
        failing = GaugeMetricFamily("bitneck_sink_failing", "1 if a sink's last attempt failed.", labels=label)
        delivered = CounterMetricFamily("bitneck_sink_delivered_answers", "Answers that a sink took.", labels=label)
        failed = CounterMetricFamily(
            "bitneck_sink_failed_attempts", "Attempts of a sink that delivered nothing, or not all.", labels=label
        )
        refused = CounterMetricFamily(
            "bitneck_sink_refused_answers", "Answers that a sink's other side will never take.", labels=label
        )
        dropped = CounterMetricFamily(
            "bitneck_sink_dropped_answers", "Answers that fell out of a sink's queue.", labels=("sink", "reason")
        )
        for state in self._outgoing.states():
            name = (state.name,)
            queued.add_metric(name, state.queued)
            size.add_metric(name, state.queue_bytes)
            behind.add_metric(name, state.behind_s)
            failing.add_metric(name, float(state.failing))
            delivered.add_metric(name, state.delivered)
            failed.add_metric(name, state.failed)
            refused.add_metric(name, state.refused)
            for reason, count in state.dropped.items():
                dropped.add_metric((state.name, reason), count)
        return queued, size, behind, failing, delivered, failed, refused, dropped
