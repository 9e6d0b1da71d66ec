"""Task terms, the l1 rate term, labels, complexity, intervals, devices."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import nn

from bitneck.errors import BundleCorrupt, InvalidConfig, ModelFailure
from bitneck.intervals import wilson
from bitneck_models.losses.rate_terms import L1Rate
from bitneck_models.losses.task_terms import Labels, TaskLoss, TaskTerm
from bitneck_models.measure.complexity import Complexity, onnx_complexity
from bitneck_models.measure.intervals import mean_interval
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.training.photo_sets import photo_sets
from bitneck_models.training.point import train_point
from bitneck_models.training.run import choose_device
from bitneck_models.training.scalars import Scalars
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe, load_recipe
from bitneck_testing.networks import small_backbone
from bitneck_testing.photographs import photo
from bitneck_testing.tiny_bundles import INPUT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_task_terms_by_kind_and_layer() -> None:
    tail = small_backbone().tail("s2")
    f, f_hat = torch.randn(4, 8, 8, 8), torch.randn(4, 8, 8, 8)
    body, logits = [tail.body(x) for x in (f, f_hat)], [tail(x) for x in (f, f_hat)]  # type: ignore[operator]

    def value(*terms: TaskTerm, labels: Labels | None = None) -> float:
        loss = TaskLoss(terms, tail)
        return float(loss(loss.features(f_hat), loss.features(f), labels))

    mae, mse = F.l1_loss(*logits), F.mse_loss(body[0], body[1])
    kl = (logits[0].softmax(1) * (logits[0].log_softmax(1) - logits[1].log_softmax(1))).sum(1).mean()
    assert value(TaskTerm(kind="mae")) == pytest.approx(float(mae), rel=1e-5)
    assert value(TaskTerm(kind="mse", layer="body")) == pytest.approx(float(mse), rel=1e-5)
    assert value(TaskTerm(kind="kl")) == pytest.approx(float(kl), rel=1e-4)
    both = value(TaskTerm(kind="mae", weight=2.0), TaskTerm(kind="mse", layer="body", weight=0.5))
    assert both == pytest.approx(2 * float(mae) + 0.5 * float(mse), rel=1e-5)
    assert max(TaskLoss([TaskTerm(kind="mse", layer="body")], tail).features(f)) == 0  # no further than it must
    labels = Labels(torch.tensor([1, 2, -1, 3]), torch.tensor([4, -1, -1, 3]), torch.tensor([0.3, 0.6, 0.5, 1.0]))
    log = logits[1].log_softmax(1)
    expected = -(0.3 * log[0, 1] + 0.7 * log[0, 4] + 0.6 * log[1, 2] + log[3, 3]) / (0.3 + 0.7 + 0.6 + 1.0)
    assert value(TaskTerm(kind="ce"), labels=labels) == pytest.approx(float(expected), rel=1e-5)
    nothing = Labels(torch.full((4,), -1), torch.full((4,), -1), torch.ones(4))
    assert value(TaskTerm(kind="ce"), labels=nothing) == 0


def test_an_unknown_layer_names_those_there_are() -> None:
    with pytest.raises(InvalidConfig, match=r"no layer 'stem' after the split point; there are: body, classifier"):
        TaskLoss([TaskTerm(kind="mae", layer="stem")], small_backbone().tail("s2"))


def test_l1_is_the_norm_and_its_density_learns_beside_it() -> None:
    torch.manual_seed(0)
    rate = L1Rate(3)
    y = torch.randn(5, 3, 2, 2, requires_grad=True)
    cost = rate(y, 0.5)
    torch.testing.assert_close(cost, y.abs().sum(dim=(1, 2, 3)) / 0.5)
    cost.sum().backward()
    torch.testing.assert_close(y.grad, y.sign().detach() / 0.5)  # nothing of the density's
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rate.density.h)
    assert (rate(y, 0.5, hard=True) > 0).all()


RECIPE = """
name = "small"
backbone = "small"
[[data]]
folder = "labelled"
views = 2
validate_every = 4
labels = true
[[data]]
folder = "others"
[training]
steps = 6
finish_steps = 2
batch = 8
precision = "float32"
warmup_steps = 2
[[units]]
id = "s1-r1"
split = "s1"
stride = 2
channels = 6
step = 0.2
lambda = 300
rate = "l1"
init = "principal"
task = [{ kind = "ce" }]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "recipe.toml").write_text(RECIPE)
    for k in range(16):
        for folder in (f"labelled/{k % 10}", "others"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            photo(k, (60, 50)).save(tmp_path / folder / f"{k:02d}.png")
    return tmp_path


def test_training_with_labels(home: Path) -> None:
    entry, backbone = ZooEntry(home / "zoo"), small_backbone()
    sets = photo_sets(entry.recipe, home, backbone)
    assert len(sets.labels) == len(sets.weights) == 12 * 2 + 16
    assert sets.labels[:24].min() >= 0
    assert (sets.labels[24:] == -1).all()
    record, _ = train_point(entry, entry.recipe.units[0], backbone, sets, home / "runs")
    assert record.recipe["task"] == [{"kind": "ce", "layer": None, "weight": 1.0, "rare": None}]
    events = list((home / "runs" / "small" / "scalars" / "s1-r1").glob("events.*"))
    assert len(events) == 1


def test_labels_that_are_missing(home: Path) -> None:
    path = home / "zoo" / "recipe.toml"
    path.write_text(RECIPE.replace("labels = true\n", ""))
    entry, backbone = ZooEntry(home / "zoo"), small_backbone()
    with pytest.raises(InvalidConfig, match="set `labels = true`"):
        train_point(entry, entry.recipe.units[0], backbone, photo_sets(entry.recipe, home, backbone), home / "runs")
    path.write_text(RECIPE.replace('folder = "others"', 'folder = "others"\nlabels = true'))
    entry = ZooEntry(home / "zoo")
    with pytest.raises(InvalidConfig, match=r"neither labels\.csv"):
        photo_sets(entry.recipe, home, backbone)


def test_cross_entropy_alone_draws_only_what_has_a_label() -> None:
    features = np.zeros((40, 12, 4, 4), np.float16)
    features[20:] = np.nan  # would show
    labels = np.where(np.arange(40) < 20, np.arange(40) % 10, -1)
    features[:20] = np.random.default_rng(0).normal(size=(20, 12, 4, 4))
    point = UnitRecipe.model_validate(
        {"id": "p", "split": "s1", "stride": 2, "channels": 6, "step": 0.3, "lambda": 50.0, "task": [{"kind": "ce"}]}
    )
    training = TrainingRecipe(steps=3, finish_steps=0, batch=8, precision="float32", mix=0.0)
    torch.manual_seed(0)
    unit, tail = BottleneckUnit((12, 4, 4), 6, 2).eval(), small_backbone().tail("s1")
    assert train_unit(unit, tail, features, point, training, labels=labels)
    with pytest.raises(InvalidConfig, match="no feature has a label"):
        train_unit(unit, tail, features, point, training)
    few = np.where(np.arange(40) < 3, 0, -1)
    with pytest.raises(InvalidConfig, match="3 features with a label are fewer than a batch of 8"):
        train_unit(unit, tail, features, point, training, labels=few)
    mixed = point.model_copy(update={"task": (TaskTerm(kind="ce"), TaskTerm(kind="mae"))})
    with pytest.raises(ModelFailure, match="not finite"):  # with a teacher the others are of use
        train_unit(unit, tail, features, mixed, TrainingRecipe(steps=30, batch=8, precision="float32"), labels=labels)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "ce"', 'kind = "hinge"', "units.0.task.0.kind"),
        ('kind = "ce"', 'kind = "ce", layer = "body"', "takes no layer"),
        ('kind = "ce"', 'kind = "ce", weight = 0', "weight"),
        ('[{ kind = "ce" }]', "[]", "task"),
        ('rate = "l1"', 'topology = "magic"', "topology"),
        ('rate = "l1"', "seed = -1", "seed"),
        ('rate = "l1"', f"seed = {10**20}", "seed"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(old, new))
    with pytest.raises(InvalidConfig, match=message):
        load_recipe(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_runs_the_units_own_forward(precision: str) -> None:
    features = np.random.default_rng(0).normal(size=(64, 12, 4, 4)).astype(np.float16)
    point = UnitRecipe.model_validate(
        {"id": "p", "split": "s1", "stride": 2, "channels": 6, "step": 0.25, "lambda": 50.0}
    )
    training = TrainingRecipe.model_validate({"steps": 4, "finish_steps": 3, "batch": 16, "precision": precision})
    unit, tail = BottleneckUnit((12, 4, 4), 6, 2).eval(), small_backbone().tail("s1")
    whole: list[tuple[torch.Tensor, float, torch.Tensor, torch.Tensor]] = []
    mixed: list[torch.Tensor] = []
    halves = {"encoder": 0, "decoder": 0}

    def count(name: str) -> None:
        halves[name] += 1

    unit.register_forward_hook(lambda _unit, given, made: whole.append((*given, *made)))
    unit.decoder.mix.register_forward_hook(lambda _mix, given, _made: mixed.append(given[0]))
    unit.encoder.body.register_forward_hook(lambda *_: count("encoder"))
    wide: list[torch.dtype] = []
    unit.encoder.body.get_submodule("spatial").register_forward_hook(lambda _conv, _f, t: wide.append(t.dtype))
    unit.decoder.body.register_forward_hook(lambda *_: count("decoder"))
    assert train_unit(unit, tail, features, point, training)
    assert len(whole) == 7
    assert halves == {"encoder": 7 + 2, "decoder": 7}  # each stage looks once at the latents that it begins with
    assert wide.count(getattr(torch, precision)) >= 7
    for (f, step, y, f_hat), y_hat in zip(whole, mixed, strict=True):
        assert (tuple(f.shape), step, f_hat.shape) == ((16, 12, 4, 4), 0.25, f.shape)
        assert y.dtype == y_hat.dtype == torch.float32
        torch.testing.assert_close(y_hat, torch.round(y / 0.25) * 0.25)


def test_complexity_is_counted_from_what_is_deployed(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).eval()  # fmt: skip
    path = tmp_path / "a.onnx"
    path.write_bytes(to_onnx(module, (3, 16, 16)))
    found = onnx_complexity(path, (3, 16, 16))
    assert found == Complexity(3 * 8 * 9 + 8 * 9 + 8 * 10 + 10, 8 * 8 * 8 * 27 + 8 * 8 * 8 * 9 + 80)
    unit = BottleneckUnit((6, 8, 8), 5, 4, filters=4).eval()
    path.write_bytes(to_onnx(unit.decoder, unit.latent_shape))
    closed = onnx_complexity(path, unit.latent_shape)
    assert closed.multiply_adds >= 5 * 24 * 4  # the 1x1 layer's at least
    convolutions = module[:3].eval()
    path.write_bytes(to_onnx(convolutions, (3, 16, 16)))
    closed = onnx_complexity(path, (3, 16, 16))
    path.write_bytes(to_onnx(convolutions, (3, 16, 16), any_size=True))
    assert onnx_complexity(path, (3, 16, 16)) == closed
    assert onnx_complexity(path, (3, 32, 16)).multiply_adds == 2 * closed.multiply_adds
    path.write_bytes(b"no onnx")
    with pytest.raises(BundleCorrupt, match="not readable as ONNX"):
        onnx_complexity(path, (3, 16, 16))


def test_intervals() -> None:
    for right, count in ((0, 10), (3, 10), (355, 400), (400, 400)):
        expected = stats.binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
    low, high = mean_interval(np.array([0.0, 1.0, 0.0, 1.0]))
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.25, rel=1e-3)


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda")
    with pytest.raises(InvalidConfig, match="device 'abacus' cannot be used"):
        choose_device("abacus")


def test_scalars_of_a_resumed_run_replace_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(1, 41), range(31, 61)):
        with Scalars(tmp_path) as scalars:
            for k in steps:
                scalars.add(StepReport(k, 60, bits=8.0 * k, task=0.5, lambda_=7.0))
        time.sleep(1.1)  # the names of the files have seconds, and order them
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("estimated_bytes")] == [(k, k) for k in (10, 20, 30, 40, 50, 60)]


def test_augmented_views_of_tiny_photographs(tmp_path: Path) -> None:
    """Smaller than the network's input: enlarged, not refused."""
    from bitneck_models.data.photos import augment

    for height, width in ((32, 32), (24, 40)):
        spec = INPUT.model_copy(update={"height": height, "width": width})
        view = augment(Image.new("RGB", (9, 5), "red"), spec, np.random.default_rng(0))
        assert view.size == (width, height)
