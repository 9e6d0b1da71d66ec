"""The command line ``bitneck-models``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bitneck.errors import ModelFailure
from bitneck.settings.program import make_app, run_app
from bitneck.text_tables import make_table, print_table
from bitneck_models.cli.fitting import contexts, similar
from bitneck_models.cli.learned import learned
from bitneck_models.cli.measure import baselines, evaluate, report
from bitneck_models.cli.new import new
from bitneck_models.cli.options import Data, Json, Runs, Weights, Zoo, data_folder, progress_bars
from bitneck_models.cli.quantize import quantize
from bitneck_models.cli.spic import import_spic
from bitneck_models.cli.steps import steps, upgrade

if TYPE_CHECKING:
    from bitneck_models.networks.backbone import Backbone
    from bitneck_models.training.parallel import World
    from bitneck_models.training.photo_sets import PhotoSets
    from bitneck_models.zoo.entry import ZooEntry
    from bitneck_models.zoo.recipe import UnitRecipe

__all__ = ["app", "main"]

_TELL_EVERY = 250
"""Steps between two lines, where no bar is drawn."""
_SHORT_OF_TARGET = 0.85
"""A unit that codes fewer bytes than this share of its target cannot use what it may spend."""

app = make_app("Train, evaluate and export bottleneck units.")

for _command in (new, steps, contexts, similar, quantize, import_spic, evaluate, baselines, learned, report, upgrade):
    app.command()(_command)


@app.command()
def train(
    zoo: Zoo,
    data: Data = None,
    unit: Annotated[
        list[str] | None, typer.Option("--unit", "--point", help="Train this unit only; repeatable.")
    ] = None,
    runs: Runs = Path("runs"),
    weights: Weights = None,
    again: Annotated[bool, typer.Option("--again", help="Train units again that are trained already.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, max=256, help="Processes that read photographs, where a recipe streams them.")
    ] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing; try a few updates and say what training will take.")
    ] = False,
) -> None:
    """Train the recipe's units. Interrupted training resumes from its last checkpoint."""
    folder = data_folder(data)  # before torch, which takes seconds
    from bitneck_models.cli.forecast import print_forecast
    from bitneck_models.training.parallel import joined
    from bitneck_models.training.photo_sets import photo_sets
    from bitneck_models.training.run import choose_device
    from bitneck_models.zoo.entry import ZooEntry

    entry = ZooEntry(zoo)
    units = [entry.recipe.unit(name) for name in unit] if unit else list(entry.recipe.units)
    edited = {p.id: keys for p in entry.trained() if (keys := entry.edited(p))}
    trained = {p.id for p in entry.trained()} - edited.keys()
    if not again:
        units = [u for u in units if u.id not in trained]
    console = Console(stderr=True)
    for item in units:
        if item.id in edited:
            console.print(f"{item.id}: its recipe was edited ({', '.join(edited[item.id])}), so it is trained anew")
    if not units:
        console.print(f"every unit of {zoo} is trained; use --again to train anew")
        return
    backbone = entry.backbone(weights)
    sets = photo_sets(entry.recipe, folder, backbone)
    place = choose_device(device)
    for item in units:
        for warning in entry.recipe.warnings(item):
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        print_forecast(entry, units, backbone, sets, runs, place)
        return
    with joined(place) as (world, own_place):
        console.quiet = not world.leads
        for item in units:
            _train_one(
                entry, item, backbone, sets, runs, console,
                again=again, edited=item.id in edited, device=own_place, workers=workers, world=world,
            )  # fmt: skip


