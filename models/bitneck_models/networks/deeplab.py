"""DeepLab v3 on EfficientNet-Lite0: atrous spatial pyramid pooling, then classes at a quarter of the input's size.

    x --stem, blocks--> 320 at 1/16 --aspp--> 256 at 1/16 --refine, classes--> K at 1/4 --upsample--> K at 1/1
                                           ^ linear: a cut here lets ONE tensor through, there is no low-level skip

The head is DeepLab v3's (Chen et al., arXiv 1706.05587, section 3.3) with depthwise separable atrous convolutions, as
in v3+ (arXiv 1802.02611), and with rates for a map of 23 x 30. Without a skip, 1/16 is too coarse for poles and signs,
so the classifier gives 4 x 4 places for each position (a pixel shuffle; cf. data-dependent upsampling, 1903.02120).

Dimensions: N batch, K classes, H x W input, h x w = ceil(H / 16) x ceil(W / 16) map.
"""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec, sha256_hex
from bitneck_models.networks.backbone import NETWORK_FILE, Backbone, load_stages
from bitneck_models.networks.efficientnet import lite0_net, load_lite0

__all__ = [
    "CAMVID_CLASSES",
    "Aspp",
    "AtrousConv2d",
    "Upsample",
    "begin_deeplab",
    "deeplab_stages",
    "deeplabv3_efficientnet_lite0",
]

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
"""Classes of CamVid by index, as in the SegNet release."""

_NAME = "deeplabv3_efficientnet_lite0"
_OWN_WEIGHTS = Path(__file__).resolve().parents[2] / "zoo" / _NAME / NETWORK_FILE

STRIDE = 16
"""Input pixels for each position of the map, in height and in width."""
PLACES = 4
"""Places of the class map for each position of the map, in height and in width."""
RATES = (3, 6, 9)
_BRANCH = 128
_PROJECTED = 256


def deeplabv3_efficientnet_lite0(weights: Path | None) -> Backbone:
    """Build the network with the weights that were trained in this repository, on CamVid.

    Split points: ``s1`` after atrous pooling and its projection (256x23x30); ``s2`` after the stage before the last
    (192x23x30); ``s3`` after the last block at 1/16 without holes (112x23x30); ``s4`` after the first one at 1/16
    (80x23x30). All are linear outputs.

    Args:
        weights: a file; None for that of the zoo entry.

    Raises:
        InvalidConfig: the file does not exist or is unreadable, or its tensors are not those of the network.
    """
    path = weights or _OWN_WEIGHTS
    if not path.is_file():
        raise InvalidConfig(
            f"{path}: no weights of {_NAME} there; give --weights FILE ({NETWORK_FILE} of its zoo entry), or make them "
            "with `bitneck-models train-network`"
        )
    backbone = _deeplab(lite0_net(output_stride=STRIDE))
    load_stages(backbone.stages, path)
    return replace(backbone, weights_sha256=sha256_hex(path.read_bytes()))


def begin_deeplab(seed: int) -> Backbone:
    """Build the network as its training begins: ImageNet's weights in the blocks, fresh weights in the head.

    Args:
        seed: seed of the head's weights.
    """
    net = lite0_net(output_stride=STRIDE)
    load_lite0(net)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _deeplab(net)


