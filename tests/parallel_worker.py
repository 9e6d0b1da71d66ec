"""Trains a small unit alone or, below `torchrun`, together with others: CHECKPOINT, STOP_AFTER, [PHOTOGRAPHS].

With a folder of photographs it trains on fresh views of them, else on cached features. Each process writes beside the
checkpoint, under its rank, how many there were and whether training is complete.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck_models.training.parallel import joined
from bitneck_models.training.stream import ViewStream
from bitneck_models.training.unit import train_unit
from bitneck_models.units.starts import init_linear
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe
from bitneck_testing.networks import small_backbone


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, stop_after = Path(sys.argv[1]), int(sys.argv[2])
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(96, 12, 4, 4)) + rng.normal(size=(96, 12, 1, 1))).astype(np.float16)
    recipe = UnitRecipe.model_validate(
        {
            "id": "p", "split": "s1", "stride": 2, "channels": 6, "step": 0.25, "lambda": 300.0, "multiples": [0.7, 2],
            "target_bytes": 20, "task": [{"kind": "kl"}, {"kind": "mae"}],
        }
    )  # fmt: skip
    # 16 samples and 4 mixtures: two processes have 9 and 7 of them, or so.
    training = TrainingRecipe(steps=14, finish_steps=6, batch=16, mix=0.4, warmup_steps=4, precision="float32")
    network = small_backbone()
    tail = network.tail("s1")
    with joined("cpu") as (world, _device):
        torch.manual_seed(world.rank)  # what a process draws for itself must not matter
        unit = BottleneckUnit((12, 4, 4), 6, 2).eval()
        init_linear(unit, tail, torch.from_numpy(features.astype(np.float32)), task_metric=False)
        given: NDArray[np.float16] | ViewStream = features
        if len(sys.argv) > 3:
            given = ViewStream(
                network, "s1", sorted(Path(sys.argv[3]).iterdir()), None,
                seed=0, workers=world.rank, device=torch.device("cpu"), precision="float32",
                folder=checkpoint.parent / f"head{world.rank}",
            )  # fmt: skip
        done = train_unit(
            unit, tail, given, recipe, training, checkpoint=checkpoint, stop_after=stop_after, world=world
        )
        world.wait()
        checkpoint.with_suffix(f".{world.rank}").write_text(f"{world.size} {done}")


if __name__ == "__main__":
    main()
