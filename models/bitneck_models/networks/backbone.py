"""A backbone: a frozen task network as an ordered list of named stages, with the split points between them.

    x -> stage -> stage -> ... -> f -> stage -> ... -> output
                                  ^ a split point: ONE tensor crosses

Dimensions: N batch, C x Hf x Wf feature.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec, Task

__all__ = ["NETWORK_FILE", "Backbone", "load_stages", "stages_state"]

NETWORK_FILE = "network.safetensors"
"""File in a zoo entry with the weights of a network that was trained in this repository."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A task network in evaluation mode.

    Attributes:
        name: name of the network.
        stages: modules by name, in order; the network is their composition.
        splits: for each split point, the name of the last stage before it.
        input: how photographs are prepared for the network.
        labels: names of the classes.
        wnids: WordNet ids of the classes, or empty.
        task: kind of the output; see `output_shape`.
        weights_sha256: digest of the weights, or empty for the publisher's. Feature caches use it in their key.
    """

    name: str
    stages: Mapping[str, nn.Module]
    splits: Mapping[str, str]
    input: InputSpec
    labels: tuple[str, ...]
    wnids: tuple[str, ...]
    task: Task = "classification"
    weights_sha256: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of the input."""
        return 3, self.input.height, self.input.width

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one photograph's logits: (K,), or (K, H, W) for segmentation, with the input's height and width."""
        classes = len(self.labels)
        return (classes, *self.input_shape[1:]) if self.task == "segmentation" else (classes,)

    def stage_index(self, stage: str) -> int:
        """Position of a stage.

        Raises:
            InvalidConfig: there is no such stage; the message lists them.
        """
        names = list(self.stages)
        if stage not in names:
            raise InvalidConfig(f"{self.name} has no stage {stage!r}; it has: {', '.join(names)}")
        return names.index(stage)

    def split_index(self, split: str) -> int:
        """Number of stages before a split point.

        Raises:
            InvalidConfig: there is no such split point; the message lists them.
        """
        if split not in self.splits:
            raise InvalidConfig(f"{self.name} has no split point {split!r}; it has: {', '.join(self.splits)}")
        return self.stage_index(self.splits[split]) + 1

    def segment(self, start: int, stop: int | None = None) -> nn.Sequential:
        """Stages ``start .. stop-1`` as one module, which shares the backbone's weights."""
        stages = list(self.stages.items())[start:stop]
        return nn.Sequential(OrderedDict((name.replace(".", "_"), module) for name, module in stages)).eval()

    def head(self, split: str) -> nn.Sequential:
        """The network before a split point: input to feature."""
        return self.segment(0, self.split_index(split))

    def tail(self, split: str) -> nn.Sequential:
        """The network after a split point: feature to output."""
        return self.segment(self.split_index(split))

    @torch.no_grad()
    def feature_shape(self, split: str) -> tuple[int, int, int]:
        """(C, Hf, Wf) of the tensor that crosses a split point."""
        _, c, h, w = self.head(split)(torch.zeros(1, *self.input_shape)).shape
        return int(c), int(h), int(w)

    def frozen(self) -> Self:
        """This backbone, with every stage in evaluation mode and without gradients for its weights."""
        for stage in self.stages.values():
            stage.eval().requires_grad_(requires_grad=False)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Run the whole network on (N, 3, H, W) float32, normalized."""
        for stage in self.stages.values():
            x = stage(x)
        return x


def stages_state(stages: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor of a network except the batch counters, by ``stage/name`` (names of stages contain dots)."""
    return {
        f"{name}/{key}": value
        for name, stage in stages.items()
        for key, value in stage.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def load_stages(stages: Mapping[str, nn.Module], path: Path) -> None:
    """Load weights into a network, in place.

    Args:
        stages: the network's stages.
        path: a safetensors file with the keys of `stages_state`.

    Raises:
        InvalidConfig: the file is unreadable, or its tensors are not those of the network.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as exc:
        raise InvalidConfig(f"{path}: not readable as weights ({exc})") from exc
    own = stages_state(stages)
    if odd := sorted(own.keys() ^ state.keys()):
        where = "in the file only" if odd[0] in state else "missing"
        raise InvalidConfig(f"{path}: not this network's weights: {len(odd)} names differ, {odd[0]} is {where}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise InvalidConfig(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")
        value.copy_(state[key])
