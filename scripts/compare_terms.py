"""Compare trained units by the task terms on the photographs that their recipe puts aside, each at its own step.

    python scripts/compare_terms.py models/studies/losses --data PHOTOS [--unit s2-kl --unit s2-mae]

For each unit: the divergence of the class probabilities, the mean absolute error of the logits, and agreement. It tells
whether a unit that was trained for one term is good in it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from bitneck.errors import BitneckError
from bitneck_models.losses.task_terms import TaskLoss, TaskTerm
from bitneck_models.training.photo_sets import photo_sets, split_features
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import UnitRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the recipe's photographs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the feature caches")
    parser.add_argument("--unit", action="append", help="only this one; repeatable")
    arguments = parser.parse_args()
    try:
        entry = ZooEntry(arguments.zoo)
        units = [entry.recipe.unit(name) for name in arguments.unit] if arguments.unit else entry.trained()
        compare(entry, units, arguments.data, arguments.runs)
    except (BitneckError, OSError) as exc:
        parser.error(str(exc))


def compare(entry: ZooEntry, units: list[UnitRecipe], data: Path, runs: Path) -> None:
    backbone = entry.backbone()
    sets = photo_sets(entry.recipe, data, backbone)
    for recipe in units:
        tail, unit = backbone.tail(recipe.split), entry.unit(backbone, recipe)
        seed = entry.recipe.training_of(recipe).seed
        held = split_features(backbone, recipe.split, sets, seed, runs)[1]
        f = torch.from_numpy(held.astype(np.float32))  # (M, C, Hf, Wf)
        with torch.no_grad():
            f_hat = unit.decoder(torch.round(unit.encoder(f) / recipe.step) * recipe.step)
            found = {}
            for term in (TaskTerm(kind="kl"), TaskTerm(kind="mae")):
                loss = TaskLoss((term,), tail)
                found[term.kind] = float(loss(loss.features(f_hat), loss.features(f), None))
            agreement = float((tail(f_hat).argmax(1) == tail(f).argmax(1)).float().mean())
        print(f"{recipe.id:16} divergence {found['kl']:.3f}, mae {found['mae']:.3f}, agreement {agreement:.3f}")


if __name__ == "__main__":
    main()
