"""The page of results in Markdown: tables, pictures and notes.

Nothing is measured here. Every number on the page is in a JSON document, which names the photographs it is from.
"""

import itertools
from collections.abc import Mapping, Sequence
from textwrap import fill

from bitneck_models.measure.intervals import RESAMPLES
from bitneck_models.report.curves import IMAGE_CODECS, STUDIES, Curve, Results, bytes_at, rate_saving
from bitneck_models.report.differences import Difference, compared
from bitneck_models.report.peers import PEERS, PEERS_KEY, PEERS_UNCOMPRESSED

__all__ = ["markdown"]

_COLUMNS = 100


def markdown(
    results: Results,
    commands: str,
    notes: Mapping[str, str],
    pictures: Sequence[str],
    folder: str = "results",
    title: str = "Results",
) -> str:
    """The page of results.

    Args:
        results: see `read_results`.
        commands: the commands that made the results, for a code block.
        notes: notes in Markdown by section, written by hand, on what the figures mean.
        pictures: names of the files that `bitneck_models.report.pictures.draw` wrote.
        folder: folder of the pictures, relative to the page.
        title: title of the page, or of this part of it.
    """
    parts = [
        f"# {title}\n",
        fill(
            f"Written by `bitneck-models report`; every number is in `docs/{folder}/*.json`. Measured on "
            f"{results.images} photographs of `{results.dataset}`, uncompressed {results.metric} "
            f"{_percent(results.uncompressed)}. bpp is per input pixel, bytes are coded payloads. Intervals are 95 %.",
            _COLUMNS,
        )
        + "\n",
        "```console",
        commands.strip(),
        "```\n",
    ]
    sections: list[tuple[str, str, list[str]]] = []
    if results.ladder is not None:
        sections += [
            ("ladder", "The ladder", _ladder(results)),
            ("accuracy", "Against image codecs", _against(results))
            if results.baselines
            else ("accuracy", "Rate and accuracy", ["Image codecs were not measured on these photographs."]),
            ("encoder", "Encoder size, data size, accuracy", _complexity(results)),
        ]
    sections += [
        (name, title, _study_table(results, name)) for name, title in STUDIES.items() if name in results.studies
    ]
    for name, heading, table in sections:
        parts.append(f"## {heading}\n")
        if f"{name}.png" in pictures:
            parts.append(f"![{heading}]({folder}/{name}.png)\n")
        parts += [*table, ""]
        if name in notes:
            parts.append(notes[name].strip() + "\n")
    if results.baselines:
        parts += ["## Every baseline\n", *_baseline_table(results), ""]
    return "\n".join(parts)


def _percent(value: float) -> str:
    return f"{value * 100:.2f} %"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _ladder(results: Results) -> list[str]:
    rows = [
        "| point | payload bytes (5th, 95th percentile) | estimated by its tables | bpp | "
        f"{results.metric} (interval) | lost "
        "against uncompressed (paired) | agreement |",
        "|---|---|---:|---:|---|---|---:|",
    ]
    for _, curve in results.ladder_curves:
        for s in curve:
            e = s.extra
            rows.append(
                _row(
                    f"`{s.name}`",
                    f"{s.payload_bytes:.1f} ({e['payload_bytes_p5']:.0f}, {e['payload_bytes_p95']:.0f})",
                    f"{e['ideal_bytes_mean']:.1f}",
                    f"{s.bpp:.4f}",
                    f"{_percent(s.accuracy)} ({_interval(e[f'{results.key}_interval'])})",
                    f"{_percent(results.uncompressed - s.accuracy)} ({_interval(e[f'{results.key}_lost_interval'])})",
                    _percent(s.agreement),
                )
            )
    return rows


def _interval(interval: Sequence[float]) -> str:
    return " to ".join(f"{value * 100:.1f}" for value in interval)


def _against(results: Results) -> list[str]:
    """For each point, the bytes of the best image codec for the same accuracy."""
    codecs = {name: curve for name, curve in results.baselines.items() if name in IMAGE_CODECS}
    rows = [
        f"| point | bytes | best image codec at the same {results.metric} | its bytes | share |",
        "|---|---:|---|---:|---:|",
    ]
    for _, curve in results.ladder_curves:
        for s in curve:
            needed = {name: value for name, c in codecs.items() if (value := bytes_at(c, s.accuracy)) is not None}
            if not needed:
                rows.append(_row(f"`{s.name}`", f"{s.payload_bytes:.1f}", "none reaches it", "", ""))
                continue
            best = min(needed, key=lambda name: needed[name])
            share = f"1/{needed[best] / s.payload_bytes:.0f}"
            rows.append(_row(f"`{s.name}`", f"{s.payload_bytes:.1f}", best, f"{needed[best]:.0f}", share))
    return rows


