"""``bitneck-models steps`` and ``upgrade``: more operating points of trained units; zoo entries of an older format."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitneck.errors import InvalidConfig
from bitneck.text_tables import make_table, print_table
from bitneck_models.cli.options import Data, Json, Runs, Weights, data_folder, progress_bars

__all__ = ["steps", "upgrade"]


def steps(
    unit: Annotated[
        list[Path], typer.Argument(help="Folders of trained units, such as ZOO/units/s1-r3.", metavar="UNIT...")
    ],
    multiples: Annotated[
        str, typer.Option("--steps", help="Multiples of the step that the unit was trained at, with commas.")
    ] = "1,1.41,2,2.83,4",
    data: Data = None,
    runs: Runs = Path("runs"),
    weights: Weights = None,
    photos: Annotated[int, typer.Option(min=10, help="Training photographs to fit the tables on.")] = 4000,
    as_json: Json = False,
) -> None:
    """Fit tables for more steps of trained units. Export then ships every point that no other one beats."""
    from bitneck_models.training.photo_sets import photo_sets
    from bitneck_models.training.steps import fit_steps
    from bitneck_models.zoo.entry import ZooEntry

    wanted = _numbers(multiples)
    folders = {path.resolve().parent.parent for path in unit}
    if len(folders) != 1 or any(path.resolve().parent.name != "units" for path in unit):
        raise InvalidConfig("name folders of units of one zoo entry, such as models/zoo/efficientnet_lite0/units/s1-r3")
    entry = ZooEntry(folders.pop())
    recipes = [entry.recipe.unit(path.resolve().name) for path in unit]
    backbone = entry.backbone(weights)
    sets = photo_sets(entry.recipe, data_folder(data), backbone)
    console = Console(stderr=True)
    fitted: list[str] = []
    for recipe in recipes:
        with progress_bars(console) as progress:
            tasks = {
                what: progress.add_task(f"{recipe.id}: {what}", total=None)
                for what in ("features", "validation", "steps")
            }
            fitted += fit_steps(
                entry, recipe, wanted, backbone, sets, runs, photos=photos,
                progress=lambda what, done, total: progress.update(tasks[what], completed=done, total=total),  # noqa: B023
            )  # fmt: skip
    points = entry.points()
    beaten = entry.retired(points)
    rows = [
        {
            "point": name, "unit": point.unit, "step": point.step, "bytes": point.validation_bytes,
            "agreement": point.validation_agreement, "new": name in fitted, "beaten_by": beaten.get(name),
        }
        for name, point in sorted(points.items(), key=lambda item: (item[1].split, item[1].validation_bytes))
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"points": rows}))  # noqa: T201
        return
    text, title = ("point", "unit", "ships"), "on the photographs put aside"
    table = make_table("point", "unit", "Q", "bytes", "agreement", "ships", text=text, title=title)
    for r in rows:
        ships = f"no: {r['beaten_by']}" if r["beaten_by"] else "yes"
        table.add_row(
            str(r["point"]), str(r["unit"]), f"{r['step']:.3g}", f"{r['bytes']:.1f}", f"{r['agreement']:.4f}", ships
        )
    print_table(table)


def _numbers(text: str) -> list[float]:
    """The numbers of a list with commas.

    Raises:
        InvalidConfig: it is no such list.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidConfig(f"--steps {text[:80]!r}: expected numbers with commas, such as 1.41,2,2.83") from None


def upgrade(
    zoo: Annotated[Path, typer.Argument(help="A folder of the zoo.", metavar="ZOO")], as_json: Json = False
) -> None:
    """Convert a zoo entry from before units and operating points were two things. Nothing is trained."""
    from bitneck_models.zoo.upgrade import upgrade_entry

    moved = upgrade_entry(zoo)
    if as_json:
        print(json.dumps({"zoo": str(zoo), "units": moved}))  # noqa: T201
    else:
        print(f"{zoo}: {', '.join(moved) if moved else 'nothing to convert'}")  # noqa: T201
