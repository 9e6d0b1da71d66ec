"""A client's state in the words of Prometheus. Names begin with ``bitneck_edge_``; units are base units."""

import platform
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import bitneck
from bitneck_edge.observe.buckets import Buckets
from bitneck_edge.observe.state import ClientState
from bitneck_edge.spool.bounds import SpoolCounts

__all__ = ["Exposition"]


class Exposition(Collector):
    """Metrics of one client, in a registry of its own, read when they are asked for.

    Args:
        state: gives the client's state.
    """

    def __init__(self, state: Callable[[], ClientState]) -> None:
        self._state = state
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Everything as text, version 0.0.4."""
        text: bytes = generate_latest(self._registry)
        return text

    def describe(self) -> Iterable[Metric]:
        """Nothing: the state is not asked for when this is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The metrics at this moment."""
        state = self._state()
        tally = state.tally
        yield _counter("pictures", "Pictures that came from the sources.", tally.pictures)
        yield _counter("answers", "Frames that were answered.", tally.answer.count)
        yield _counter("dropped", "Pictures that newer ones overtook.", state.dropped)
        yield _counter("reconnects", "How often the link was opened again.", state.reconnects)
        yield _counter("point_switches", "Changes of the operating point.", state.switches)
        failures = CounterMetricFamily(
            "bitneck_edge_failures", "Pictures without an answer, by their error.", labels=["error"]
        )
        for name, count in sorted(tally.failures.items()):
            failures.add_metric([name], count)
        yield failures
        link = CounterMetricFamily(
            "bitneck_edge_link_bytes",
            "Bytes on the link with the headers of packets, by a model.",
            labels=["direction"],
        )
        link.add_metric(["up"], state.link.up)
        link.add_metric(["down"], state.link.down)
        yield link
        yield _gauge("unanswered_frames", "Frames that wait for their answer.", state.unanswered)
        yield _gauge("connected", "Whether a connection to the server is up.", state.connected)
        if state.spool is not None:
            yield from _of_spool(state.spool)
        if state.point:
            point = GaugeMetricFamily(
                "bitneck_edge_point", "The operating point of the next frame; always 1.", labels=["point"]
            )
            point.add_metric([state.point], 1)
            yield point
        temperature = GaugeMetricFamily(
            "bitneck_edge_temperature_celsius", "Where the device tells it.", labels=["sensor"]
        )
        for name, value in state.temperatures_c.items():
            temperature.add_metric([name], value)
        yield temperature
        yield _histogram("head_seconds", "The network's head, of an answered frame.", tally.head)
        yield _histogram("encode_seconds", "Encoder, quantizer and range coder, of an answered frame.", tally.encode)
        yield _histogram("answer_seconds", "From picture to answer.", tally.answer)
        info = GaugeMetricFamily("bitneck_edge_info", "What runs here; always 1.", labels=["version", "machine"])
        info.add_metric([bitneck.__version__, platform.machine()], 1)
        yield info


def _of_spool(counts: SpoolCounts) -> Iterable[Metric]:
    yield _counter("spool_spooled", "Frames that were written into the spool.", counts.spooled)
    yield _counter("spool_sent", "Frames of the spool that were answered, or refused for good.", counts.sent)
    yield _counter("spool_dropped", "Frames that fell out of the spool, or could not be kept.", counts.dropped)
    yield _gauge("spool_kept_frames", "Frames that are in the spool.", counts.kept)
    yield _gauge("spool_unknown_frames", "Those whose bundle the server does not have.", counts.unknown)
    yield _gauge("spool_bytes", "Bytes of the spool's files.", counts.bytes)
    yield _gauge("spool_waiting_frames", "Frames that wait in memory for the spool's disk.", counts.waiting)
    yield _gauge("spool_opened", "1 once the spool's files are open; 0 while its disk does not answer.", counts.opened)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"bitneck_edge_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"bitneck_edge_{name}", text, value=value)


def _histogram(name: str, text: str, times: Buckets) -> Metric:
    buckets = [("+Inf" if bound == float("inf") else str(bound), float(count)) for bound, count in times.cumulative()]
    return HistogramMetricFamily(f"bitneck_edge_{name}", text, buckets=buckets, sum_value=times.sum)
