"""What `bitneck-edge run` prints: one JSON document, or lines and a table for people."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bitneck.ladder import Ladder
from bitneck.text import counted, sized
from bitneck.text_tables import make_table
from bitneck_edge.answers.results import Answer, Failure, Segmentation
from bitneck_edge.client import EdgeClient
from bitneck_edge.measure.memory import peak_mib
from bitneck_edge.observe.buckets import FINE_S, Buckets
from bitneck_edge.spool.bounds import SpoolCounts

__all__ = [
    "CSV_NAMES", "RunSummary", "bench_table", "csv_row", "line", "link_table", "load_table", "points_table",
    "run_document", "run_table", "spool_line",
]  # fmt: skip

_STAGES = ("wait", "load", "preprocess", "head", "encode", "link", "queued", "decode", "compute", "total")
_MEANS = ("payload_bytes", "message_bytes", "link_bytes_up", "link_bytes_down", "bpp_payload", "bpp_wire")
_CLASSES = 3
"""Classes of an answer that are printed."""
_PLAIN = (
    "file", "seq", "point", "split", "payload_bytes", "reference", "message_bytes", "link_bytes_up", "link_bytes_down",
    "bpp_payload",
)  # fmt: skip
CSV_NAMES = (*_PLAIN, *(f"{stage}_ms" for stage in _STAGES), "answer", "share", "spool", "captured", "error")
"""Columns of ``run --csv``."""


class RunSummary:
    """Sums over a run. No result is kept, so that a run may be endless.

    Attributes:
        answers: pictures that were answered.
        failures: those that were not.
        lost: those of them that came when the server was given up.
    """

    def __init__(self) -> None:
        self.answers = 0
        self.lost = 0
        self.failures = 0
        self._worst = 0
        self._begin = time.perf_counter()
        self._cpu = time.process_time()
        self._sums: Counter[str] = Counter()
        self._points: Counter[str] = Counter()
        self._latency = Buckets(FINE_S)

    @property
    def exit_code(self) -> int:
        """0 if all was answered, 1 if some was not; if nothing was, that of the worst error."""
        return min(self._worst, 1) if self.answers else self._worst

    def begin(self) -> None:
        """The session is open: fetching and loading are over, and times count from now on."""
        self._begin, self._cpu = time.perf_counter(), time.process_time()

    def add(self, result: Answer | Failure) -> None:
        """Count a result."""
        if isinstance(result, Failure):
            self.failures += 1
            self._worst = max(self._worst, result.error.exit_code)
            return
        if result.spool:  # its times are not known, and the client counts it
            return
        self.answers += 1
        self._points[result.point] += 1
        for name in _MEANS:
            self._sums[name] += getattr(result, name)
        if result.segmentation is not None:
            self._sums["map_bytes"] += result.segmentation.map_bytes
        for stage in _STAGES:
            self._sums[stage] += getattr(result.ms, stage)
        self._latency.add(result.ms.total / 1e3)

    def line(self, client: EdgeClient) -> str:
        """The run in one line, for people."""
        seconds, link = time.perf_counter() - self._begin, client.link_bytes
        frames, through = self.answers + self.failures, ""
        if client.spool is not None:
            left = max(0, client.tally.pictures - frames)  # what failed in the spool may be of an earlier run
            frames, through = frames + left, f", {left} left to the spool"
        answered = f"{self.answers} answered{' at once' if through else ''}"
        parts = [f"{counted(frames, 'frame')}: {answered}{through}, {self.failures} failed, {client.dropped} dropped"]
        if self.answers:
            p50, p95 = (1e3 * self._latency.quantile(q) for q in (0.5, 0.95))
            parts += [f"{self.answers / seconds:.1f} a second", f"latency p50 {p50:.0f} ms, p95 {p95:.0f} ms"]
        parts.append(f"link {sized(link.up)} up, {sized(link.down)} down")
        if client.reconnects:
            parts.append(f"{client.reconnects} reconnects")
        return "; ".join(parts)

    def to_dict(self, client: EdgeClient) -> dict[str, Any]:
        """For JSON: counts, means, and milliseconds of processor time for each frame."""
        seconds = time.perf_counter() - self._begin
        summary: dict[str, Any] = {
            "frames": self.answers,
            "failed": self.failures,
            "dropped": client.dropped,
            "reconnects": client.reconnects,
            "peak_mb": peak_mib(),
        }
        if client.spool is not None:
            summary["spool"] = {"id": client.spool_id, **asdict(client.spool)}
        if self.answers:
            mean = {name: value / self.answers for name, value in self._sums.items()}
            summary |= {
                "frames_per_s": self.answers / seconds,
                "cpu_ms": (time.process_time() - self._cpu) * 1e3 / self.answers,
                "payload_bytes_mean": mean["payload_bytes"],
                "message_bytes_mean": mean["message_bytes"],
                "link_bytes_up_mean": mean["link_bytes_up"],
                "link_bytes_down_mean": mean["link_bytes_down"],
                "bpp_payload": mean["bpp_payload"],
                "bpp_wire": mean["bpp_wire"],
                "points": dict(self._points),
                "ms": {stage: mean[stage] for stage in _STAGES},
                "total_ms": {f"p{q}": 1e3 * self._latency.quantile(q / 100) for q in (50, 95)},
                "link_bytes": {"up": round(client.link_bytes.up), "down": round(client.link_bytes.down)},
            }
            if "map_bytes" in mean:
                summary["map_bytes_mean"] = mean["map_bytes"]
        return summary


def run_document(client: EdgeClient, results: Sequence[Answer | Failure], summary: RunSummary) -> dict[str, Any]:
    """Everything about a run, for ``--json``."""
    return {
        "server": client.settings.server,
        "model": client.bundle.manifest.name,
        "bundle_id": client.bundle.bundle_id,
        "session_id": client.session_id,
        "frames": [r.to_dict() for r in results if isinstance(r, Answer)],
        "failed": [{"file": r.file, "error": str(r.error)} for r in results if isinstance(r, Failure)],
        "switches": [
            {"after_seq": s.after_seq, "from": s.old, "to": s.new, "reason": s.reason} for s in client.switches
        ],
        "summary": summary.to_dict(client),
    }


def csv_row(result: Answer | Failure) -> dict[str, Any]:
    """A result as a line of ``run --csv``: `answer` is the best label or the largest class, `share` its score."""
    if isinstance(result, Failure):
        return {"file": result.file, "error": str(result.error)}
    row = {name: getattr(result, name) for name in _PLAIN}
    row |= {f"{stage}_ms": round(getattr(result.ms, stage), 3) for stage in _STAGES}
    if result.spool:
        row |= {name: result.to_dict()[name] for name in ("spool", "captured")}
    if result.segmentation is not None and result.segmentation.classes:
        row |= {"answer": result.segmentation.classes[0].name, "share": result.segmentation.classes[0].share}
    elif result.labels:
        row |= {"answer": result.labels[0].name, "share": result.labels[0].score}
    return row


def line(answer: Answer) -> str:
    """One answer on one line."""
    if answer.spool:
        found = _shares(answer.segmentation) if answer.segmentation else "".join(x.name for x in answer.labels[:1])
        start = f"{answer.seq:>5}  {answer.point:<8} {answer.payload_bytes:>5} bytes"
        return f"{start}  spooled {answer.to_dict()['captured']}  {found:<28.28}  {answer.file}"
    start = f"{answer.seq:>5}  {answer.point:<8} {answer.payload_bytes:>5} bytes"
    if answer.segmentation is not None:
        back = f"{answer.segmentation.map_bytes:>6} back"
        return f"{start} {back}  {answer.ms.total:>7.1f} ms  {_shares(answer.segmentation):<44}  {answer.file}"
    if not answer.labels:
        return f"{start}  {answer.ms.total:>7.1f} ms  {'acknowledged':<44}  {answer.file}"
    best = answer.labels[0]
    return f"{start}  {answer.ms.total:>7.1f} ms  {best.score:.3f}  {best.name:<28.28}  {answer.file}"


def spool_line(counts: SpoolCounts) -> str:
    """What became of the frames of a spool, on one line; empty if there were none."""
    if not counts.opened:
        lost = counts.waiting + counts.dropped
        return "spool: not opened, because its disk did not answer" + (
            f"; {counted(lost, 'frame')} lost" if lost else ""
        )
    if not any((counts.spooled, counts.sent, counts.kept, counts.dropped, counts.damaged, counts.waiting)):
        return ""
    unknown = f", {counts.unknown} of them of a bundle that the server does not have" if counts.unknown else ""
    damaged = f", {counted(counts.damaged, 'damaged place')}" if counts.damaged else ""
    waiting = f", {counts.waiting} lost that its disk has not taken" if counts.waiting else ""
    return (
        f"spool: {counted(counts.spooled, 'frame')} in, {counts.sent} answered, {counts.kept} kept{unknown}, "
        f"{counts.dropped} fell out{waiting}{damaged}"
    )


def _shares(segmentation: Segmentation) -> str:
    """The largest classes, with their shares of the photograph."""
    return ", ".join(f"{one.name:.20} {one.share:.0%}" for one in segmentation.classes[:_CLASSES])


def run_table(results: Sequence[Answer | Failure]) -> Table:
    """Answers as a table, with the times at the edge, on the link and in the cloud."""
    segmented = any(isinstance(result, Answer) and result.segmentation is not None for result in results)
    answer = ("back", "classes") if segmented else ("label", "score")
    names = ("photo", "point", "bytes", "bpp", *answer, "edge ms", "link ms", "cloud ms")
    table = make_table(*names, text=("photo", "point", "label", "classes"))
    for result in results:
        if isinstance(result, Failure):
            error = Text(type(result.error).__name__, style="red")
            table.add_row(
                Text(Path(result.file).name), "", "", "", *(("", error) if segmented else (error, "")), "", "", ""
            )
            continue
        ms = result.ms
        edge, cloud = ms.load + ms.preprocess + ms.head + ms.encode, ms.queued + ms.decode + ms.compute
        table.add_row(
            # a Text, because a name may look like markup
            Text(Path(result.file).name + (" (spooled)" if result.spool else "")),
            result.point,
            str(result.payload_bytes),
            f"{result.bpp_payload:.4f}",
            *_answer_cells(result),
            f"{edge:.1f}",
            f"{ms.link:.1f}",
            f"{cloud:.1f}",
        )
    return table


def _answer_cells(answer: Answer) -> tuple[str | Text, str | Text]:
    """The two columns of the network's answer."""
    if answer.segmentation is not None:
        return str(answer.segmentation.map_bytes), Text(_shares(answer.segmentation))
    if not answer.labels:
        return Text("acknowledged"), ""
    best = answer.labels[0]
    return Text(best.name), f"{best.score:.3f}"


