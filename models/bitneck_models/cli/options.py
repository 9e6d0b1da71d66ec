"""Options and output that the commands of ``bitneck-models`` share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitneck.errors import InvalidConfig

__all__ = ["Data", "Json", "Runs", "Weights", "Zoo", "data_folder", "dataset_name", "progress_bars"]

Zoo = Annotated[Path, typer.Argument(help="A folder of the zoo, with recipe.toml.", metavar="ZOO")]
Data = Annotated[Path | None, typer.Option(help="The folder of photographs.", envvar="BITNECK_DATA")]
Runs = Annotated[Path, typer.Option(help="Folder for feature caches and checkpoints, several gigabytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="File of the backbone's weights (.pth or .safetensors), or `random`; without it, the publisher's weights."
    ),
]


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Progress bars on a terminal; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def dataset_name(folder: Path) -> str:
    """Name of a data set: its folder's name, with the folder above if the name only says which part it is."""
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in ("train", "val", "test") else path.name


def data_folder(data: Path | None) -> Path:
    """The folder of photographs.

    Raises:
        InvalidConfig: none was named, or it does not exist.
    """
    if data is None:
        raise InvalidConfig("no folder of photographs: give --data or set BITNECK_DATA")
    if not data.is_dir():
        raise InvalidConfig(f"{data}: no such folder of photographs")
    return data
