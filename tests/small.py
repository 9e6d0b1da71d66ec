"""A backbone of three stages with random weights: the same code as a real one's, in milliseconds."""

from pathlib import Path

import torch
from torch import nn

from bitneck.manifest import InputSpec
from bitneck_models.networks.backbone import Backbone


def small_backbone(_weights: Path | None = None) -> Backbone:
    """Features of 8x8x8 at s2 and 12x4x4 at s1, ten classes; `SMALL` is its entry in the registry of networks."""
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


SMALL = f"{__name__}:small_backbone"
