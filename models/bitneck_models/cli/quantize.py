"""``bitneck-models quantize``: int8 files for what a device runs."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitneck.text_tables import make_table, print_table
from bitneck_models.cli.options import Data, Json, Zoo, data_folder, progress_bars

__all__ = ["quantize"]


def quantize(
    zoo: Zoo,
    bundle: Annotated[Path, typer.Option(help="The bundle that was exported from it.")],
    data: Data = None,
    photos: Annotated[int, typer.Option(min=8, help="Number of calibration photographs.")] = 64,
    as_json: Json = False,
) -> None:
    """Find out how to make the int8 files, and prove them. Export again afterwards, so that the bundle has them.

    Calibration uses training photographs, the proof those that the recipe puts aside. A file that costs too many bytes
    or too much agreement as int8 stays float32 alone.
    """
    from bitneck.bundle import Bundle
    from bitneck_models.export.int8 import calibrated, packed
    from bitneck_models.fitting.symbols import check_exported
    from bitneck_models.training.photo_sets import photo_sets, sampled_photos
    from bitneck_models.zoo.entry import ZooEntry

    entry, exported = ZooEntry(zoo), Bundle.open(bundle)
    check_exported(entry, exported, [point.id for point in exported.manifest.points])
    sets = photo_sets(entry.recipe, data_folder(data), entry.backbone())
    chosen = [sets.train[k][0] for k in sampled_photos(sets, photos, seed=0)]
    console = Console(stderr=True)
    with progress_bars(console) as progress:
        tasks = {what: progress.add_task(what, total=None) for what in ("calibration", "float32", "int8")}
        record, roundings = calibrated(
            exported, chosen, sets.validation,
            lambda what, done, total: progress.update(tasks[what], completed=done, total=total),
        )  # fmt: skip
    entry.save_int8(record, packed(roundings))
    if as_json:
        print(json.dumps(record.model_dump(mode="json", exclude={"graphs"})))  # noqa: T201
        return
    table = make_table("point", "bytes", "as int8", "agreement", "as int8", "same symbols", text=("point",))
    for name, p in sorted(record.points.items(), key=lambda item: item[1].bytes_float32):
        table.add_row(
            name, f"{p.bytes_float32:.1f}", f"{p.bytes_int8:.1f}", f"{p.agreement_float32:.4f}",
            f"{p.agreement_int8:.4f}", f"{p.same_symbols:.3f}",
        )  # fmt: skip
    print_table(table)
    for path, reason in record.left_out.items():
        print(f"{path} stays float32: {reason}")  # noqa: T201
