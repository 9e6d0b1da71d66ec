"""One worker of a search, as a process of its own: STORAGE, SPACE, ZOO, DATA, RUNS, TRIALS."""

import sys
from pathlib import Path

import torch

from bitneck_models.search.space import load_space
from bitneck_models.search.study import open_study
from bitneck_models.search.worker import work
from bitneck_models.training.photo_sets import photo_sets
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
