"""The command line ``bitneck-models``."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import bitneck
from bitneck.errors import BitneckError, InvalidConfig

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train, evaluate and export bottleneck units.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Zoo = Annotated[Path, typer.Argument(help="A folder of the zoo, with recipe.toml.", metavar="ZOO")]
Data = Annotated[Path | None, typer.Option(help="The folder of photographs.", envvar="BITNECK_DATA")]
Runs = Annotated[Path, typer.Option(help="For feature caches and checkpoints; several gigabytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Weights = Annotated[Path | None, typer.Option(help="A file of the backbone's weights; else its own.")]


@app.command()
def train(
    zoo: Zoo,
    data: Data = None,
    point: Annotated[list[str] | None, typer.Option(help="Train this point only; repeatable.")] = None,
    runs: Runs = Path("runs"),
    weights: Weights = None,
    again: Annotated[bool, typer.Option("--again", help="Train points that are trained already.")] = False,
) -> None:
    """Train the recipe's operating points; started again, it goes on where it stopped."""
    from bitneck_models.backbones import build_backbone
    from bitneck_models.pipeline import photo_sets, train_point
    from bitneck_models.training import StepReport
    from bitneck_models.zoo import ZooEntry

    entry = ZooEntry(zoo)
    points = [entry.recipe.point(name) for name in point] if point else list(entry.recipe.points)
    trained = {p.id for p in entry.trained()}
    if not again:
        points = [p for p in points if p.id not in trained]
    console = Console(stderr=True)
    if not points:
        console.print(f"every point of {zoo} is trained; use --again to train anew")
        return
    sets = photo_sets(entry.recipe, _data_folder(data))
    backbone = build_backbone(entry.recipe.backbone, weights)
    for item in points:
        if again:
            (runs / entry.recipe.name / f"{item.id}.pt").unlink(missing_ok=True)
        with _progress(console) as progress:
            cache_task = progress.add_task(f"{item.id}: features", total=None)
            train_task = progress.add_task(f"{item.id}: training", total=None)

            def on_features(done: int, total: int, task: object = cache_task) -> None:
                progress.update(task, completed=done, total=total)  # type: ignore[arg-type]

            def on_step(step: StepReport, task: object = train_task, name: str = item.id) -> None:
                text = f"{name}: {step.bits / 8:.1f} bytes, task {step.task:.4f}, lambda {step.lambda_:.0f}"
                progress.update(task, completed=step.step, total=step.steps, description=text)  # type: ignore[arg-type]
                if not console.is_terminal and step.step % 250 == 0:
                    console.print(f"{text}, step {step.step} of {step.steps}")

            record = train_point(entry, item, backbone, sets, runs, on_features=on_features, on_step=on_step)
        console.print(
            f"{item.id}: {record.validation_bytes:.1f} bytes, agreement {record.validation_agreement:.3f} "
            f"on {record.validation_photos} validation photographs"
        )


@app.command()
def export(
    zoo: Zoo,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")],
    images: Annotated[Path | None, typer.Option(help="Photographs for the proof; else generated pictures.")] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Export a zoo entry's trained points as a bundle, and prove that it equals the network."""
    from bitneck_models.backbones import build_backbone
    from bitneck_models.export import export_bundle
    from bitneck_models.photos import proof_images
    from bitneck_models.zoo import ZooEntry

    entry = ZooEntry(zoo)
    backbone = build_backbone(entry.recipe.backbone, weights)
    console = Console(stderr=True)
    with console.status("exporting") as status:
        x = proof_images(backbone.input, images)
        bundle, proof = export_bundle(entry, backbone, out, x, lambda what: status.update(f"exporting: {what}"))
    points = [point.id for point in bundle.manifest.ladder]
    document = {
        "out": str(out),
        "bundle_id": bundle.bundle_id,
        "points": points,
        "bytes": sum(file.size for file in bundle.manifest.files.values()),
        "proof": {"images": len(x), "chain": proof.chain, "encoders": proof.encoders, "decoders": proof.decoders},
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(f"{out}: {', '.join(points)}; differs from torch by at most {proof.worst:.1e}")  # noqa: T201


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    data: Data = None,
    record: Annotated[
        Path | None, typer.Option(help="Write the result into this zoo entry's ladder.json.", metavar="ZOO")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on labelled photographs, through real bytes.

    --data is a folder with labels.csv (file, index) or with one folder for each class (WordNet id, index or label).
    """
    from bitneck.bundle import Bundle
    from bitneck_models.backbones import build_backbone
    from bitneck_models.evaluation import evaluate as measure
    from bitneck_models.photos import labelled_photos
    from bitneck_models.zoo import ZooEntry

    opened = Bundle.open(bundle)
    folder = _data_folder(data)
    wnids = build_backbone(opened.manifest.backbone).wnids
    photos = labelled_photos(folder, wnids, opened.labels())
    console = Console(stderr=True)
    with _progress(console) as progress:
        task = progress.add_task("evaluating", total=len(photos))
        result = measure(opened, photos, progress=lambda done, _all: progress.update(task, completed=done))
    if record is not None:
        ZooEntry(record).save_ladder(result.ladder(folder.resolve().name))
    if as_json:
        print(json.dumps(result.to_dict()))  # noqa: T201
        return
    table = Table("point", "split", "top-1", "agreement", "payload bytes", "bpp", "bpp on the wire")
    for p in result.points:
        table.add_row(
            p.id, p.split, f"{p.top1:.4f}", f"{p.agreement:.4f}", f"{p.payload_bytes_mean:.1f}",
            f"{p.bpp_payload:.4f}", f"{p.bpp_wire:.4f}",
        )  # fmt: skip
    Console().print(table)
    print(f"uncompressed: {result.top1:.4f} on {result.images} photographs")  # noqa: T201


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def _data_folder(data: Path | None) -> Path:
    if data is None:
        raise InvalidConfig("no folder of photographs: give --data or set BITNECK_DATA")
    if not data.is_dir():
        raise InvalidConfig(f"{data}: no such folder of photographs")
    return data


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(bitneck.__version__)  # noqa: T201
        raise typer.Exit


def main() -> None:
    """Run the command line; a `BitneckError` becomes one line on stderr and its exit code."""
    try:
        app()
    except BitneckError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
