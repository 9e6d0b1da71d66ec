"""One worker of a search, as a process of its own: STORAGE, SPACE, ZOO, DATA, RUNS, TRIALS."""

import sys
from pathlib import Path

import torch

from bitneck_models.search.search import load_space, open_study, work
from bitneck_models.training.pipeline import photo_sets
from bitneck_models.zoo.entry import ZooEntry
from bitneck_testing.networks import small_backbone

torch.set_num_threads(1)
storage, space_path, zoo, data, runs, trials = sys.argv[1:]
backbone, entry, space = small_backbone(), ZooEntry(Path(zoo)), load_space(Path(space_path))
done: list[int] = []
work(
    open_study(space, storage), space, entry, backbone, photo_sets(entry.recipe, Path(data), backbone), Path(runs),
    trials=int(trials), on_trial=lambda trial: done.append(trial.number),
)  # fmt: skip
print(len(done))  # noqa: T201
