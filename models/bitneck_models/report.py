"""The report: what was measured, as pictures and Markdown tables.

docs/results/*.json  --read_results-->  Results  --draw-->  docs/results/*.png
 (evaluate, baselines)                          --markdown-->  docs/results.md

Nothing is measured here; every number is in one of the JSON documents, which name what they were measured on.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitneck.errors import InvalidConfig

__all__ = ["Curve", "Results", "Sample", "bytes_at", "draw", "markdown", "rate_saving", "read_results"]

IMAGE_CODECS = ("jpeg", "webp", "avif", "heic")
METRICS = {"top1": "top-1", "mean_iou": "mean IoU"}
"""What accuracy is called in documents, and on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured point of a curve."""

    name: str
    payload_bytes: float
    bpp: float
    accuracy: float
    agreement: float
    extra: Mapping[str, Any] = field(default_factory=dict)


Curve = tuple[Sample, ...]
"""In order of rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured on one set of photographs.

    Attributes:
        images: number of photographs.
        dataset: their name.
        uncompressed: accuracy of the network without a unit.
        key: what accuracy is called in the documents, a key of `METRICS`.
        studies: study to curve name to curve; the one that is no known study is the ladder that is shipped, its curves
            the split points.
        baselines: codec to curve.
    """

    images: int
    dataset: str
    uncompressed: float
    key: str
    studies: Mapping[str, Mapping[str, Curve]]
    baselines: Mapping[str, Curve]

    @property
    def metric(self) -> str:
        """What accuracy is called on the page."""
        return METRICS[self.key]

    @property
    def ladder(self) -> Mapping[str, Curve] | None:
        """The curves of the ladder that is shipped, or None."""
        return next((curves for name, curves in self.studies.items() if name not in _STUDIES), None)


def read_results(folder: Path) -> Results:
    """Read every JSON document of a folder.

    Raises:
        InvalidConfig: none there, one that is neither an evaluation with ``--zoo`` nor a set of baselines, or documents
            of different photographs.
    """
    studies: dict[str, dict[str, Curve]] = {}
    baselines: dict[str, Curve] = {}
    measured: set[tuple[str, int, str, float]] = set()
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InvalidConfig(f"{folder}: no results (*.json); `evaluate --zoo` and `baselines` write them with --json")
    for path in paths:
        try:
            document = json.loads(path.read_bytes())
            ((key, uncompressed),) = document["uncompressed"].items()
            measured.add((document["dataset"], document["images"], key, uncompressed))
            samples = _baselines(document, key) if "baselines" in document else _evaluation(document, key)
            if "baselines" in document:
                baselines |= _grouped(samples)
            else:
                studies[document["name"]] = _grouped(samples)
        except (KeyError, TypeError, ValueError) as exc:
            raise InvalidConfig(
                f"{path}: no results of `evaluate --zoo` or `baselines` ({type(exc).__name__}: {exc})"
            ) from exc
    if len(measured) > 1:
        raise InvalidConfig(f"{folder} mixes results of different photographs: {sorted(measured)}")
    dataset, images, key, uncompressed = measured.pop()
    return Results(
        images=images, dataset=dataset, uncompressed=uncompressed, key=key, studies=studies,
        baselines=baselines,
    )  # fmt: skip


def _evaluation(document: Mapping[str, Any], key: str) -> list[tuple[str, Sample]]:
    return [
        (
            p["recipe"]["curve"] or p["split"],
            Sample(
                name=p["id"],
                payload_bytes=p["payload_bytes_mean"],
                bpp=p["bpp_payload"],
                accuracy=p[key],
                agreement=p["agreement"],
                extra=p,
            ),
        )
        for p in document["points"]
    ]


def _baselines(document: Mapping[str, Any], key: str) -> list[tuple[str, Sample]]:
    return [
        (
            f"{p['codec']} {p['split']}".strip(),
            Sample(
                name=p["setting"],
                payload_bytes=p["bytes_mean"],
                bpp=p["bpp"],
                accuracy=p[key],
                agreement=p["agreement"],
                extra={"split": p["split"]},
            ),
        )
        for p in document["baselines"]
    ]


def _grouped(samples: Iterable[tuple[str, Sample]]) -> dict[str, Curve]:
    curves: dict[str, list[Sample]] = {}
    for name, sample in samples:
        curves.setdefault(name, []).append(sample)
    return {name: tuple(sorted(curve, key=lambda s: s.payload_bytes)) for name, curve in curves.items()}


def bytes_at(curve: Curve, accuracy: float) -> float | None:
    """Bytes that a curve takes to reach an accuracy, by log-linear interpolation of its rising envelope.

    Returns:
        None where it never does; the first point's bytes where that is accurate enough already.
    """
    best = -1.0
    before: Sample | None = None
    for sample in curve:
        if sample.accuracy >= accuracy:
            if before is None:
                return sample.payload_bytes
            t = (accuracy - before.accuracy) / (sample.accuracy - before.accuracy)
            low, high = math.log(before.payload_bytes), math.log(sample.payload_bytes)
            return math.exp(low + t * (high - low))
        if sample.accuracy > best:
            best, before = sample.accuracy, sample
    return None


def rate_saving(curve: Curve, reference: Curve) -> float | None:
    """Mean share of bytes that a curve saves against another at equal agreement, where both reach it.

    As Bjontegaard's delta rate, with linear interpolation of log(bytes) over agreement in place of a cubic.

    Returns:
        0.1 for a tenth fewer bytes; None where the two have no agreement in common.
    """
    (a_x, a_y), (b_x, b_y) = (_by_agreement(c) for c in (curve, reference))
    low, high = max(a_x[0], b_x[0]), min(a_x[-1], b_x[-1])
    if not low < high:
        return None
    grid = np.linspace(low, high, 100)
    difference = np.interp(grid, a_x, a_y) - np.interp(grid, b_x, b_y)
    return float(1 - math.exp(difference.mean()))


def _by_agreement(curve: Curve) -> tuple[list[float], list[float]]:
    """Agreement and log(bytes) of a curve's rising envelope."""
    x: list[float] = []
    y: list[float] = []
    for sample in curve:
        if not x or sample.agreement > x[-1]:
            x.append(sample.agreement)
            y.append(math.log(sample.payload_bytes))
    return x, y


# Pictures


def draw(results: Results, folder: Path) -> list[str]:
    """Draw every picture that the results allow, as PNG.

    Args:
        results: see `read_results`.
        folder: where to.

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
    """The samples that no cheaper one equals."""
    kept: list[Sample] = []
    for sample in sorted(curve, key=lambda s: s.payload_bytes):
        if not kept or sample.accuracy > kept[-1].accuracy:
            kept.append(sample)
    return tuple(kept)


def _encoder(results: Results) -> Any:
    """Three ways at once: encoder size, data size, accuracy."""
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


_STUDIES = {
    "rate_terms": "Rate terms: hyperprior and l1",
    "supervision": "Supervised and unsupervised",
    "layers": "Layers to distil from (Fig. 4 of the paper)",
    "topologies": "Topologies (Table 3 of the paper)",
}
_PICTURES: dict[str, Callable[[Results], Any]] = {
    "accuracy": _accuracy,
    "encoder": _encoder,
    **{name: _study(name) for name in _STUDIES},
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
        (name, title, _study_table(results, name)) for name, title in _STUDIES.items() if name in results.studies
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
    """For each point, what the best image codec needs for the same accuracy."""
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
