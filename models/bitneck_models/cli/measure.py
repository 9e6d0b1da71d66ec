"""``bitneck-models evaluate``, ``baselines`` and ``report``: measurements, and the page that shows them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bitneck.errors import InvalidConfig
from bitneck.manifest import Precision
from bitneck.text_tables import make_table, print_table
from bitneck_models.cli.options import Data, Json, Runs, Weights, data_folder, dataset_name, progress_bars

if TYPE_CHECKING:
    from bitneck.bundle import Bundle
    from bitneck_models.measure.evaluate import Evaluation
    from bitneck_models.measure.judge import BaselinePoint
    from bitneck_models.measure.meter import Metric

__all__ = ["baselines", "evaluate", "report", "show_baselines"]


def evaluate(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    data: Data = None,
    record: Annotated[
        Path | None, typer.Option(help="Write the result to ladder.json of this zoo entry.", metavar="ZOO")
    ] = None,
    zoo: Annotated[
        Path | None,
        typer.Option(help="Add the recipe and training record of each point; `report` needs them.", metavar="ZOO"),
    ] = None,
    ignore_index: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=255,
            help="Segmentation: ignore this index in class maps; repeatable.  \\[default: each that is no class]",
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            help="--no-labels takes any photographs, and measures how often answers are the uncompressed network's."
        ),
    ] = True,
    precision: Annotated[
        Precision, typer.Option(help="Of heads and encoders: int8 where the bundle has it, or float32.")
    ] = "float32",
    also: Annotated[
        list[Path] | None, typer.Option(help="Another folder like --data, measured together with it; repeatable.")
    ] = None,
    each: Annotated[
        bool,
        typer.Option(
            "--each",
            help="Keep what every photograph gave, for the differences between curves in `report`; not for class maps.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a bundle on labelled photographs, or on any, through real bytes.

    For classification, --data has labels.csv (columns file and index), or one folder for each class, named by WordNet
    id, index or label. For segmentation, --data has images/ and labels/ with the same names (PNG of class indices), or
    it is a folder of COCO such as coco/val2017, beside coco/annotations/instances_val2017.json. With --no-labels it is
    a folder of photographs, and --record records the agreement as the points' accuracy.
    """
    from bitneck.bundle import Bundle
    from bitneck_models.fitting.symbols import check_exported
    from bitneck_models.measure.table import evaluation_line, evaluation_table
    from bitneck_models.zoo.entry import ZooEntry, tables_digests

    if precision != "float32" and record is not None:
        raise InvalidConfig("--record is for the points as float32; leave --precision out")
    opened = Bundle.open(bundle)
    for entry in (ZooEntry(folder) for folder in (record, zoo) if folder is not None):
        check_exported(entry, opened, [point.id for point in opened.manifest.points])
    digests = tables_digests(opened)  # before the measurement: another bundle may be written to the folder during it
    folders = [data_folder(data), *(data_folder(folder) for folder in also or ())]
    names = " and ".join(dataset_name(folder) for folder in folders)
    console = Console(stderr=True)
    with progress_bars(console) as progress:
        task = progress.add_task("evaluating", total=None)
        result = _measured(
            opened, folders, ignore_index or [], precision, labels, each,
            lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    if record is not None:
        dataset = names + ("" if labels else ", agreement")
        ZooEntry(record).save_ladder(result.ladder(dataset, digests))
    if as_json:
        document = {"dataset": names} | result.to_dict()
        if zoo is not None:
            document = ZooEntry(zoo).annotated(document)
        print(json.dumps(document, indent=1))  # noqa: T201
        return
    print_table(evaluation_table(result))
    print(evaluation_line(result))  # noqa: T201


def _measured(
    bundle: "Bundle",
    folders: list[Path],
    ignore: list[int],
    precision: Precision,
    labelled: bool,
    each: bool,
    progress: Callable[[int, int], None],
) -> "Evaluation":
    from bitneck_models.measure.agreement import Agreement
    from bitneck_models.measure.evaluate import evaluate as measure
    from bitneck_models.measure.meter import metric_for
    from bitneck_models.networks.vision import imagenet_wnids

    names = bundle.labels()
    if not labelled and ignore:
        raise InvalidConfig("--ignore-index is for class maps, which --no-labels does not read; leave one of them out")
    metric = metric_for(bundle.manifest.task, names, ignore) if labelled else Agreement()
    photos = [photo for folder in folders for photo in metric.photos(folder, imagenet_wnids(names), names)]
    return measure(bundle, photos, metric=metric, precision=precision, each=each, progress=progress)


def baselines(
    data: Data = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="The network: a name or a network recipe. Without it and --zoo, efficientnet_lite0."),
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Measure only this image codec; repeatable.")] = None,
    zoo: Annotated[
        Path | None,
        typer.Option(
            help="Zoo entry with the network. The training-free baseline is fitted to its photographs, and needs it."
        ),
    ] = None,
    train_data: Annotated[Path | None, typer.Option(help="The folder of that recipe's photographs.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Split point for raw features and the training-free baseline; repeatable.")
    ] = None,
    runs: Runs = Path("runs"),
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Measure the baselines: image codecs, raw features, and pooling with principal components."""
    from bitneck_models.measure import baselines as of
    from bitneck_models.measure.meter import metric_for
    from bitneck_models.measure.sweeps import CODECS
    from bitneck_models.networks.registry import build_backbone
    from bitneck_models.training.photo_sets import photo_sets, split_features, table_features
    from bitneck_models.zoo.entry import ZooEntry

    if zoo is not None and backbone is not None:
        raise InvalidConfig(f"--zoo {zoo} names its own network: leave out --backbone {backbone}")
    if zoo is not None:
        net = ZooEntry(zoo).backbone(weights)
    else:
        net = build_backbone(backbone or "efficientnet_lite0", weights)
    folder = data_folder(data)
    metric = metric_for(net.task, net.labels)
    photos = metric.photos(folder, net.wnids, net.labels)
    splits = split or list(net.splits)
    for name in splits:
        net.split_index(name)
    console = Console(stderr=True)
    points = []
    with progress_bars(console) as progress:

        def counter(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        known = {**CODECS, **metric.sweep.codecs}
        codecs = {name: known.get(name, ()) for name in codec or metric.sweep.codecs}
        uncompressed, found = of.image_baselines(
            net, photos, runs / "cache", codecs=codecs, progress=counter("image codecs")
        )
        points += found
        for name in splits:
            points += of.raw_baselines(net, name, photos, runs / "cache", progress=counter(f"{name}: raw features"))
            if zoo is not None:
                sets = photo_sets(ZooEntry(zoo).recipe, data_folder(train_data), net)
                features, _ = split_features(net, name, sets, 0, runs, counter(f"{name}: training features"))
                points += of.training_free(
                    net, name, table_features(features, sets.weights)[::4], photos, runs / "cache",
                    sweep=metric.sweep.training_free, progress=counter(f"{name}: training-free"),
                )  # fmt: skip
    show_baselines(metric, folder, len(photos), uncompressed, points, as_json=as_json)


def show_baselines(
    metric: "Metric[Any]",
    folder: Path,
    images: int,
    uncompressed: float,
    points: "list[BaselinePoint]",
    *,
    as_json: bool,
    **details: object,
) -> None:
    """Print measured baselines: a table, or the document that `report` reads.

    Args:
        metric: of the task.
        folder: of the photographs.
        images: their number.
        uncompressed: accuracy of the uncompressed network.
        points: what was measured.
        as_json: print the document.
        details: what else it says.
    """
    if as_json:
        document = {
            "dataset": dataset_name(folder),
            "images": images,
            "uncompressed": {metric.key: uncompressed},
            **details,
            "baselines": [point.to_dict(metric.key) for point in points],
        }
        print(json.dumps(document, indent=1))  # noqa: T201
        return
    text = ("codec", "split", "setting")
    table = make_table("codec", "split", "setting", "bytes", "bpp", metric.title, "agreement", text=text)
    for p in points:
        table.add_row(
            p.codec, p.split, p.setting, f"{p.bytes_mean:.0f}", f"{p.bpp:.4f}", f"{p.accuracy:.4f}",
            f"{p.agreement:.4f}",
        )  # fmt: skip
    print_table(table)
    print(f"uncompressed: {uncompressed:.4f} on {images} photographs")  # noqa: T201


def report(
    results: Annotated[Path, typer.Argument(help="A folder of documents of `evaluate --zoo` and `baselines`.")],
    out: Annotated[Path, typer.Option(help="The page. Pictures go into the folder of results.")] = Path(
        "docs/results.md"
    ),
) -> None:
    """Draw curves and write tables of measured results. Every folder in the folder is a part of the page."""
    from bitneck_models.report.curves import read_results
    from bitneck_models.report.pictures import draw
    from bitneck_models.report.tables import markdown

    if not results.is_dir():
        raise InvalidConfig(
            f"{results}: no such folder of results; `evaluate --zoo` and `baselines` write them with --json"
        )
    parts, counts = [], [0, 0, 0]
    for folder in (results, *sorted(path for path in results.iterdir() if path.is_dir())):
        found = read_results(folder)
        notes = {path.stem: _text(path) for path in sorted(folder.glob("*.md"))}
        pictures = draw(found, folder)
        place, title = results.resolve().name, "Results"
        if folder != results:
            place, title = f"{place}/{folder.name}", folder.name.capitalize()
        parts.append(markdown(found, notes.pop("commands", ""), notes, pictures, place, title))
        for k, count in enumerate((len(found.studies), len(found.baselines), len(pictures))):
            counts[k] += count
    out.write_text("\n".join(parts), encoding="utf-8")
    print(f"{out}: {counts[0]} studies, {counts[1]} baselines, {counts[2]} pictures")  # noqa: T201


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidConfig(f"{path} is not UTF-8 ({exc.reason} at byte {exc.start}); save it as UTF-8") from exc
