"""The networks by name. Importing this module imports no network, and neither torch nor timm nor torchvision.

To add a network, write a module with a function ``(weights: Path | None) -> Backbone`` and name it in `BACKBONES`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitneck.errors import InvalidConfig
from bitneck_models.networks.recipe import NetworkRecipe, load_network

if TYPE_CHECKING:
    from bitneck_models.networks.backbone import Backbone

__all__ = ["BACKBONES", "TRAINED_HERE", "begin_network", "build_backbone"]

BACKBONES: dict[str, str] = {
    "efficientnet_lite0": "bitneck_models.networks.efficientnet:efficientnet_lite0",
    "resnet50": "bitneck_models.networks.torchvision_networks:resnet50",
    "deeplabv3_resnet50": "bitneck_models.networks.torchvision_networks:deeplabv3_resnet50",
    "deeplabv3_efficientnet_lite0": "bitneck_models.networks.deeplab:deeplabv3_efficientnet_lite0",
}
"""``module:function`` that builds a network from its weights, by name."""

TRAINED_HERE: dict[str, str] = {
    "deeplabv3_efficientnet_lite0": "bitneck_models.networks.deeplab:begin_deeplab",
}
"""``module:function`` that builds a network as its training begins from a seed, by name."""

_BY_RECIPE = "bitneck_models.networks.any_network:any_network"


def build_backbone(network: str | NetworkRecipe, weights: Path | None = None) -> "Backbone":
    """Build a frozen backbone in evaluation mode.

    Args:
        network: a key of `BACKBONES`, a network recipe, or the path of a network recipe, which ends in ``.toml``.
        weights: a file of weights; None for the backbone's own. Networks of torchvision and timm also take
            ``random``.

    Raises:
        InvalidConfig: there is no such backbone, the weights do not fit, or more than one tensor crosses a cut of the
            recipe.
    """
    backbone: Backbone
    if isinstance(network, str) and network.endswith(".toml"):
        network = load_network(Path(network))
    if isinstance(network, NetworkRecipe):
        backbone = _found(_BY_RECIPE)(network, weights)
    elif network in BACKBONES:
        backbone = _found(BACKBONES[network])(weights)
    else:
        raise InvalidConfig(f"no backbone {network!r}; known: {', '.join(BACKBONES)}, or a network recipe, FILE.toml")
    return backbone.frozen()


def begin_network(name: str, seed: int) -> "Backbone":
    """Build a network of this repository as its training begins: pretrained weights below, a fresh head above.

    Args:
        name: a key of `TRAINED_HERE`.
        seed: seed of the head's weights.

    Raises:
        InvalidConfig: the network is not trained in this repository.
    """
    if name not in TRAINED_HERE:
        raise InvalidConfig(f"{name!r} is not trained here, its weights are given; {', '.join(TRAINED_HERE)} is")
    backbone: Backbone = _found(TRAINED_HERE[name])(seed)
    return backbone.frozen()


def _found(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)
