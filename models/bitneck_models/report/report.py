"""The report: measured results as pictures and Markdown tables.

Results (`bitneck_models.report.curves`)  --draw-->  docs/results/*.png
                                   --markdown-->  docs/results.md

Nothing is measured here. Every number is in one of the JSON documents, which name their data.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitneck_models.report.curves import IMAGE_CODECS, STUDIES, Curve, Results, Sample, bytes_at, rate_saving

__all__ = ["draw", "markdown"]


# Pictures


def draw(results: Results, folder: Path) -> list[str]:
    """Draw every picture that the results allow, as PNG.

    Args:
        results: see `read_results`.
        folder: for the files.

    Returns:
        The names of the files written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    written = []
    for name, paint in _PICTURES.items():
        if results.ladder if name in ("accuracy", "encoder") else name in results.studies:
            figure = paint(results)
            figure.savefig(folder / f"{name}.png", dpi=110)
            written.append(f"{name}.png")
    return written


def _axes(results: Results, panels: int = 1, width: float = 7.0, *, accuracy: bool = True) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(width if panels == 1 else 4.6 * panels, 4.6), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("bits per input pixel (payload)")
        if accuracy:
            axis.axhline(results.uncompressed, color="0.5", linewidth=0.8, linestyle=":")
        axis.grid(visible=True, which="both", color="0.9", linewidth=0.5)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylabel(results.metric)
    return figure, axes


def _plot(axis: Any, name: str, curve: Curve, value: str = "accuracy", **style: Any) -> None:
    axis.plot([s.bpp for s in curve], [getattr(s, value) for s in curve], label=name, marker="o", markersize=4, **style)


def _ladder_of(results: Results) -> Mapping[str, Curve]:
    return results.ladder or {}


def _accuracy(results: Results) -> Any:
    figure, (axis,) = _axes(results, width=9.0)
    colours = {name: f"C{k}" for k, name in enumerate(sorted(_ladder_of(results)))}
    for name, curve in sorted(_ladder_of(results).items()):
        _plot(axis, f"bitneck {name}", curve, linewidth=2, color=colours[name])
    for k, (name, curve) in enumerate(sorted(results.baselines.items())):
        split = curve[0].extra.get("split", "")
        if name in IMAGE_CODECS:
            _plot(axis, name, curve, linewidth=1, color=f"C{len(colours) + k % (10 - len(colours))}")
        else:  # in its split point's colour; only the settings that no other one beats
            line = "--" if len(curve) > 2 else ":"
            _plot(axis, name, _front(curve), linewidth=1, linestyle=line, color=colours.get(split, "0.5"), alpha=0.6)
    axis.set_title(f"{results.images} photographs of {results.dataset}; dotted: uncompressed")
    axis.legend(fontsize=8, loc="lower right", ncols=2)
    return figure


def _front(curve: Curve) -> Curve:
    """The samples that no cheaper sample equals."""
    kept: list[Sample] = []
    for sample in sorted(curve, key=lambda s: s.payload_bytes):
        if not kept or sample.accuracy > kept[-1].accuracy:
            kept.append(sample)
    return tuple(kept)


def _encoder(results: Results) -> Any:
    """A picture of three quantities: encoder size, data size, accuracy."""
    figure, (axis,) = _axes(results, width=8.0)
    for name, curve in sorted(_ladder_of(results).items()):
        sizes = [_macs(s, "encoder") / 1e5 + 12 for s in curve]
        axis.scatter([s.bpp for s in curve], [s.accuracy for s in curve], s=sizes, alpha=0.55, label=name)
        for s in curve:
            axis.annotate(
                f"{_macs(s, 'encoder') / 1e6:.2g} M", (s.bpp, s.accuracy), fontsize=6, xytext=(0, -14),
                textcoords="offset points", ha="center",
            )  # fmt: skip
    axis.set_title("area and figure: multiply-adds of the encoder, after the head's")
    axis.legend(loc="lower right", markerscale=0.4)
    return figure


