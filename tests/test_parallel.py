"""Training in several processes that share each batch, as `torchrun` starts them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitneck_models.training.parallel import ALONE, World
from bitneck_testing.photographs import add_photos

WORKER = Path(__file__).with_name("parallel_worker.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def train(checkpoint: Path, processes: int, stop_after: int = 20, *given: str) -> dict[str, torch.Tensor]:
    """Train up to a step; the weights of the unit and of the rate term then."""
    launcher = (*TORCHRUN, str(processes)) if processes > 1 else (sys.executable,)
    result = subprocess.run(
        (*launcher, str(WORKER), str(checkpoint), str(stop_after), *given), check=False, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    told = [checkpoint.with_suffix(f".{rank}") for rank in range(processes)]
    assert [path.read_text() for path in told] == [f"{processes} {stop_after == 20}"] * processes
    for path in told:
        path.unlink()
    state = torch.load(checkpoint, weights_only=True)
    return {f"{part}.{name}": value for part in ("unit", "mean", "rate") for name, value in state[part].items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone.pt", 1)
    together = train(tmp_path / "together.pt", 2)
    assert_same(together, alone)
    # Interrupted in each stage, and gone on with by another number of processes.
    train(tmp_path / "resumed.pt", 2, stop_after=5)
    train(tmp_path / "resumed.pt", 1, stop_after=16)
    assert_same(train(tmp_path / "resumed.pt", 2), alone)


def test_two_processes_do_what_one_does_with_fresh_views(tmp_path: Path) -> None:
    """One of the two reads its photographs in a worker."""
    add_photos(tmp_path / "photos", range(30))
    photos = str(tmp_path / "photos")
    alone = train(tmp_path / "alone.pt", 1, 20, photos)
    train(tmp_path / "together.pt", 2, 9, photos)
    assert_same(train(tmp_path / "together.pt", 2, 20, photos), alone)


@pytest.mark.parametrize(("count", "mixed", "size"), [(16, 6, 2), (16, 0, 3), (15, 14, 4), (8, 8, 2), (4, 2, 8)])
def test_shares_are_a_partition_and_keep_mixtures_together(count: int, mixed: int, size: int) -> None:
    shares = [World(rank, size).positions(count, mixed) for rank in range(size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    for share in shares:
        own = [k for k in share.tolist() if k < mixed]
        assert own == [mixed - 1 - k for k in reversed(own)]  # so that flipping finds each one's partner
    assert ALONE.positions(count, mixed).tolist() == list(range(count))
