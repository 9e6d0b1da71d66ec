"""OpenTelemetry traces, if the extra ``bitneck[traces]`` is installed and an endpoint is set.

Each answered frame has one span, with children for its wait, its decoding and its batch. They are written when the
frame is done, from times that were taken anyway. A frame that is not sampled costs nothing.
A client's ``traceparent`` in the call's metadata is the parent.
"""

import time
from typing import TYPE_CHECKING, Any, Protocol

from bitneck.errors import InvalidConfig

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from bitneck_cloud.engine.job import Computed

__all__ = ["FrameTracer", "NoTraces", "OtlpTraces", "open_traces"]

_NAME = "bitneck.cloud"


class FrameTracer(Protocol):
    """Where frames' spans go."""

    def parent(self, metadata: Any) -> "Context | None":
        """The caller's trace, from a call's metadata."""

    def frame(
        self, model: str, point: str, seq: int, received: float, done: "Computed", parent: "Context | None"
    ) -> None:
        """A frame was computed; `received` is in seconds since 1970."""

    def close(self) -> None:
        """Send what waits."""


class NoTraces:
    """Traces are not wanted."""

    def parent(self, metadata: Any) -> None:
        """None."""

    def frame(
        self, model: str, point: str, seq: int, received: float, done: "Computed", parent: "Context | None"
    ) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class OtlpTraces:
    """Spans in OTLP over gRPC. A bounded queue and a thread of its own send them.

    Args:
        endpoint: URL of a collector, such as ``http://127.0.0.1:4317``.
        ratio: of the frames without a caller's trace, 0 to 1.

    Raises:
        InvalidConfig: the extra is not installed.
    """

    def __init__(self, endpoint: str, ratio: float) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.propagate import extract
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
            from opentelemetry.trace import set_span_in_context
        except ImportError as exc:
            raise InvalidConfig(f"traces need `pip install 'bitneck[traces]'` ({exc})") from exc
        self._extract = extract
        self._inside = set_span_in_context
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: _NAME}), sampler=ParentBasedTraceIdRatio(ratio)
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http:"), timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_NAME)

    def parent(self, metadata: Any) -> "Context | None":
        """The caller's trace, from a call's metadata."""
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        return self._extract(carrier)

    def frame(
        self, model: str, point: str, seq: int, received: float, done: "Computed", parent: "Context | None"
    ) -> None:
        """One span and its children, with the times that were measured."""
        begin, end = round(received * 1e9), time.time_ns()
        span = self._tracer.start_span(
            "frame",
            context=parent,
            start_time=begin,
            attributes={
                "bitneck.model": model,
                "bitneck.point": point,
                "bitneck.seq": seq,
                "bitneck.batch": done.batch,
            },
        )
        if span.is_recording():
            inside, at = self._inside(span), begin
            for name, micros in (("wait", done.queued_us), ("decode", done.decode_us), ("compute", done.compute_us)):
                child = self._tracer.start_span(name, context=inside, start_time=at)
                at += micros * 1000
                child.end(end_time=at)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""
        self._provider.shutdown()


def open_traces(endpoint: str, ratio: float) -> FrameTracer:
    """Traces to a collector; none if the endpoint is empty.

    Raises:
        InvalidConfig: see `OtlpTraces`.
    """
    return OtlpTraces(endpoint, ratio) if endpoint else NoTraces()