def _complexity(results: Results) -> list[str]:
    rows = [
        f"| point | head | encoder | decoder | tail | bytes | {results.metric} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for _, curve in results.ladder_curves:
        for s in curve:
            parts = [
                f"{c['parameters'] / 1e6:.2f} / {c['multiply_adds'] / 1e6:.1f}"
                for c in (s.extra["complexity"][part] for part in ("head", "encoder", "decoder", "tail"))
            ]
            rows.append(_row(f"`{s.name}`", *parts, f"{s.payload_bytes:.1f}", _percent(s.accuracy)))
    rows += ["", "Millions of parameters / millions of multiply-adds for one photograph."]
    return [*rows, *_peers()] if results.key == PEERS_KEY else rows


def _peers() -> list[str]:
    """What peers publish of the same three quantities."""
    rows = [
        "",
        fill(
            "Peers' own figures, not measured here: ResNet-50 on ImageNet's validation set, uncompressed "
            f"{PEERS_UNCOMPRESSED} %. Only what is lost compares with the table above, whose photographs are easier.",
            _COLUMNS,
        ),
        "",
        "| system | source | bpp: top-1 lost, points |",
        "|---|---|---|",
    ]
    for peer in PEERS:
        curve = ", ".join(f"{bpp:g}: {100 * lost:.1f}" for bpp, lost in peer.lost)
        rows.append(_row(f"{peer.name} (theirs)", peer.source, curve))
    return rows


def _study_table(results: Results, name: str) -> list[str]:
    curves = results.studies[name]
    rows = [
        f"| curve | point | bytes | bpp | {results.metric} | agreement | unit's parameters | estimated in training |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, curve in curves.items():
        for s in curve:
            unit = sum(s.extra["complexity"][part]["parameters"] for part in ("encoder", "decoder"))
            trained_at = s.extra.get("unit", s.name) == s.name  # training estimates at the unit's own step alone
            estimated = f"{s.extra['record']['estimated_bytes']:.1f} bytes" if trained_at else ""
            rows.append(
                _row(
                    title,
                    f"`{s.name}`",
                    f"{s.payload_bytes:.1f}",
                    f"{s.bpp:.4f}",
                    _percent(s.accuracy),
                    _percent(s.agreement),
                    f"{unit / 1e6:.3f} M",
                    estimated,
                )
            )
    if len(curves) > 1 and all(s.each is not None for curve in curves.values() for s in curve):
        return rows + _differences(results, curves)
    rows += ["", "Bytes saved at equal agreement, by interpolation (row against column):", ""]
    names = list(curves)
    rows += [_row("", *names), "|" + "---|" * (len(names) + 1)]
    for a in names:
        cells = []
        for b in names:
            same = curves[a][0].extra["split"] == curves[b][0].extra["split"]
            saving = rate_saving(curves[a], curves[b]) if a != b and same else None
            cells.append("" if saving is None else f"{saving * 100:+.0f} %")
        rows.append(_row(a, *cells))
    return rows


def _differences(results: Results, curves: Mapping[str, Curve]) -> list[str]:
    """Every two curves of a study, compared on the same photographs."""
    rows = [
        "",
        fill(
            "Differences over the same photographs, first curve less second: means over the range of log(bytes) that "
            "both cover, in points, and bytes at equal agreement. In brackets the 95 % interval (paired bootstrap, "
            f"{RESAMPLES} resamples of the {results.images} photographs).",
            _COLUMNS,
        ),
        "",
        f"| first | second | {results.metric} | agreement | bytes at equal agreement |",
        "|---|---|---:|---:|---:|",
    ]
    for (a, curve), (b, reference) in itertools.combinations(curves.items(), 2):
        if curve[0].extra["split"] == reference[0].extra["split"]:
            d = compared(curve, reference)
            rows.append(_row(a, b, _points(d.accuracy), _points(d.agreement), _points(d.bytes_share, " %", 0)))
    return rows


def _points(difference: Difference | None, unit: str = "", decimals: int = 1) -> str:
    """A difference of shares in hundredths, with its interval; empty without one."""
    if difference is None:
        return ""
    value, low, high = (f"{100 * v:+.{decimals}f}" for v in (difference.value, *difference.interval))
    return f"{value}{unit} ({low} to {high})"


def _baseline_table(results: Results) -> list[str]:
    rows = [f"| codec | setting | bytes | bpp | {results.metric} | agreement |", "|---|---|---:|---:|---:|---:|"]
    for name, curve in results.baselines.items():
        rows += [
            _row(name, s.name, f"{s.payload_bytes:.0f}", f"{s.bpp:.4f}", _percent(s.accuracy), _percent(s.agreement))
            for s in curve
        ]
    return rows
