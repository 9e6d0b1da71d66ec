"""DeepLab v3 on EfficientNet-Lite0: the network, its training, and units that learn from class maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec
from bitneck_models.data.class_maps import (
    VOID,
    ViewRange,
    confusion,
    load_class_map,
    mapped_photos,
    mean_iou,
    random_view,
)
from bitneck_models.data.features import FeatureSpec, cached_features, view_maps
from bitneck_models.losses.task_terms import NO_LABEL, Labels, TaskLoss, TaskTerm
from bitneck_models.networks.backbone import Backbone, load_stages, stages_state
from bitneck_models.networks.deeplab import AtrousConv2d
from bitneck_models.networks.registry import begin_network, build_backbone
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.training.network import forget_finished, train_network
from bitneck_models.training.photo_sets import photo_sets
from bitneck_models.training.point import train_point
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.network_training import NetworkTraining, load_network_training

NAME = "deeplabv3_efficientnet_lite0"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> Backbone:
    """Random weights in the head, statistics that are not trivial everywhere."""
    backbone = begin_network(NAME, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in backbone.stages["aspp"].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return backbone


def test_every_split_is_a_true_cut_and_the_map_has_the_inputs_size(network: Backbone) -> None:
    x = torch.randn(1, 3, 360, 480, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network(x)
        assert whole.shape == (1, *network.output_shape) == (1, 11, 360, 480)
        assert {s: network.feature_shape(s) for s in network.splits} == {
            "s4": (80, 23, 30),
            "s3": (112, 23, 30),
            "s2": (192, 23, 30),
            "s1": (256, 23, 30),
        }
        for split in network.splits:
            assert torch.equal(network.tail(split)(network.head(split)(x)), whole)
    assert list(network.stages)[-1] == "upsample"


@pytest.mark.parametrize(("kernel", "rate"), [(3, 1), (3, 3), (5, 2), (3, 9)])
def test_phases_are_the_convolution_with_holes(kernel: int, rate: int) -> None:
    torch.manual_seed(0)
    layer = AtrousConv2d(4, kernel, rate)
    f = torch.randn(2, 4, 11, 14, requires_grad=True)
    plain = F.conv2d(f, layer.weight, padding=rate * (kernel // 2), dilation=rate, groups=4)
    torch.testing.assert_close(layer(f), plain, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), f)[0] for out in (layer(f), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_is_exported_with_its_holes(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_from_string(to_onnx(AtrousConv2d(4, 3, 3).eval(), (4, 9, 9)))
    (node,) = [n for n in model.graph.node if n.op_type == "Conv"]
    assert [list(a.ints) for a in node.attribute if a.name == "dilations"] == [[3, 3]]
    assert len(model.graph.node) == 1


def test_weights_are_kept_and_loaded_and_others_refused(network: Backbone, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in stages_state(network.stages).items()}
    path = tmp_path / "network.safetensors"
    save_file(state, path)
    again = build_backbone(NAME, path)
    assert all(torch.equal(v, stages_state(again.stages)[k]) for k, v in state.items())
    assert len(again.weights_sha256) == 64
    assert again.task == "segmentation"
    key, value = next(iter(state.items()))
    save_file(state | {key: value[:1].clone()}, path)
    with pytest.raises(InvalidConfig, match="has shape"):
        load_stages(network.stages, path)
    save_file({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(InvalidConfig, match=f"1 names differ, {key} is missing"):
        build_backbone(NAME, path)
    path.write_bytes(b"no weights")
    with pytest.raises(InvalidConfig, match="not readable as weights"):
        build_backbone(NAME, path)
    with pytest.raises(InvalidConfig, match="train-network"):
        build_backbone(NAME, tmp_path / "nothing.safetensors")
    with pytest.raises(InvalidConfig, match="is not trained here"):
        begin_network("efficientnet_lite0", seed=0)


# Class maps


def test_confusion_and_iou_by_hand() -> None:
    truth = np.array([[0, 0, 1], [2, VOID, 1]], np.uint8)
    answer = np.array([[0, 1, 1], [2, 0, 0]])
    matrix = confusion(truth, answer, 4)
    assert matrix[:3, :3].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert mean_iou(matrix) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)  # class 3 does not occur


def scene(k: int, size: tuple[int, int] = (64, 48)) -> tuple[Image.Image, np.ndarray]:
    """Sky above, road below, a coloured block: classes 0, 3, 8, and a void border."""
    rng = np.random.default_rng(k)
    classes = np.zeros(size[::-1], np.uint8)
    classes[size[1] // 2 :] = 3
    left, top = int(rng.integers(4, size[0] - 24)), int(rng.integers(8, size[1] - 24))
    classes[top : top + 16, left : left + 20] = 8
    colours = np.zeros((12, 3), np.uint8)
    colours[[0, 3, 8]] = [90, 140, 220], [90, 90, 90], [200, 40, 40]
    pixels = colours[classes].astype(np.int16) + rng.integers(-12, 12, (*classes.shape, 3))
    classes[:, :1] = 11
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), classes


def write_scenes(folder: Path, seeds: range) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for k in seeds:
        image, classes = scene(k)
        image.save(folder / "images" / f"{k:03d}.png")
        Image.fromarray(classes).save(folder / "labels" / f"{k:03d}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part, seeds in (("train", range(12)), ("val", range(20, 24)), ("test", range(30, 34))):
        write_scenes(tmp_path / "scenes" / part, seeds)
    return tmp_path


def test_pairs_and_maps(data: Path) -> None:
    pairs = mapped_photos(data / "scenes" / "val")
    assert (pairs[0][0].name, pairs[0][1].name) == ("020.png", "020.png")
    found = load_class_map(pairs[0][1], 11)
    assert (found[:, 0] == VOID).all()
    assert (found == 8).sum() == 320
    pairs[0][1].unlink()
    with pytest.raises(InvalidConfig, match="1 photographs have no class map"):
        mapped_photos(data / "scenes" / "val")
    Image.new("RGB", (4, 4)).save(pairs[1][1])
    with pytest.raises(InvalidConfig, match="mode RGB"):
        load_class_map(pairs[1][1], 11)
    pairs[1][1].write_bytes(b"no picture")
    with pytest.raises(InvalidConfig, match="not readable as a class map"):
        load_class_map(pairs[1][1], 11)


def test_a_random_view_moves_the_photograph_and_its_map_together() -> None:
    image, classes = scene(3)
    views = ViewRange(height=48, width=64, scale_min=0.5, scale_max=2.0, light=0.0)
    for seed in range(20):
        view, mapped = random_view(image, classes, views, np.random.default_rng(seed))
        again, nothing = random_view(image, None, views, np.random.default_rng(seed))
        assert np.array_equal(view, again)
        assert (nothing == VOID).all()
        pixels = np.asarray(view).astype(int)
        red = (pixels[..., 0] > 150) & (pixels[..., 1] < 90)
        assert ((mapped == 8) == red).mean() > 0.97  # but for the block's edges


# Task terms


class _Upsample(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits, scale_factor=4, mode="bilinear")


def test_terms_at_every_pixel_are_torchs_own() -> None:
    torch.manual_seed(0)
    tail = nn.Sequential()
    tail.add_module("refine", nn.ReLU())
    tail.add_module("classes", nn.Conv2d(6, 5, 1))
    tail.add_module("upsample", _Upsample())
    f, f_hat = torch.randn(3, 6, 4, 7), torch.randn(3, 6, 4, 7)
    loss = TaskLoss([TaskTerm(kind="kl"), TaskTerm(kind="ce", weight=2.0)], tail)
    teacher, student = loss.features(f), loss.features(f_hat)
    (a,), (b,) = teacher.values(), student.values()
    assert a.shape == (3, 5, 4, 7)  # before the last stage
    maps = torch.randint(0, 5, (3, 16, 28))
    maps[:, :5] = NO_LABEL
    got = loss(student, teacher, Labels(maps, maps.flip(0), torch.tensor([1.0, 1.0, 0.25])))
    p = a.softmax(1)
    kl = (p * (p.log() - b.softmax(1).log())).sum(1).mean()
    small = maps[:, 2::4, 2::4]  # the nearest pixel of each position
    first = F.cross_entropy(b, small, ignore_index=NO_LABEL, reduction="none")
    second = F.cross_entropy(b, small.flip(0), ignore_index=NO_LABEL, reduction="none")
    share = torch.tensor([1.0, 1.0, 0.25])[:, None, None]
    known = share * (small != NO_LABEL) + (1 - share) * (small.flip(0) != NO_LABEL)
    ce = (share * first + (1 - share) * second).sum() / known.sum()
    torch.testing.assert_close(got, kl + 2 * ce)


def test_rare_classes_count_more() -> None:
    torch.manual_seed(0)
    tail = nn.Sequential()
    tail.add_module("classes", nn.Identity())
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a[:, 0] += 6.0  # nearly everywhere class 0, but in one corner
    a[:, 2, 0, 0] += 12.0
    p = a.softmax(1)
    weights = (p * (1 / (1.05 + p.mean((0, 2, 3))).log())[None, :, None, None]).sum(1)
    divergence = (p * (p.log() - b.log_softmax(1))).sum(1)
    loss = TaskLoss([TaskTerm(kind="kl", rare=1.05)], tail)
    torch.testing.assert_close(loss({0: b}, {0: a}, None), (divergence * weights).sum() / weights.sum())

    classes = torch.zeros(2, 4, 4, dtype=torch.int64)
    classes[:, 0, 0], classes[0, 3] = 2, NO_LABEL
    loss = TaskLoss([TaskTerm(kind="ce", rare=1.05)], tail)
    known = classes != NO_LABEL
    counts = torch.tensor([(classes == k).sum().item() / classes.numel() for k in range(3)])
    by_hand = (1 / (1.05 + counts).log())[classes.clamp(min=0)] * known
    ce = F.cross_entropy(b, classes, ignore_index=NO_LABEL, reduction="none")
    got = loss({0: b}, {}, Labels(classes, classes, torch.ones(2)))
    torch.testing.assert_close(got, (by_hand * ce).sum() / by_hand.sum())
    with pytest.raises(ValueError, match="rare is for kl and ce"):
        TaskTerm(kind="mse", rare=1.05)


# Training


def small_network() -> Backbone:
    """Three stages like the real one's, on 48 x 64 pictures."""
    torch.manual_seed(0)
    stages: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, 8, 4, 4),
        "body": nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        "aspp": nn.Sequential(nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)),
        "classes": nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(12, 11, 1)),
        "upsample": _Upsample(),
    }
    for stage in stages.values():
        stage.eval().requires_grad_(requires_grad=False)
    spec = InputSpec(
        height=48, width=64, fit="stretch", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return Backbone(
        name="small", stages=stages, splits={"s2": "body", "s1": "aspp"}, input=spec,
        labels=tuple(f"class {k}" for k in range(11)), wnids=(), task="segmentation",
    )  # fmt: skip


RECIPE = NetworkTraining(
    backbone="small", folder="scenes", train_from="body", height=48, width=64, steps=60, batch=4, learning_rate=3e-2,
    backbone_learning_rate=3e-2, warmup_steps=5, validate_every=20, light=0.1, ema=0.8, scale_min=0.9, scale_max=1.1,
)  # fmt: skip


def test_a_network_learns_and_resumes_to_the_same_weights(data: Path) -> None:
    looks: list[float] = []
    record = train_network(
        RECIPE, small_network(), data, data / "zoo", data / "runs",
        report=lambda s: looks.append(s.validation_iou) if s.validation_iou is not None else None,
    )  # fmt: skip
    assert record is not None
    assert record.test_iou > 0.6  # of three classes; a constant answer has 0.17
    assert record.validation_iou == pytest.approx(max(looks), abs=0.02)  # but for the rounding to float16
    network = small_network()
    load_stages(network.stages, data / "zoo" / "network.safetensors")
    pairs = mapped_photos(data / "scenes" / "test")
    spec = FeatureSpec(split="s1", photos=tuple((a, 1) for a, _ in pairs), augmented=False, seed=0)
    features = torch.from_numpy(cached_features(network, spec, data / "cache").astype(np.float32))
    with torch.no_grad():
        answers = network.tail("s1")(features).argmax(1).numpy()
    assert mean_iou(confusion(view_maps(network, spec, dict(pairs)), answers, 11)) == pytest.approx(
        record.test_iou, abs=0.02
    )

    resumed = small_network()
    assert train_network(RECIPE, resumed, data, data / "zoo2", data / "runs2", stop_after=30) is None
    often = RECIPE.model_copy(update={"validate_every": 7})  # the cadence of validation may change
    assert train_network(often, small_network(), data, data / "zoo2", data / "runs2", stop_after=31) is None
    again = train_network(RECIPE, small_network(), data, data / "zoo2", data / "runs2")
    assert again is not None
    assert again.sha256 == record.sha256
    checkpoint = data / "runs2" / RECIPE.backbone / "checkpoint.pt"
    forget_finished(RECIPE.model_copy(update={"steps": 61}), data / "runs2")  # not at its end: stays
    assert checkpoint.is_file()
    with pytest.raises(InvalidConfig, match="belongs to another recipe"):
        train_network(RECIPE.model_copy(update={"seed": 1}), small_network(), data, data / "zoo2", data / "runs2")
    forget_finished(RECIPE, data / "runs2")
    assert not checkpoint.exists()
    began: list[int] = []
    train_network(
        RECIPE,
        small_network(),
        data,
        data / "zoo2",
        data / "runs2",
        report=lambda s: began.append(s.step),
        stop_after=1,
    )
    assert began == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_from": "stem"}, "must be one of body, aspp"),
        ({"batch": 13}, "12 photographs are fewer than a batch of 13"),
        ({"height": 96}, "larger than the input"),
    ],
)
def test_trainings_that_are_refused(data: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        train_network(RECIPE.model_copy(update=change), small_network(), data, data / "zoo", data / "runs")


def test_network_recipes_are_typed(tmp_path: Path) -> None:
    text = 'backbone = "a"\nfolder = "b"\ntrain_from = "c"\n'
    (tmp_path / "network.toml").write_text(text)
    assert load_network_training(tmp_path).batch == 8
    for bad, message in (("magic = 1", "magic: Extra"), ("height = 100", "height"), ("=", "not TOML")):
        (tmp_path / "network.toml").write_text(text + bad)
        with pytest.raises(InvalidConfig, match=message):
            load_network_training(tmp_path)
    with pytest.raises(InvalidConfig, match="no recipe of a network there"):
        load_network_training(tmp_path / "nowhere")


POINT = """
name = "small"
backbone = "small"
[[data]]
folder = "scenes/train"
views = 4
labels = true
[[data]]
folder = "scenes/val"
validate_every = 1
labels = true
[training]
steps = 30
finish_steps = 20
batch = 8
mix = 0
mirror = false
precision = "float32"
warmup_steps = 5
[[units]]
id = "s1-r1"
split = "s1"
stride = 4
kernel = 4
filters = 4
channels = 8
step = 0.5
lambda = 3000
init = "principal"
task = [{ kind = "ce" }]
"""


def test_a_unit_learns_from_class_maps(data: Path) -> None:
    network = small_network()
    trained = train_network(RECIPE, network, data, data / "zoo", data / "runs")
    assert trained is not None
    load_stages(network.stages, data / "zoo" / "network.safetensors")
    for stage in network.stages.values():
        stage.requires_grad_(requires_grad=False)
    (data / "zoo" / "recipe.toml").write_text(POINT)
    entry = ZooEntry(data / "zoo")
    sets = photo_sets(entry.recipe, data, network)
    assert (len(sets.train), len(sets.validation), len(sets.maps)) == (12, 4, 16)
    losses: list[float] = []
    _, record = train_point(
        entry, entry.recipe.units[0], network, sets, data / "runs", on_step=lambda s: losses.append(s.task)
    )
    assert np.mean(losses[-10:]) < np.mean(losses[:3])
    assert record.validation_mean_iou is not None
    assert record.validation_mean_iou > trained.validation_iou - 0.25
    assert record.validation_agreement > 0.8

    (data / "zoo" / "recipe.toml").write_text(POINT.replace("mirror = false", "mirror = true"))
    entry = ZooEntry(data / "zoo")
    with pytest.raises(InvalidConfig, match="class maps are not mirrored"):
        train_point(entry, entry.recipe.units[0], network, sets, data / "runs3")