def _macs(sample: Sample, part: str) -> int:
    return int(sample.extra["complexity"][part]["multiply_adds"])


def _study(name: str) -> Callable[[Results], Any]:
    """A picture of one study: every curve, in a panel for each split point."""

    def paint(results: Results) -> Any:
        curves = results.studies[name]
        splits = sorted({s.extra["split"] for curve in curves.values() for s in curve})
        figure, axes = _axes(results, len(splits), accuracy=False)
        for axis, split in zip(axes, splits, strict=True):
            for title, curve in curves.items():
                if curve[0].extra["split"] == split:
                    _plot(axis, title, curve, "agreement")
            axis.set_title(split)
            axis.legend(fontsize=8, loc="lower right")
        axes[0].set_ylabel("agreement with the uncompressed network")
        return figure

    return paint


_PICTURES: dict[str, Callable[[Results], Any]] = {
    "accuracy": _accuracy,
    "encoder": _encoder,
    **{name: _study(name) for name in STUDIES},
}


# Tables


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
        commands: that made the results, for a code block.
        notes: by section, Markdown: what the figures mean, written by hand.
        pictures: see `draw`.
        folder: of the pictures, seen from the page.
        title: of the page, or of its part.
    """
    parts = [
        f"# {title}\n",
        f"Written by `bitneck-models report`; every number is in `docs/{folder}/*.json`. Measured on "
        f"{results.images} photographs of `{results.dataset}`, uncompressed {results.metric} "
        f"{_percent(results.uncompressed)}. bpp is per input pixel, bytes are coded payloads. Intervals are 95 %.\n",
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
    for curve in _ladder_curves(results):
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


def _ladder_curves(results: Results) -> list[Curve]:
    return [curve for _, curve in sorted(_ladder_of(results).items())]


def _interval(interval: Sequence[float]) -> str:
    return " to ".join(f"{value * 100:.1f}" for value in interval)


def _against(results: Results) -> list[str]:
    """For each point, the bytes of the best image codec for the same accuracy."""
    codecs = {name: curve for name, curve in results.baselines.items() if name in IMAGE_CODECS}
    rows = [
        f"| point | bytes | best image codec at the same {results.metric} | its bytes | share |",
        "|---|---:|---|---:|---:|",
    ]
    for curve in _ladder_curves(results):
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
    for curve in _ladder_curves(results):
        for s in curve:
            parts = [
                f"{c['parameters'] / 1e6:.2f} / {c['multiply_adds'] / 1e6:.1f}"
                for c in (s.extra["complexity"][part] for part in ("head", "encoder", "decoder", "tail"))
            ]
            rows.append(_row(f"`{s.name}`", *parts, f"{s.payload_bytes:.1f}", _percent(s.accuracy)))
    return [*rows, "", "Millions of parameters / millions of multiply-adds for one photograph."]


def _study_table(results: Results, name: str) -> list[str]:
    curves = results.studies[name]
    rows = [
        f"| curve | point | bytes | bpp | {results.metric} | agreement | unit's parameters | estimated in training |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, curve in curves.items():
        for s in curve:
            unit = sum(s.extra["complexity"][part]["parameters"] for part in ("encoder", "decoder"))
            estimated = s.extra["record"]["estimated_bytes"]
            rows.append(
                _row(
                    title,
                    f"`{s.name}`",
                    f"{s.payload_bytes:.1f}",
                    f"{s.bpp:.4f}",
                    _percent(s.accuracy),
                    _percent(s.agreement),
                    f"{unit / 1e6:.3f} M",
                    f"{estimated:.1f} bytes",
                )
            )
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


def _baseline_table(results: Results) -> list[str]:
    rows = [f"| codec | setting | bytes | bpp | {results.metric} | agreement |", "|---|---|---:|---:|---:|---:|"]
    for name, curve in results.baselines.items():
        rows += [
            _row(name, s.name, f"{s.payload_bytes:.0f}", f"{s.bpp:.4f}", _percent(s.accuracy), _percent(s.agreement))
            for s in curve
        ]
    return rows
