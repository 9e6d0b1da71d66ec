"""The paper's own networks, from torchvision: ResNet-50, and DeepLab v3 on it.

    resnet50             stem layer1 layer2 layer3 [s3: layer3.4] layer4 [s2: layer4.0] [s1: layer4.2] pool classifier
    deeplabv3_resnet50   stem layer1 layer2 layer3 [s3: layer3.5] layer4 [s2: layer4.1] classifier.0 [s1] ... upsample

Split points: Table 2 of the paper, except s1 of DeepLab. The paper's is inside one of five parallel branches, and the
other four pass around it uncoded. Ours is the output of `classifier.0`, where the branches are joined to 256 channels
and nothing else crosses. Features are never negative, because each of these stages ends with a ReLU.
"""

from pathlib import Path
from typing import Any

from torch import nn

from bitneck.manifest import InputSpec
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.vision import import_timm, import_torchvision
from bitneck_models.networks.voc import VOC_CLASSES
from bitneck_models.networks.weights import download, fill

__all__ = ["deeplabv3_resnet50", "resnet50"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALL = (3, 65, 65)
"""Shape of the inputs that random weights are adjusted to; both networks take inputs of any size."""


def resnet50(weights: Path | None) -> Backbone:
    """ResNet-50 with torchvision's ``IMAGENET1K_V1`` weights, the paper's.

    Args:
        weights: a file, ``random``, or None for torchvision's, which are downloaded once.
    """
    models = import_torchvision().models
    net = models.resnet50(weights=None)
    digest = fill(net, weights, lambda: download(models.ResNet50_Weights.IMAGENET1K_V1.url), _SMALL)
    stages = _body(net)
    stages["pool"] = net.avgpool
    stages["classifier"] = nn.Sequential(nn.Flatten(1), net.fc)
    info = import_timm().data.ImageNetInfo("imagenet-1k")
    return Backbone(
        name="resnet50",
        stages=stages,
        splits={"s3": "layer3.4", "s2": "layer4.0", "s1": "layer4.2"},
        input=InputSpec(height=224, width=224, resize=256, interpolation="bilinear", mean=_MEAN, std=_STD),
        labels=tuple(info.label_descriptions()),
        wnids=tuple(info.label_names()),
        weights_sha256=digest,
    )


def deeplabv3_resnet50(weights: Path | None) -> Backbone:
    """DeepLab v3 with torchvision's ``COCO_WITH_VOC_LABELS_V1`` weights, without the auxiliary classifier.

    Args:
        weights: a file, ``random``, or None for torchvision's, which are downloaded once.
    """
    models = import_torchvision().models.segmentation
    net = models.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=len(VOC_CLASSES), aux_loss=False)
    published = models.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    digest = fill(net, weights, lambda: download(published.url), _SMALL, drop=("aux_classifier.",))
    spec = InputSpec(height=513, width=513, fit="stretch", interpolation="bilinear", mean=_MEAN, std=_STD)
    stages = _body(net.backbone)
    stages["classifier.0"] = net.classifier[0]
    stages["classifier.3"] = nn.Sequential(*list(net.classifier)[1:4])
    stages["classifier.4"] = net.classifier[4]
    stages["upsample"] = nn.Upsample((spec.height, spec.width), mode="bilinear", align_corners=False)
    return Backbone(
        name="deeplabv3_resnet50",
        stages=stages,
        splits={"s3": "layer3.5", "s2": "layer4.1", "s1": "classifier.0"},
        input=spec,
        labels=VOC_CLASSES,
        wnids=(),
        task="segmentation",
        weights_sha256=digest,
    )


def _body(net: Any) -> dict[str, nn.Module]:
    """The stages of a ResNet up to its last block."""
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)}
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        stages |= {f"{layer}.{i}": block for i, block in enumerate(getattr(net, layer))}
    return stages