def _deeplab(net: nn.Module) -> Backbone:
    spec = InputSpec(
        height=360, width=480, fit="stretch", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return Backbone(
        name=_NAME,
        stages=deeplab_stages(net, len(CAMVID_CLASSES), spec.height, spec.width),
        splits={"s4": "blocks.3.0", "s3": "blocks.4.2", "s2": "blocks.5.3", "s1": "aspp"},
        input=spec,
        labels=CAMVID_CLASSES,
        wnids=(),
        task="segmentation",
    )


class AtrousConv2d(nn.Conv2d):
    """Depthwise K x K convolution with holes, stride 1, output as large as the input.

    torch runs it as a convolution without holes on the d x d phases of the map, because its depthwise convolutions with
    holes are slow on a CPU, above all their gradients (measured, 6 x 672 x 18 x 24, 5 x 5, d = 2, two AVX2 cores: a
    block forward and backward takes 55 ms an image, and 12 ms this way). It is exported as one convolution with holes.
    """

    def __init__(self, channels: int, kernel: int, rate: int) -> None:
        super().__init__(
            channels, channels, kernel, padding=rate * (kernel // 2), dilation=rate, groups=channels, bias=False
        )

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C, h, w)."""
        rate = self.dilation[0]
        if rate == 1 or torch.compiler.is_exporting():
            return super().forward(f)
        n, c, h, w = f.shape
        padded = F.pad(f, (0, -w % rate, 0, -h % rate))
        rows, columns = padded.shape[2] // rate, padded.shape[3] // rate
        phases = padded.view(n, c, rows, rate, columns, rate).permute(0, 3, 5, 1, 2, 4)
        dense = phases.reshape(n * rate * rate, c, rows, columns)
        t = F.conv2d(dense, self.weight, padding=self.kernel_size[0] // 2, groups=c)
        t = t.view(n, rate, rate, c, rows, columns).permute(0, 3, 4, 1, 5, 2)
        return t.reshape(n, c, rows * rate, columns * rate)[..., :h, :w]


class PadToStride(nn.Module):
    """Adds zeros below and to the right, so that the input is a whole number of positions.

    Every stride-2 convolution then gets an even size. This puts the map's positions in the same places for pictures of
    every size: crops in training, whole pictures afterwards.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, 16 h, 16 w)."""
        return F.pad(x, (0, -x.shape[3] % STRIDE, 0, -x.shape[2] % STRIDE))


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: parallel branches, then a linear projection.

    The branches are a 1x1 convolution, three atrous convolutions, and the mean of the whole picture.

    Args:
        inputs: channels of the backbone.
        branch: channels of each branch.
        outputs: channels of the projection.
        rates: rates of the atrous branches.
    """

    def __init__(self, inputs: int, branch: int, outputs: int, rates: tuple[int, ...] = RATES) -> None:
        super().__init__()
        self.point = nn.Sequential(_pointwise(inputs, branch), *_norm_relu(branch))
        self.atrous = nn.ModuleList(
            nn.Sequential(
                AtrousConv2d(inputs, 3, rate), nn.BatchNorm2d(inputs), _pointwise(inputs, branch), *_norm_relu(branch)
            )
            for rate in rates
        )
        self.picture = nn.Sequential(nn.Conv2d(inputs, branch, 1), nn.ReLU())
        self.project = nn.Sequential(_pointwise(branch * (len(rates) + 2), outputs), nn.BatchNorm2d(outputs))

    def forward(self, f: Tensor) -> Tensor:
        """(N, C, h, w) to (N, outputs, h, w)."""
        whole = self.picture(f.mean(dim=(2, 3), keepdim=True))  # (N, branch, 1, 1)
        branches = [self.point(f), *(atrous(f) for atrous in self.atrous), whole.expand(-1, -1, *f.shape[2:])]
        projected: Tensor = self.project(torch.cat(branches, dim=1))
        return projected


class _CutPadding(nn.Module):
    """Removes the logits of the padding.

    Args:
        height: largest height that is kept.
        width: largest width that is kept.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, logits: Tensor) -> Tensor:
        """(N, K, 4 h, 4 w) to (N, K, H / 4, W / 4)."""
        return logits[..., : self.height, : self.width]


class Upsample(nn.Module):
    """Enlarges logits to the input's size, bilinear.

    Args:
        height: height of the input.
        width: width of the input.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, logits: Tensor) -> Tensor:
        """(N, K, H / 4, W / 4) to (N, K, H, W)."""
        return F.interpolate(logits, size=(self.height, self.width), mode="bilinear", align_corners=False)


def deeplab_stages(net: nn.Module, classes: int, height: int, width: int) -> "OrderedDict[str, nn.Module]":
    """The stages of the network; those of the head have fresh weights.

    Args:
        net: timm's EfficientNet-Lite0 with ``output_stride=16``.
        classes: K.
        height: height of the input; a multiple of 4.
        width: width of the input; a multiple of 4.

    Raises:
        InvalidConfig: the input has another size.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    stages["stem"] = nn.Sequential(PadToStride(), net.get_submodule("conv_stem"), net.get_submodule("bn1"))
    for i, stack in enumerate(net.blocks):  # type: ignore[arg-type, unused-ignore]
        for j, block in enumerate(stack):
            _replace_atrous(block)
            stages[f"blocks.{i}.{j}"] = block
    inputs = 320
    stages["aspp"] = Aspp(inputs, _BRANCH, _PROJECTED)
    stages["refine"] = nn.Sequential(
        nn.ReLU(),
        nn.Dropout(0.1),
        AtrousConv2d(_PROJECTED, 3, 1),
        nn.BatchNorm2d(_PROJECTED),
        _pointwise(_PROJECTED, _PROJECTED),
        *_norm_relu(_PROJECTED),
    )
    step = STRIDE // PLACES
    if height % step or width % step:
        raise InvalidConfig(f"the input is {height}x{width}; height and width must be multiples of {step}")
    stages["classes"] = nn.Sequential(
        nn.Conv2d(_PROJECTED, classes * PLACES**2, 1),
        nn.PixelShuffle(PLACES),
        _CutPadding(height // step, width // step),
    )
    stages["upsample"] = Upsample(height, width)
    return stages


def _replace_atrous(block: nn.Module) -> None:
    """Replace depthwise convolutions with holes by `AtrousConv2d`, which trains faster."""
    conv = block.conv_dw
    if isinstance(conv, nn.Conv2d) and conv.dilation != (1, 1):
        fast = AtrousConv2d(conv.in_channels, conv.kernel_size[0], conv.dilation[0])
        fast.weight = conv.weight
        block.conv_dw = fast
