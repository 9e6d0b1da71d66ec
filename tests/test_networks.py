"""ResNet-50, DeepLab v3, and any network by a recipe: chain == unsplit network in torch and ONNX; what is refused."""

import itertools
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tomli_w
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from bitneck.errors import InvalidConfig
from bitneck_models.cli.main import app
from bitneck_models.networks import weights as weights_module
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.cutting import cut_network
from bitneck_models.networks.recipe import NetworkRecipe, load_network
from bitneck_models.networks.registry import build_backbone
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.networks.vision import import_torchvision
from bitneck_models.networks.voc import VOC_CLASSES
from bitneck_models.networks.weights import RANDOM, load_state, randomize
from bitneck_models.zoo.recipe import load_recipe
from bitneck_testing.networks import SHAPES, torch_threads

SMALL = 65
"""Height and width in place of 224 and 513: neither network has a layer that knows its input's size, but the last."""


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


@pytest.fixture(scope="module")
def resnet50() -> Backbone:
    return build_backbone("resnet50", RANDOM)


@pytest.fixture(scope="module")
def deeplab() -> Backbone:
    return build_backbone("deeplabv3_resnet50", RANDOM)


def unsplit(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """torchvision's own forward pass, with a backbone's weights."""
    models = import_torchvision().models
    if backbone.name == "resnet50":
        net = models.resnet50(weights=None)
        body = net
    else:
        net = models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=False
        )
        body = net.backbone
    stem = backbone.stages["stem"]
    body.conv1, body.bn1 = stem[0], stem[1]  # type: ignore[index]
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for i in range(len(getattr(body, layer))):
            getattr(body, layer)[i].load_state_dict(backbone.stages[f"{layer}.{i}"].state_dict())
    if backbone.name == "resnet50":
        net.fc = backbone.stages["classifier"][1]  # type: ignore[index]
        net.eval()
        return lambda x: net(x)  # type: ignore[no-any-return]
    net.classifier[0] = backbone.stages["classifier.0"]
    for i in range(3):
        net.classifier[i + 1] = backbone.stages["classifier.3"][i]  # type: ignore[index]
    net.classifier[4] = backbone.stages["classifier.4"]
    net.eval()
    return lambda x: net(x)["out"]  # type: ignore[no-any-return]


