"""What `bitneck-edge run` prints: one JSON document, or lines and a table for people."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from bitneck.ladder import Ladder
from bitneck_edge.client import EdgeClient
from bitneck_edge.results import Answer, Failure

__all__ = ["line", "load_table", "points_table", "run_document", "run_table"]

_STAGES = ("wait", "load", "preprocess", "head", "encode", "link", "queued", "decode", "compute", "total")


def run_document(client: EdgeClient, results: Sequence[Answer | Failure]) -> dict[str, Any]:
    """Everything about a run, for ``--json``."""
    answers = [r for r in results if isinstance(r, Answer)]
    failures = [r for r in results if isinstance(r, Failure)]
    summary: dict[str, Any] = {"frames": len(answers), "failed": len(failures), "reconnects": client.reconnects}
    if answers:
        summary |= {
            "payload_bytes_mean": fmean(a.payload_bytes for a in answers),
            "bpp_payload": fmean(a.bpp_payload for a in answers),
            "bpp_wire": fmean(a.bpp_wire for a in answers),
            "ms": {stage: fmean(getattr(a.ms, stage) for a in answers) for stage in _STAGES},
        }
    return {
        "server": client.settings.server,
        "model": client.bundle.manifest.name,
        "bundle_id": client.bundle.bundle_id,
        "session_id": client.session_id,
        "frames": [a.to_dict() for a in answers],
        "failed": [{"file": f.file, "error": str(f.error)} for f in failures],
        "switches": [
            {"after_seq": s.after_seq, "from": s.old, "to": s.new, "reason": s.reason} for s in client.switches
        ],
        "summary": summary,
    }


def line(answer: Answer) -> str:
    """One answer on one line."""
    best = answer.labels[0]
    return (
        f"{answer.seq:>5}  {answer.point:<8} {answer.payload_bytes:>5} bytes  {answer.ms.total:>7.1f} ms  "
        f"{best.score:.3f}  {best.name:<28.28}  {answer.file}"
    )


def run_table(results: Sequence[Answer | Failure]) -> Table:
    """Answers as a table, with the time at the edge, on the link and in the cloud."""
    table = Table("photo", "point", "bytes", "bpp", "label", "score", "edge ms", "link ms", "cloud ms")
    for column in table.columns[2:4] + table.columns[5:]:
        column.justify = "right"
    for result in results:
        if isinstance(result, Failure):
            error = Text(type(result.error).__name__, style="red")
            table.add_row(Text(Path(result.file).name), "", "", "", error, "", "", "", "")
            continue
        ms, best = result.ms, result.labels[0]
        edge, cloud = ms.load + ms.preprocess + ms.head + ms.encode, ms.queued + ms.decode + ms.compute
        table.add_row(
            Text(Path(result.file).name),  # a Text, since a name may look like markup
            result.point,
            str(result.payload_bytes),
            f"{result.bpp_payload:.4f}",
            Text(best.name),
            f"{best.score:.3f}",
            f"{edge:.1f}",
            f"{ms.link:.1f}",
            f"{cloud:.1f}",
        )
    return table


def points_table(ladder: Ladder) -> Table:
    """A ladder, lowest rate first."""
    table = Table("point", "split", "payload bytes", "bpp", "accuracy")
    for column in table.columns[2:]:
        column.justify = "right"
    for p in ladder:
        table.add_row(p.id, p.split, f"{p.payload_bytes:.1f}", f"{p.bpp_payload:.4f}", f"{p.accuracy:.4f}")
    return table


def load_table(document: dict[str, Any]) -> Table:
    """A load's percentiles, from `bitneck_edge.load.summarize`."""
    table = Table("milliseconds", "p50", "p90", "p99", "mean")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in document.get("ms", {}).items():
        table.add_row(name.replace("_", " "), *[f"{values[key]:.2f}" for key in ("p50", "p90", "p99", "mean")])
    return table
