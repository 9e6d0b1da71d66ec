"""``bitneck-models learned``: train a learned baseline, and measure it."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitneck_models.cli.measure import show_baselines
from bitneck_models.cli.options import Data, Json, Runs, Weights, data_folder, progress_bars

__all__ = ["learned"]

_TELL_EVERY = 50


def learned(
    recipe: Annotated[Path, typer.Argument(help="A recipe of a learned baseline, a TOML file.", metavar="RECIPE")],
    train_data: Annotated[Path | None, typer.Option(help="The folder of the recipe's photographs.")] = None,
    data: Data = None,
    runs: Runs = Path("runs"),
    workers: Annotated[int, typer.Option(min=0, help="Processes that read photographs.")] = 1,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Train a learned baseline on the recipe's photographs, and measure it on those of --data, as `baselines` does.

    Interrupted training resumes from its last checkpoint; what is trained is only measured. It runs on the CPU.
    """
    from bitneck_models.learned import measure, training
    from bitneck_models.learned.recipe import ImageCodecRecipe, load_learned
    from bitneck_models.measure.judge import Judge
    from bitneck_models.measure.meter import metric_for
    from bitneck_models.networks.registry import build_backbone
    from bitneck_models.training.photo_sets import photo_sets

    wanted = load_learned(recipe)
    net = build_backbone(wanted.backbone, weights)
    folder = data_folder(data)
    metric = metric_for(net.task, net.labels)
    photos = metric.photos(folder, net.wnids, net.labels)
    sets = photo_sets(wanted, data_folder(train_data or data), net)
    console = Console(stderr=True)
    began = time.monotonic()
    with progress_bars(console) as progress:
        bars = {"measuring": progress.add_task("measuring", total=None)}

        def on_step(step: training.LearnedStep) -> None:
            if step.run not in bars:
                bars[step.run] = progress.add_task(step.run, total=step.steps)
            text = f"{step.run}: rate {step.rate:.3g}, distortion {step.distortion:.4g}"
            progress.update(bars[step.run], completed=step.step, description=text)
            if not console.is_terminal and step.step % _TELL_EVERY == 0:
                minutes = (time.monotonic() - began) / 60
                console.print(f"{text}, step {step.step} of {step.steps}, {minutes:.1f} minutes")

        def on_photo(done: int, total: int) -> None:
            progress.update(bars["measuring"], completed=done, total=total)

        if isinstance(wanted, ImageCodecRecipe):
            codecs = training.train_codecs(wanted, net, sets, runs, workers=workers, report=on_step)
            judge = Judge(net, photos, runs / "cache")
            points = measure.codec_points(wanted, codecs, judge, sets, on_photo)
        else:
            students = training.train_students(wanted, net, sets, runs, workers=workers, report=on_step)
            judge = Judge(net, photos, runs / "cache")
            points = measure.student_points(wanted, students, judge, sets, on_photo)
    show_baselines(
        metric, folder, len(photos), judge.uncompressed, points,
        as_json=as_json, recipe=wanted.model_dump(mode="json"), train_photos=len(sets.train),
    )  # fmt: skip
