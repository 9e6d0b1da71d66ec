"""Prometheus metrics of the server: base units, low cardinality; no label ever holds a client, session or seq."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from bitneck.wire.link_bytes import LinkBytes

__all__ = ["OPENMETRICS_TYPE", "TEXT_TYPE", "Metrics"]

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 64)
_BYTES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)


class Metrics:
    """Counters of one server, in a registry of its own.

    A frame's ``outcome`` is ``OK``, ``RESENT`` (answered from memory), ``GONE`` (its client went away), or the gRPC
    status of its fault.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[object, ...], Any] = {}  # `labels` takes a lock and builds strings at each call

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"bitneck_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"bitneck_{name}", text, ("model",), buckets=buckets, registry=self.registry)

        self._frames = counter("frames", "Frames, by what became of them.", "model", "outcome")
        self._points = counter("point_frames", "Accepted frames, by operating point.", "model", "point")
        self._bytes = counter(
            "payload_bytes", "Payload bytes of accepted frames, by operating point.", "model", "point"
        )
        self._link = counter(
            "link_bytes",
            "Bytes on devices' links with the headers of packets, by a model.",
            "model",
            "direction",
        )
        self._messages = counter("message_bytes", "Bytes of messages that gRPC was given.", "model", "direction")
        self._similar = counter("similar_frames", "Accepted frames that are coded against an earlier one.", "model")
        self._switches = counter("point_switches", "Frames at another operating point than the one before.", "model")
        self._sessions = counter("sessions", "Sessions, by how they began.", "model", "how")
        self._reloads = counter("reloads", "Reloads of a model, by outcome.", "model", "outcome")
        self._published = counter("published_answers", "Answers that subscribers can get.", "model")
        self._missed = counter("missed_answers", "Answers that subscribers were told they can get no more.")
        self._refused = counter("refused_calls", "Calls refused before any work.", "reason")
        self._wait = histogram("queue_wait_seconds", "From a frame's submission to its batch.", _SECONDS)
        self._decode = histogram("decode_seconds", "Range decoding of one frame.", _SECONDS)
        self._compute = histogram("compute_seconds", "Bottleneck decoders and tail, one pass.", _SECONDS)
        self._batch = histogram("batch_frames", "Frames in one pass.", _BATCH)
        self._payload = histogram("frame_payload_bytes", "Payload of a frame.", _BYTES)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A value that is read when metrics are asked for."""
        Gauge(f"bitneck_{name}", text, registry=self.registry).set_function(value)

    def _of(self, metric: Counter | Histogram, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def frame(self, model: str, outcome: str) -> None:
        """A frame's end."""
        self._of(self._frames, model, outcome).inc()

    def accepted(
        self, model: str, point: str, payload_bytes: int, *, switched: bool = False, similar: bool = False
    ) -> None:
        """A frame that will be computed."""
        self._of(self._points, model, point).inc()
        self._of(self._bytes, model, point).inc(payload_bytes)
        self._of(self._payload, model).observe(payload_bytes)
        if similar:
            self._of(self._similar, model).inc()
        if switched:
            self._of(self._switches, model).inc()

    def link(self, model: str, link: LinkBytes, messages: LinkBytes) -> None:
        """What has crossed a device's link since the last call for its session."""
        for direction in ("up", "down"):
            self._of(self._link, model, direction).inc(getattr(link, direction))
            self._of(self._messages, model, direction).inc(getattr(messages, direction))

    def waited(self, model: str, seconds: float) -> None:
        """A frame was taken into a batch."""
        self._of(self._wait, model).observe(seconds)

    def decoded(self, model: str, seconds: float) -> None:
        """A frame was decoded."""
        self._of(self._decode, model).observe(seconds)

    def computed(self, model: str, frames: int, seconds: float) -> None:
        """A pass is done."""
        self._of(self._batch, model).observe(frames)
        self._of(self._compute, model).observe(seconds)

    def session(self, model: str, how: str) -> None:
        """A stream was opened: ``new``, ``resumed``, or ``adopted`` from another replica."""
        self._sessions.labels(model, how).inc()

    def reload(self, model: str, outcome: str) -> None:
        """A model was reloaded: ``ok``, ``unchanged`` or ``failed``."""
        self._reloads.labels(model, outcome).inc()

    def refused(self, reason: str) -> None:
        """A call was refused before any work."""
        self._refused.labels(reason).inc()

    def published(self, model: str, answers: int) -> None:
        """Answers of a pass can be had by subscribers."""
        self._of(self._published, model).inc(answers)

    def missed_answers(self, answers: int) -> None:
        """A subscriber was told that it can get some answers no more."""
        self._missed.inc(answers)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition, and its content type.

        Args:
            accept: the request's ``Accept`` header; OpenMetrics where it asks for it.
        """
        if "application/openmetrics-text" in accept:
            return bytes(generate_openmetrics(self.registry)), OPENMETRICS_TYPE  # type: ignore[no-untyped-call]
        text: bytes = generate_latest(self.registry)
        return text, TEXT_TYPE
