"""Pictures of the results: rate and accuracy, encoder size, and one for each study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitneck_models.report.curves import STUDIES, Curve, Results, Sample
from bitneck_models.report.peers import PEERS, PEERS_KEY

__all__ = ["draw"]


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


def _accuracy(results: Results) -> Any:
    figure, (axis,) = _axes(results, width=9.0)
    colours = {name: f"C{k}" for k, (name, _) in enumerate(results.ladder_curves)}
    for name, curve in results.ladder_curves:
        _plot(axis, f"bitneck {name}", curve, linewidth=2, color=colours[name])
    free = [f"C{k}" for k in range(len(colours), 10)]
    for name, curve in sorted(results.baselines.items()):
        split = curve[0].extra["split"]
        if not split:  # codecs of pictures, and networks without a split
            free.append(free.pop(0))
            _plot(axis, name, curve, linewidth=1, color=free[-1])
        else:  # in the colour of its split point, and only settings on the Pareto front
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
    """A picture of three quantities: encoder size, data size, accuracy. Peers have other networks: losses compare."""
    from matplotlib.ticker import MultipleLocator

    figure, (axis,) = _axes(results, width=9.0, accuracy=False)
    for name, curve in results.ladder_curves:
        found = [(s.bpp, results.uncompressed - s.accuracy) for s in curve]
        device = (_macs(curve[0], "head") + _macs(curve[0], "encoder")) / 1e6
        sizes = [_macs(s, "encoder") / 1e5 + 12 for s in curve]
        axis.scatter(*zip(*found, strict=True), s=sizes, alpha=0.55, label=f"bitneck {name}: {device:.0f} M in all")
        axis.annotate(
            f"{_macs(curve[-1], 'encoder') / 1e6:.2g} M", found[-1], fontsize=8, xytext=(6, -3),
            textcoords="offset points",
        )  # fmt: skip
    if results.key == PEERS_KEY:
        for peer, marker in zip(PEERS, "v^<osD", strict=True):
            axis.plot(
                *zip(*peer.lost, strict=True), label=f"{peer.name} (theirs, ResNet-50)", marker=marker, markersize=4,
                linewidth=0.7, linestyle=":", color="0.45", fillstyle="none",
            )  # fmt: skip
    axis.set_ylabel(f"{results.metric} lost against the uncompressed network")
    axis.invert_yaxis()
    axis.yaxis.set_major_locator(MultipleLocator(0.02))
    axis.set_title("area and figure: multiply-adds of the encoder; in all: with the head before it")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, markerscale=0.5)
    return figure


def _macs(sample: Sample, part: str) -> int:
    return int(sample.extra["complexity"][part]["multiply_adds"])


def _study(name: str) -> Callable[[Results], Any]:
    """A picture of one study, with a panel for each split point."""

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