def resized(backbone: Backbone, size: int) -> Backbone:
    """The same network for a smaller input."""
    stages = dict(backbone.stages)
    if "upsample" in stages:
        stages["upsample"] = nn.Upsample((size, size), mode="bilinear", align_corners=False)
    spec = backbone.input.model_copy(update={"height": size, "width": size})
    return replace(backbone, stages=stages, input=spec)


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def onnx_run(module: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    out: np.ndarray[Any, Any] = onnxruntime.InferenceSession(to_onnx(module, x.shape[1:])).run(None, {"x": x})[0]
    return out


@pytest.mark.parametrize("name", ["resnet50", "deeplabv3_resnet50"])
@torch.no_grad()
def test_every_split_is_a_true_cut_and_the_chain_is_the_network(name: str, request: pytest.FixtureRequest) -> None:
    """Random weights, batch norms that are not the identity; torch, and ONNX segment by segment."""
    whole = request.getfixturevalue("resnet50" if name == "resnet50" else "deeplab")
    assert list(whole.splits) == ["s3", "s2", "s1"]
    norms = [m for stage in whole.stages.values() for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (53 if name == "resnet50" else 60)
    assert all(float((m.running_var / m.running_var.mean()).std()) > 0.1 for m in norms)
    assert all(bool((m.running_mean != 0).all()) and bool((m.bias != 0).all()) for m in norms)
    assert not any(p.requires_grad for stage in whole.stages.values() for p in stage.parameters())
    backbone = resized(whole, SMALL)
    x = torch.randn(2, 3, SMALL, SMALL, generator=torch.Generator().manual_seed(5))
    expected = unsplit(whole)(x)
    assert expected.shape[1:] == backbone.output_shape
    assert difference(backbone(x), expected) < 1e-5
    bounds = [0, *(backbone.split_index(s) for s in backbone.splits), len(backbone.stages)]
    for split in backbone.splits:
        assert difference(backbone.tail(split)(backbone.head(split)(x)), expected) < 1e-5
    y = x.numpy()
    for start, stop in itertools.pairwise(bounds):
        y = onnx_run(backbone.segment(start, stop), y)
    assert difference(y, expected) < 1e-4


@torch.no_grad()
def test_feature_shapes_and_labels(resnet50: Backbone, deeplab: Backbone) -> None:
    assert {s: resnet50.feature_shape(s) for s in resnet50.splits} == SHAPES["resnet50"]
    assert deeplab.feature_shape("s3") == SHAPES["deeplabv3_resnet50"]["s3"]
    assert (resnet50.input.pixels, resnet50.input.resize, resnet50.input.fit) == (224 * 224, 256, "crop")
    assert (deeplab.input.pixels, deeplab.input.resize, deeplab.input.fit) == (513 * 513, None, "stretch")
    assert (len(resnet50.labels), resnet50.wnids[0], resnet50.task) == (1000, "n01440764", "classification")
    assert (deeplab.labels, deeplab.task, deeplab.output_shape) == (VOC_CLASSES, "segmentation", (21, 513, 513))
    assert VOC_CLASSES[1:] == tuple(
        import_torchvision().models.segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:]
    )
    assert list(deeplab.stages)[-1] == "upsample"


def test_weights_from_files(resnet50: Backbone, tmp_path: Path) -> None:
    """As torchvision saves them, bare or below `state_dict`, and as safetensors; no auxiliary classifier."""
    models = import_torchvision().models
    net = models.resnet50(weights=None)
    randomize(net, (3, 33, 33), seed=1)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "b.pth.tar")
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    digests = {resnet50.weights_sha256}
    for name in ("a.pth", "b.pth.tar", "c.safetensors"):
        backbone = build_backbone("resnet50", tmp_path / name)
        assert torch.equal(backbone.stages["layer4.2"].conv3.weight, net.layer4[2].conv3.weight)  # type: ignore[union-attr]
        assert torch.equal(backbone.stages["stem"][1].running_var, net.bn1.running_var)  # type: ignore[index]
        digests.add(backbone.weights_sha256)
    assert len(digests) == 4  # caches of features never mix
    net = models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(net.state_dict(), tmp_path / "d.pth")
    assert torch.equal(
        build_backbone("deeplabv3_resnet50", tmp_path / "d.pth").stages["classifier.4"].weight,  # type: ignore[arg-type]
        net.classifier[4].weight,
    )
    for name, message in (
        ("none.pth", "no such file"),
        ("d.pth", r"another network's weights: of 320 tensors .* missing, such as conv1.weight.*not expected"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            build_backbone("resnet50", tmp_path / name)
    state = load_state(tmp_path / "a.pth")
    torch.save(state | {"fc.weight": torch.zeros(10, 2048)}, tmp_path / "e.pth")
    with pytest.raises(InvalidConfig, match=r"fc.weight has shape \(10, 2048\), expected \(1000, 2048\)"):
        build_backbone("resnet50", tmp_path / "e.pth")
    (tmp_path / "f.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "f.pth").write_bytes(b"x" * 100)
    torch.save([1], tmp_path / "g.pth")
    for name in ("f.safetensors", "f.pth", "g.pth"):
        with pytest.raises(InvalidConfig, match=r"not readable|no state dict"):
            load_state(tmp_path / name)


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InvalidConfig, match=r"cannot be downloaded .*--weights FILE, or put it into .*checkpoints"):
        weights_module.download("http://127.0.0.1:9/resnet50-0676ba61.pth")
    # a file of another digest than its name says is not taken
    (tmp_path / "net-0123abcd.pth").write_bytes(b"x")
    with pytest.raises(InvalidConfig, match="invalid hash"):
        weights_module.download((tmp_path / "net-0123abcd.pth").as_uri())


class Forked(nn.Module):
    """Two branches of which one passes around `body`; `twice` is called twice, `idle` never."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True))
        self.twice = nn.Conv2d(8, 8, 1)
        self.idle = nn.Conv2d(8, 8, 1)
        self.join = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = self.stem(x)
        y = self.join(self.body(skip).relu_() + skip)
        y = self.twice(self.twice(y))
        logits = self.head(y.mean((2, 3))).view(x.shape[0], 5)
        return {"out": logits, "aux": skip.mean((1, 2, 3))}


def test_cutting_a_network() -> None:
    """The auxiliary output is left out, an in-place ReLU changes nothing, a size of the batch may cross."""
    net = Forked()
    randomize(net, (3, 16, 16))
    stages = cut_network(net, (3, 16, 16), {"b": "join", "a": "stem"}, "out")
    assert list(stages) == ["a", "b", "output"]
    x = torch.randn(4, 3, 16, 16)
    y = x
    for stage in stages.values():
        z = stage(y)
        assert difference(onnx_run(stage, y.detach().numpy()), z.detach()) < 1e-5
        y = z
    torch.testing.assert_close(y, net(x)["out"])
    assert [len(list(s.parameters())) for s in stages.values()] == [4, 4, 4]
    stages["output"](y := torch.randn(2, 8, 8, 8, requires_grad=True)).sum().backward()
    assert y.grad is not None  # a tail passes gradients back


@pytest.mark.parametrize(
    ("cuts", "output", "message"),
    [
        ({"a": "body"}, "out", r"2 tensors cross a cut after module 'body': stem.2 \(8x8x8\), body.1 \(8x8x8\)"),
        ({"a": "body.0"}, "out", "2 tensors cross a cut after module 'body.0'"),
        ({"a": "twice"}, "out", "'twice' is called 2 times"),
        ({"a": "idle"}, "out", "'idle' takes no part"),
        ({"a": "nowhere"}, "out", "no module 'nowhere'; it has: stem"),
        ({"a": ""}, "out", "no module ''"),
        ({"a": "stem", "b": "stem.2"}, "out", "are the same cut"),
        ({"a": "head"}, "aux", "'head' takes no part"),
        ({"a": "stem"}, None, "name one of its outputs with `output`: out, aux"),
        ({"a": "stem"}, "mask", "no output 'mask'; it has: out, aux"),
    ],
)
def test_cuts_that_are_refused(cuts: dict[str, str], output: str | None, message: str) -> None:
    net = Forked().eval()
    with pytest.raises(InvalidConfig, match=message):
        cut_network(net, (3, 16, 16), cuts, output)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"torch\.export cannot trace Branching"):
        cut_network(Branching(), (3, 8, 8), {"a": "x"})
    with pytest.raises(InvalidConfig, match="nothing comes after"):
        cut_network(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), (3, 8, 8), {"a": "1"})


TIMM = """
source = "timm"
name = "mobilenetv3_small_050"
splits = { s1 = "blocks.4", s2 = "blocks.3" }
stages = ["conv_head"]
[input]
height = 64
width = 64
resize = 72
interpolation = "bilinear"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


def test_a_timm_network_by_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "net.toml"
    path.write_text(TIMM)
    backbone = build_backbone(str(path), RANDOM)
    assert (backbone.name, list(backbone.splits), len(backbone.labels)) == ("mobilenetv3_small_050", ["s2", "s1"], 1000)
    assert list(backbone.stages) == ["blocks.3", "blocks.4", "conv_head", "output"]
    assert backbone.wnids[0] == "n01440764"
    import timm

    net = timm.create_model("mobilenetv3_small_050")
    randomize(net, (3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        for split in backbone.splits:
            assert difference(backbone.tail(split)(backbone.head(split)(x)), expected) < 1e-5
    other = build_backbone(load_network(path).model_copy(update={"splits": {"s1": "blocks.2"}}), RANDOM)
    assert other.weights_sha256 != backbone.weights_sha256
    # the same, beside a zoo recipe and within it
    points = '[[units]]\nid = "p"\nsplit = "s1"\nstride = 1\nchannels = 4\nstep = 1.0\nlambda = 1.0\n'
    (tmp_path / "recipe.toml").write_text(f'name = "x"\nbackbone = "net.toml"\n[[data]]\nfolder = "f"\n{points}')
    assert load_recipe(tmp_path).backbone == load_network(path)
    nested = TIMM.replace("[input]", "[backbone.input]")
    (tmp_path / "recipe.toml").write_text(f'name = "x"\n[[data]]\nfolder = "f"\n{points}[backbone]\n{nested}')
    assert load_recipe(tmp_path).backbone == load_network(path)


def test_a_torchvision_segmentation_network_by_a_recipe() -> None:
    spec = {
        "height": 65,
        "width": 97,
        "fit": "stretch",
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    fields: dict[str, Any] = {"source": "torchvision", "name": "deeplabv3_mobilenet_v3_large", "task": "segmentation"}
    fields |= {"splits": {"s1": "classifier.0"}, "output": "out", "input": spec, "options": {"aux_loss": True}}
    backbone = build_backbone(NetworkRecipe.model_validate(fields), RANDOM)
    assert backbone.feature_shape("s1") == (256, 5, 7)
    assert backbone.output_shape == (21, 65, 97)
    assert backbone.labels[15] == "person"
    fields["splits"] = {"s1": "classifier.0.convs.1"}
    with pytest.raises(InvalidConfig, match=r"tensors cross a cut after module 'classifier\.0\.convs\.1'"):
        build_backbone(NetworkRecipe.model_validate(fields), RANDOM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"splits": {}}, "splits"),
        ({"splits": {"S1": "blocks.4"}}, "splits"),
        ({"splits": {"s1": "blocks 4"}}, "splits"),
        ({"source": "web"}, "source"),
        ({"name": "no_such_model"}, "timm has no model 'no_such_model'"),
        ({"source": "torchvision"}, "torchvision has no model 'test_resnet'"),
        ({"source": "torchvision", "name": "resnet18", "weights": "NONE"}, "it has: IMAGENET1K_V1"),
        ({"weights": "lamb_in1k"}, "leave `weights` out"),
        ({"options": {"no_such_option": 1}}, "cannot make test_resnet"),
        ({"labels": ["one", "two"]}, "has 1000 classes, the recipe names 2"),
        ({"task": "segmentation"}, "segmentation needs"),
        ({"splits": {"s1": "layer2.weight"}}, "no module 'layer2.weight'"),
        (
            {"name": "vit_tiny_patch16_224", "splits": {"s1": "blocks.3"}, "input": None},
            "a split point needs C x Hf x Wf",
        ),
    ],
)
def test_network_recipes_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny = {"name": "test_resnet", "splits": {"s1": "layer2"}, "stages": None}
    values = {k: v for k, v in (tomllib.loads(TIMM) | tiny | changes).items() if v is not None}
    (tmp_path / "net.toml").write_text(tomli_w.dumps(values))
    with pytest.raises(InvalidConfig, match=message):
        build_backbone(str(tmp_path / "net.toml"), RANDOM)


def test_network_recipes_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no network recipe"):
        build_backbone(str(tmp_path / "net.toml"))
    (tmp_path / "net.toml").write_text("name = ")
    with pytest.raises(InvalidConfig, match="not TOML"):
        load_network(tmp_path / "net.toml")
    with pytest.raises(InvalidConfig, match=r"or a network recipe, FILE\.toml"):
        build_backbone("resnet")
    result = CliRunner().invoke(app, ["baselines", "--backbone", str(tmp_path / "no.toml"), "--data", str(tmp_path)])
    assert isinstance(result.exception, InvalidConfig)
