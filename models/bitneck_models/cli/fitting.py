"""``bitneck-models contexts`` and ``similar``: what codes the symbols of operating points in fewer bytes."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitneck.text_tables import make_table, print_table
from bitneck_models.cli.options import Data, Json, Weights, Zoo, data_folder, progress_bars

__all__ = ["contexts", "similar"]

Exported = Annotated[Path, typer.Option("--bundle", help="The bundle that was exported from it.")]
Points = Annotated[list[str] | None, typer.Option("--point", help="Fit to this point only; repeatable.")]


def contexts(
    zoo: Zoo,
    bundle: Exported,
    data: Data = None,
    point: Points = None,
    photos: Annotated[int, typer.Option(min=10, help="Number of training photographs to fit to.")] = 4000,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Fit tables that depend on what is coded already. Export again afterwards, so that the bundle has them.

    They are kept for the points where they save at least 3 % on the photographs that the recipe puts aside.
    """
    from bitneck.bundle import Bundle
    from bitneck_models.fitting.contexts import fit_points
    from bitneck_models.training.photo_sets import photo_sets
    from bitneck_models.zoo.entry import ZooEntry

    entry, exported = ZooEntry(zoo), Bundle.open(bundle)
    points = point or [each.id for each in exported.manifest.ladder]
    sets = photo_sets(entry.recipe, data_folder(data), entry.backbone(weights))
    with progress_bars(Console(stderr=True)) as progress:
        tasks = {what: progress.add_task(what, total=None) for what in ("photographs", "validation", "tables")}
        records, left_out = fit_points(
            entry, exported, points, sets, photos,
            lambda what, done, total: progress.update(tasks[what], completed=done, total=total),
        )  # fmt: skip
    for name in sorted(left_out.keys() & set(point or ())):
        print(f"{name} is left out: {left_out[name]}", file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps({name: record.model_dump(mode="json") for name, record in records.items()}))  # noqa: T201
        return
    title = "bytes, on the photographs put aside"
    table = make_table("point", "tables", "contexts", "saved", "kept", text=("point", "kept"), title=title)
    for name, record in records.items():
        saved = 1 - record.bytes_contexts / record.bytes_factorized
        kept = "yes" if record.contexts_sha256 else "no"
        table.add_row(
            name, f"{record.bytes_factorized:.1f}", f"{record.bytes_contexts:.1f}", f"{100 * saved:.1f} %", kept
        )
    print_table(table)


def similar(
    zoo: Zoo,
    bundle: Exported,
    data: Data = None,
    point: Points = None,
    photos: Annotated[
        int, typer.Option(min=10, help="Number of training photographs from which scenes are made.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
) -> None:
    """Fit the tables that code a frame against an earlier one. Export again afterwards, so that the bundle has them."""
    from bitneck.bundle import Bundle
    from bitneck_models.fitting.conditional import fit_points
    from bitneck_models.fitting.pairs import MOTIONS, scene_photos
    from bitneck_models.zoo.entry import ZooEntry

    entry, exported = ZooEntry(zoo), Bundle.open(bundle)
    points = point or [each.id for each in exported.manifest.ladder]
    for name in points:
        exported.manifest.ladder[name]
    chosen = scene_photos(entry.recipe, data_folder(data), exported.manifest.input, photos, seed)
    console = Console(stderr=True)
    with progress_bars(console) as progress:
        tasks = {what: progress.add_task(what, total=None) for what in ("scenes", "validation", "tables")}

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(tasks[what], completed=done, total=total)

        records = fit_points(entry, exported, points, chosen, seed, on_progress)
    table = make_table("point", *MOTIONS, text=("point",), title="bytes alone, and against the frame before")
    for name, record in records.items():
        cells = [f"{record.bytes_alone[m]:.1f}  {record.bytes_similar[m]:.1f}" for m in MOTIONS]
        table.add_row(name, *cells)
    print_table(table)