def _train_one(
    entry: "ZooEntry",
    item: "UnitRecipe",
    backbone: "Backbone",
    sets: "PhotoSets",
    runs: Path,
    console: Console,
    *,
    again: bool,
    edited: bool,
    device: str,
    workers: int,
    world: "World",
) -> None:
    """Train one unit, and show how it goes."""
    from bitneck_models.training.point import train_point
    from bitneck_models.training.unit import StepReport, belongs_to

    checkpoint = runs / entry.recipe.name / f"{item.id}.pt"
    stale = again or (edited and not belongs_to(checkpoint, item, entry.recipe.training_of(item)))
    world.wait()  # until all have looked
    if stale and world.leads:
        checkpoint.unlink(missing_ok=True)
    world.wait()
    began = time.monotonic()
    photographs = entry.recipe.training_of(item).batch
    with progress_bars(console) as progress:
        cache_task = progress.add_task(f"{item.id}: features", total=None)
        train_task = progress.add_task(f"{item.id}: training", total=None)
        last = [began, 0]

        def on_features(done: int, total: int) -> None:
            progress.update(cache_task, completed=done, total=total)

        def on_step(step: StepReport) -> None:
            text = f"{item.id}: {step.bits / 8:.1f} bytes, task {step.task:.4f}, lambda {step.lambda_:.0f}"
            progress.update(train_task, completed=step.step, total=step.steps, description=text)
            if not console.is_terminal and step.step % _TELL_EVERY == 0:
                now = time.monotonic()
                speed = photographs * (step.step - last[1]) / max(now - last[0], 1e-9)
                rate = f", {speed:.0f} photographs/s" if last[1] else ""
                console.print(f"{text}, step {step.step} of {step.steps}{rate}")
                last[:] = now, step.step

        made, record = train_point(
            entry, item, backbone, sets, runs,
            device=device, workers=workers, on_features=on_features, on_step=on_step, world=world,
        )  # fmt: skip
    console.print(
        f"{item.id}: {record.validation_bytes:.1f} bytes, agreement {record.validation_agreement:.3f} "
        f"on {record.validation_photos} validation photographs"
    )
    if item.target_bytes is not None and made.estimated_bytes < _SHORT_OF_TARGET * item.target_bytes:
        console.print(
            f"warning: {item.id} ends at {made.estimated_bytes:.0f} bytes, below its target of "
            f"{item.target_bytes:g}, though lambda went from {item.lambda_:g} to {made.lambda_final:.3g}: its step "
            f"({item.step:g}) is coarse for this target, or it has too few channels ({item.channels}); try a "
            "smaller step",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command("train-network")
def train_network_command(
    zoo: Annotated[Path, typer.Argument(help="A folder of the zoo, with network.toml.", metavar="ZOO")],
    data: Data = None,
    runs: Runs = Path("runs"),
    again: Annotated[bool, typer.Option("--again", help="Train it again, although it is trained already.")] = False,
) -> None:
    """Train a segmentation network before it is split. Interrupted training resumes from its last checkpoint."""
    folder = data_folder(data)
    from bitneck_models.networks.backbone import NETWORK_FILE
    from bitneck_models.networks.registry import begin_network
    from bitneck_models.training.network import NetworkStep, forget_finished, train_network
    from bitneck_models.zoo.network_training import load_network_training

    recipe = load_network_training(zoo)
    console = Console(stderr=True)
    if (zoo / NETWORK_FILE).is_file() and not again:
        console.print(f"the network of {zoo} is trained; use --again to train anew, its units too then")
        return
    if again:
        forget_finished(recipe, runs)
    backbone = begin_network(recipe.backbone, recipe.seed)
    with progress_bars(console) as progress:
        task = progress.add_task("training", total=recipe.steps)

        def on_step(step: NetworkStep) -> None:
            looked = "" if step.validation_iou is None else f", validation mean IoU {step.validation_iou:.4f}"
            progress.update(task, completed=step.step, description=f"loss {step.loss:.3f}")
            if looked or (not console.is_terminal and step.step % 25 == 0):
                console.print(f"step {step.step} of {step.steps}: loss {step.loss:.3f}{looked}")

        record = train_network(recipe, backbone, folder, zoo, runs, report=on_step)
    if record is not None:
        console.print(
            f"mean IoU {record.validation_iou:.4f} on {record.validation_photos} validation photographs, "
            f"{record.test_iou:.4f} on {record.test_photos} test photographs"
        )


Space = Annotated[Path, typer.Option("--space", help="The search space, a TOML file.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="SQLAlchemy URL of the trials (several machines: PostgreSQL, MySQL); else a SQLite file in --runs."
    ),
]


@app.command()
def search(
    zoo: Zoo,
    space: Space,
    data: Data = None,
    runs: Runs = Path("runs"),
    storage: Storage = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials of the whole search: all workers and earlier runs together.")
    ] = 50,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 1,
    weights: Weights = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Search (S, Cr, lambda, Q) for the best rate-accuracy curve. An interrupted search resumes, also elsewhere."""
    folder = data_folder(data)
    from bitneck_models.search.space import load_space
    from bitneck_models.search.study import describe, open_study
    from bitneck_models.search.worker import prepare, work
    from bitneck_models.training.photo_sets import photo_sets
    from bitneck_models.training.run import choose_device
    from bitneck_models.zoo.entry import ZooEntry

    entry, wanted = ZooEntry(zoo), load_space(space)
    backbone = entry.backbone(weights)
    wanted.check(backbone)
    sets = photo_sets(entry.recipe, folder, backbone)
    place = choose_device(device)
    url = _storage(storage, runs, wanted.name)
    study = open_study(wanted, url)
    console = Console(stderr=True)
    if workers > 1:
        with progress_bars(console) as progress:
            task = progress.add_task(f"{wanted.split}: features", total=None)
            prepare(
                wanted, backbone, sets, runs, lambda done, total: progress.update(task, completed=done, total=total)
            )  # workers that made the caches would be in each other's way
        _spawn(workers, zoo, space, folder, runs, url, trials, weights, device)
        return

    work(
        study, wanted, entry, backbone, sets, runs,
        trials=trials, device=place, on_trial=lambda trial: console.print(describe(trial)),
    )  # fmt: skip


def _storage(storage: str | None, runs: Path, name: str) -> str:
    if storage is not None:
        return storage
    (runs / "search").mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(runs / 'search' / f'{name}.db').resolve()}"


def _spawn(
    workers: int,
    zoo: Path,
    space: Path,
    data: Path,
    runs: Path,
    url: str,
    trials: int,
    weights: Path | None,
    device: str,
) -> None:
    """Start several workers as processes. Each has its share of the cores, and Ctrl-C reaches all of them."""
    command = [
        sys.executable, "-c", "from bitneck_models.cli import main; main()", "search", str(zoo), "--space", str(space),
        "--data", str(data), "--runs", str(runs), "--storage", url, "--trials", str(trials), "--device", device,
        *(["--weights", str(weights)] if weights is not None else []),
    ]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": threads}
    processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]  # noqa: S603  our own command
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()
    if any(codes):
        raise ModelFailure(f"{sum(code != 0 for code in codes)} of {workers} workers failed; see above")


@app.command()
def pareto(
    zoo: Zoo,
    space: Space,
    runs: Runs = Path("runs"),
    storage: Storage = None,
    points: Annotated[int, typer.Option(min=1, help="Number of operating points to pick.")] = 6,
    prefix: Annotated[str, typer.Option(help="Prefix of the new units' ids; PREFIX1 has the lowest rate.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Write the units and the recipe into the zoo entry.")] = False,
    as_json: Json = False,
) -> None:
    """Show a search's front, pick a ladder from it, and write that into a zoo entry."""
    from bitneck_models.search.adopt import adopt
    from bitneck_models.search.front import front, pick_ladder
    from bitneck_models.search.space import load_space
    from bitneck_models.search.study import open_study
    from bitneck_models.zoo.entry import ZooEntry

    wanted, entry = load_space(space), ZooEntry(zoo)
    found = front(open_study(wanted, _storage(storage, runs, wanted.name), create=False))
    picked = [found[i] for i in pick_ladder([(f.bpp, f.agreement) for f in found], points)]
    names = [f"{prefix or wanted.split + '-p'}{k}" for k in range(1, len(picked) + 1)]
    if write:
        adopt(entry, picked, names)
    chosen = dict(zip((f.number for f in picked), names, strict=True))
    rows = [
        {
            "trial": f.number, "point": chosen.get(f.number, ""), "payload_bytes": f.payload_bytes, "bpp": f.bpp,
            "agreement": f.agreement, "stride": f.recipe["stride"], "channels": f.recipe["channels"],
            "lambda": f.recipe["lambda"], "step": f.recipe["step"],
        }
        for f in found
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"study": wanted.name, "written": write, "front": rows}))  # noqa: T201
        return
    table = make_table("trial", "point", "bytes", "bpp", "agreement", "S", "Cr", "lambda", "Q", text=("point",))
    for r in rows:
        table.add_row(
            str(r["trial"]), str(r["point"]), f"{r['payload_bytes']:.1f}", f"{r['bpp']:.4f}", f"{r['agreement']:.4f}",
            str(r["stride"]), str(r["channels"]), f"{r['lambda']:.0f}", f"{r['step']:.2f}",
        )  # fmt: skip
    print_table(table)
    print(f"{len(names)} points {'written to' if write else 'to write with --write into'} {zoo}")  # noqa: T201


