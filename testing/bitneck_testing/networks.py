"""Networks for tests: a small one that runs in milliseconds, a home to train it in, and the paper's. Needs torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bitneck.manifest import InputSpec
from bitneck_models.cli.main import app
from bitneck_models.networks.backbone import Backbone
from bitneck_models.zoo.entry import ZooEntry
from bitneck_testing.photographs import add_photos

__all__ = [
    "RECIPE",
    "SHAPES",
    "SMALL",
    "checkpoint",
    "keep_every_point",
    "make_home",
    "run",
    "saved",
    "small_backbone",
    "torch_threads",
]

RECIPE = """
name = "efficientnet_lite0"
backbone = "small"
[[data]]
folder = "photos"
views = 3
validate_every = 4
[training]
steps = 10
finish_steps = 5
batch = 16
warmup_steps = 3
[[units]]
id = "s1-r2"
split = "s1"
stride = 2
channels = 6
step = 0.1
lambda = 300
init = "principal"
[[units]]
id = "s1-r1"
split = "s1"
stride = 2
channels = 6
step = 0.3
lambda = 30
init = "s1-r2"
task = [{ kind = "kl" }]
"""
"""A zoo entry for `small_backbone`, to be registered as `small`: two operating points at s1."""

SHAPES = {
    "resnet50": {"s3": (1024, 14, 14), "s2": (2048, 7, 7), "s1": (2048, 7, 7)},
    "deeplabv3_resnet50": {"s3": (1024, 65, 65), "s2": (2048, 65, 65), "s1": (256, 65, 65)},
}
"""Feature shapes (C, H, W) of the paper's networks, by split point."""

_NORMS = {"bn2_1": "c", "bn3_1": "r", "bn4_1": "c", "bn5_1": "c"}
_NORMS |= {"priorEncoder.bn1": "r", "priorEncoder.bn2": "z", "priorDecoder.bn1": "r", "priorDecoder.bn2": "r"}
"""Batch norms of an authors' checkpoint, and how many channels each has: C, Cr, or the 8 of the hyper-latent."""


SMALL = f"{__name__}:small_backbone"
"""`small_backbone` as an entry of the registry of networks."""


def small_backbone(_weights: Path | None = None) -> Backbone:
    """Three stages of random weights: an input of 32x32, features (8, 8, 8) at s2 and (12, 4, 4) at s1, ten classes."""
    torch.manual_seed(0)
    stages: dict[str, nn.Module] = {
        "stem": nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU()),
        "body": nn.Conv2d(8, 12, 2, 2),
        "classifier": nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    }
    for stage in stages.values():
        stage.eval().requires_grad_(requires_grad=False)
    return Backbone(
        name="small",
        stages=stages,
        splits={"s2": "stem", "s1": "body"},
        input=InputSpec(
            height=32, width=32, resize=36, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        labels=tuple(f"class {k}" for k in range(10)),
        wnids=(),
    )


def checkpoint(c: int, r: int, kernel: int, *, trained: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of random weights with the keys of the checkpoints that the paper's authors published.

    Args:
        c: channels C at the split point.
        r: channels Cr of the latent.
        kernel: height and width of the transposed convolution.
        trained: False leaves the hyperprior's norms as an untrained one has them.
        seed: of the weights.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    state = {
        "conv2_2.weight": normal(c, 1, 3, 3) / 3,
        "conv2_3.weight": normal(r, c, 1, 1) / c**0.5,
        "conv2_4.weight": normal(r, c, 1, 1) / r**0.5,
        "conv2_5.weight": normal(c, 1, kernel, kernel) / 3,
        "priorEncoder.conv1.weight": normal(r, 1, 3, 3),
        "priorEncoder.conv1.bias": normal(r),
        "priorEncoder.conv2.weight": normal(8, r, 1, 1) / r**0.5,
        "priorEncoder.conv2.bias": normal(8),
        "priorDecoder.deconv1.weight": normal(8, r, 1, 1),
        "priorDecoder.deconv1.bias": normal(r),
        "priorDecoder.deconv2.weight": normal(r, 1, 3, 3) / 3,
        "priorDecoder.deconv2.bias": normal(r),
    }
    for norm, size in _NORMS.items():
        n = {"c": c, "r": r, "z": 8}[size]
        live = trained or not norm.startswith("prior")
        state[f"{norm}.weight"] = torch.rand(n, generator=g) + 0.5 if live else torch.full((n,), 0.2118)
        state[f"{norm}.bias"] = normal(n) * 0.2 if live else torch.zeros(n)
        state[f"{norm}.running_mean"] = normal(n) * 0.1
        state[f"{norm}.running_var"] = torch.rand(n, generator=g) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(3337)
    for layer in range(1, 5):
        for name in "hba" if layer < 4 else "hb":
            state[f"bitEstimator_z.f{layer}.{name}"] = normal(1, 8, 1, 1) * 0.5
    return state


def saved(path: Path, state: dict[str, Any]) -> Path:
    """Write a state dict as the authors do."""
    torch.save({"state_dict": state}, path)
    return path


def keep_every_point(entry: ZooEntry) -> None:
    """Give the points of an entry validation metrics with which none beats another: a dozen photographs say nothing."""
    points = sorted(entry.points().items(), key=lambda item: item[1].validation_bytes)
    for rank, (name, point) in enumerate(points, start=1):
        better = {"validation_bytes": float(rank), "validation_agreement": rank / 100}
        text = point.model_copy(update=better).model_dump_json()
        (entry.point_folder(name) / "point.json").write_text(text)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use this many threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_home(folder: Path) -> Path:
    """Put a zoo entry that is not trained yet (`zoo`) and 20 photographs (`photos`) into a folder."""
    (folder / "zoo").mkdir()
    (folder / "zoo" / "recipe.toml").write_text(RECIPE)
    add_photos(folder / "photos", range(20))
    return folder


def run(*arguments: str) -> str:
    """Run a command of `bitneck-models` in this process. It must succeed.

    Returns:
        What it wrote on standard output.
    """
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
