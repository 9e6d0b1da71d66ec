"""How much faster two processes train than one, each with one thread: photographs a second, and how far weights differ.

    python benchmarks/parallel.py [--split s2] [--steps 24]

A unit of EfficientNet-Lite0 is trained on generated features by one process, then below `torchrun` by two that share
each batch, in turn, three times each. The batch is the same, so the weights should be, but for rounding.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bitneck_models.networks.registry import build_backbone
from bitneck_models.training.parallel import joined
from bitneck_models.training.unit import train_unit
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe

BATCH, WARM = 64, 4


def work(split: str, steps: int, checkpoint: Path) -> None:
    """Train, and write the weights; the first process prints photographs a second."""
    torch.set_num_threads(1)
    backbone = build_backbone("efficientnet_lite0", None).frozen()
    shape = backbone.feature_shape(split)
    features = np.random.default_rng(0).normal(size=(4 * BATCH, *shape)).astype(np.float16)
    recipe = UnitRecipe.model_validate(
        {"id": "p", "split": split, "stride": 2, "channels": 64, "step": 1.0, "lambda": 1000.0, "init": "random"}
    )
    training = TrainingRecipe(steps=steps, finish_steps=0, batch=BATCH, precision="float32", warmup_steps=2)
    times: list[float] = []
    torch.manual_seed(0)
    unit = BottleneckUnit(shape, 64, 2).eval()
    with joined("cpu") as (world, _device):
        train_unit(
            unit, backbone.tail(split), features, recipe, training,
            checkpoint=checkpoint, report=lambda _step: times.append(time.perf_counter()), world=world,
        )  # fmt: skip
        if world.leads:
            print(BATCH * (len(times) - WARM) / (times[-1] - times[WARM - 1]))


def run(processes: int, split: str, steps: int, checkpoint: Path) -> float:
    """Photographs a second of a run with this many processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, __file__, "--worker", str(checkpoint), "--split", split, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="s2", help="split point")
    parser.add_argument("--steps", type=int, default=24, help="updates of a run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.split, arguments.steps, arguments.worker)
        return
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(3):
            for processes, found in speeds.items():
                checkpoint = Path(folder) / f"{processes}-{turn}.pt"
                found.append(run(processes, arguments.split, arguments.steps, checkpoint))
        one, two = (torch.load(Path(folder) / f"{n}-0.pt", weights_only=True)["unit"] for n in speeds)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"one process: {median(speeds[1]):.1f} photographs/s")
    print(f"two processes: {median(speeds[2]):.1f}, {median(speeds[2]) / median(speeds[1]):.2f} times")
    print(f"weights differ by at most {apart:.1e} after {arguments.steps} updates")


if __name__ == "__main__":
    main()