@app.command()
def export(
    zoo: Zoo,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")],
    images: Annotated[
        Path | None, typer.Option(help="Photographs for the proof; without them, generated pictures.")
    ] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Export a zoo entry's trained units and their points as a bundle, and prove that it equals the network."""
    from bitneck_models.export.bundle import NOT_MEASURED, export_bundle
    from bitneck_models.export.proof import proof_count, proof_images
    from bitneck_models.zoo.entry import ZooEntry

    entry = ZooEntry(zoo)
    backbone = entry.backbone(weights)
    console = Console(stderr=True)
    with console.status("exporting") as status:

        def tell(what: str) -> None:
            status.update(f"exporting: {what}")
            if not console.is_terminal:
                console.print(f"exporting: {what}", markup=False, highlight=False, soft_wrap=True)

        x = proof_images(backbone.input, images, count=proof_count(backbone.input))
        bundle, proof = export_bundle(entry, backbone, out, x, tell)
    points = [point.id for point in bundle.manifest.ladder]
    unmeasured = [point.id for point in bundle.manifest.points if point.dataset == NOT_MEASURED]
    if unmeasured:
        console.print(
            f"{', '.join(unmeasured)}: not measured, or not since trained; rate control leaves them out until you run "
            f"`bitneck-models evaluate --bundle {out} --data LABELLED --record {zoo}` and export again",
            highlight=False,
        )
    document = {
        "out": str(out),
        "bundle_id": bundle.bundle_id,
        "points": points,
        "not_measured": unmeasured,
        "bytes": sum(file.size for file in bundle.manifest.files.values()),
        "proof": {"images": len(x), "chain": proof.chain, "encoders": proof.encoders, "decoders": proof.decoders},
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(f"{out}: {', '.join(points)}; differs from torch by at most {proof.worst:.1e}")  # noqa: T201


def main() -> None:
    """Run the command line; see `run_app`."""
    run_app(app)
