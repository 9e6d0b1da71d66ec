"""``bitneck-models train --dry-run``: what the training will take, as a table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bitneck.text_tables import make_table, print_table
from bitneck_models.measure.forecast import forecast
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.photo_sets import PhotoSets
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import UnitRecipe

__all__ = ["print_forecast"]


def print_forecast(
    entry: ZooEntry,
    units: Sequence[UnitRecipe],
    backbone: Backbone,
    sets: PhotoSets,
    runs: Path,
    device: str,
) -> None:
    """Print what the training of some units will take."""
    names = ("unit", "features", "missing", "features, min", "training, min", "disk, MB", "memory, MiB")
    table = make_table(*names, text=("unit",))
    console = Console(stderr=True)
    known: set[tuple[str, int]] = set()
    totals = [0.0, 0.0, 0.0]
    for unit in units:
        training = entry.recipe.training_of(unit)
        console.print(f"trying {unit.id} ...", markup=False, highlight=False, soft_wrap=True)
        found = forecast(unit, training, backbone, sets, runs, device=device, known=known)
        known.add((unit.split, training.seed))
        row = found.features_s / 60, found.training_s / 60, found.disk_bytes / 1e6
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        table.add_row(
            unit.id, f"{found.views:,}", f"{found.missing:,}", *(f"{value:,.1f}" for value in row),
            f"{found.memory_mib:,.0f}",
        )  # fmt: skip
    table.add_row("all", "", "", *(f"{value:,.1f}" for value in totals), "")
    print_table(table)
