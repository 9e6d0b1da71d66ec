"""The command line ``bitneck-models``."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