def points_table(ladder: Ladder) -> Table:
    """A ladder, lowest rate first."""
    table = make_table("point", "split", "payload bytes", "bpp", "accuracy", text=("point", "split"))
    for p in ladder:
        measured = (f"{p.payload_bytes:.1f}", f"{p.bpp_payload:.4f}", f"{p.accuracy:.4f}")
        table.add_row(p.id, p.split, *(measured if p.payload_bytes else ("not measured", "", "")))
    return table


def load_table(document: dict[str, Any]) -> Table:
    """The percentiles of a load, from `bitneck_edge.measure.load_generator.summarize`."""
    table = make_table("milliseconds", "p50", "p90", "p99", "mean", text=("milliseconds",))
    for name, values in document.get("ms", {}).items():
        table.add_row(name.replace("_", " "), *[f"{values[key]:.2f}" for key in ("p50", "p90", "p99", "mean")])
    return table


def bench_table(document: dict[str, Any]) -> Table:
    """The medians of `bitneck_edge.measure.bench.bench`."""
    names = ("split", "point", "load", "prepare", "head", "encode", "total", "p95", "CPU", "bytes")
    table = make_table(*names, text=("split", "point"), title="milliseconds, medians")
    for split in document["splits"]:
        ms = split["ms"]
        table.add_row(
            split["split"],
            split["point"],
            *[f"{ms[stage]:.1f}" for stage in ("load", "preprocess", "head", "encode", "total", "total_p95")],
            f"{split['cpu_ms']:.1f}",
            f"{split['payload_bytes_mean']:.0f}",
        )
    return table


def link_table(document: dict[str, Any]) -> Table:
    """The link bytes of `bitneck_edge.measure.bench.bench`."""
    ways = document["splits"][0]["link"]
    title = "bytes of a frame on the link, up / down, five a second"
    table = make_table("split", "payload", *ways, text=("split",), title=title)
    for split in document["splits"]:
        cells = [f"{way['up']:.0f} / {way['down']:.0f}" for way in split["link"].values()]
        table.add_row(split["split"], f"{split['payload_bytes_mean']:.0f}", *cells)
    return table
