"""Units: topologies, geometry, where training starts, what is frozen, pruning."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitneck.errors import InvalidConfig
from bitneck.runtime import OnnxModule
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.training.tables import prune_and_fit
from bitneck_models.training.unit import train_unit
from bitneck_models.units.geometry import Geometry
from bitneck_models.units.prune import prune_channels
from bitneck_models.units.starts import init_linear, init_nested, init_next
from bitneck_models.units.topologies import Topology
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe

TOPOLOGIES: tuple[Topology, ...] = ("separable", "separable2", "conv", "conv2", "inverted", "nested", "block")


pytestmark = pytest.mark.usefixtures("one_thread")


def tail_of_ten(channels: int) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("size", "stride", "kernel"), [((7, 7), 3, None), ((7, 7), 4, 5), ((5, 9), 2, 3)])
def test_every_topology_returns_exactly_the_heads_size(
    topology: Topology, size: tuple[int, int], stride: int, kernel: int | None
) -> None:
    unit = BottleneckUnit((6, *size), 4, stride, kernel, topology=topology).eval()
    f = torch.randn(2, 6, *size)
    y, f_hat = unit(f, 0.5)
    assert f_hat.shape == f.shape
    assert tuple(y.shape[1:]) == unit.latent_shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "magic"}, "no topology 'magic'; known: separable"),
        ({"topology": "conv", "filters": 4}, "one filter a channel"),
        ({"topology": "conv", "hidden": 4}, "nothing is hidden"),
        ({"topology": "inverted", "hidden": 3}, "4 latent channels, expected 1 to 3"),
        ({"topology": "nested", "hidden": 1, "group": (1, 2)}, "4 latent channels, expected 1 to 2"),
        ({"topology": "nested", "group": (2, 3)}, "groups of 2x3 do not tile the 2x2 windows"),
        ({"topology": "nested", "group": (0, 1)}, "groups of 0x1 do not tile"),
        ({"topology": "conv", "group": (2, 2)}, "each window by itself"),
        ({"topology": "separable", "pool": 2}, "averages nothing"),
        ({"topology": "block", "pool": 3}, "means of 3x3 do not fit a stride of 4"),
        ({"topology": "conv", "decoder_blocks": (0, 1)}, "no residual blocks"),
    ],
)
def test_units_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        BottleneckUnit((6, 8, 8), 4, 4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("topology", ["separable2", "conv", "conv2"])
def test_other_topologies_start_as_pooling_too(topology: Topology) -> None:
    torch.manual_seed(1)
    features = torch.randn(200, 6, 8, 8)
    unit = BottleneckUnit((6, 8, 8), 6, 4, topology=topology).eval()
    init_linear(unit, tail_of_ten(6), features, task_metric=False)
    with torch.no_grad():
        f_hat = unit.decoder(unit.encoder(features))
    pooled = F.interpolate(F.avg_pool2d(features, 4), scale_factor=4)
    torch.testing.assert_close(f_hat, pooled, atol=2e-3, rtol=2e-3)


def test_a_nested_unit_starts_as_the_separable_one_and_codes_what_windows_share_once() -> None:
    torch.manual_seed(2)
    features = torch.randn(300, 6, 8, 12) + 3 * torch.randn(300, 6, 1, 1)
    separable = BottleneckUnit((6, 8, 12), 5, 4).eval()
    init_linear(separable, tail_of_ten(6), features, task_metric=False)
    whole, part = (
        BottleneckUnit((6, 8, 12), channels, 4, topology="nested", hidden=5, group=(2, 3)).eval()
        for channels in (30, 5)
    )
    assert (whole.latent_shape, part.latent_shape) == ((30, 1, 1), (5, 1, 1))
    with torch.no_grad():
        latents = separable.encoder(features)
        wanted = separable.decoder(latents)
        for unit in (whole, part):
            init_nested(unit, separable, latents)
        torch.testing.assert_close(whole.decoder(whole.encoder(features)), wanted, atol=2e-3, rtol=2e-3)
        left = (part.decoder(part.encoder(features)) - wanted).square().mean() / wanted.var()
        lone = separable.decoder(torch.where(torch.arange(5)[:, None, None] == 0, latents, 0.0))  # as many numbers
        assert left < 0.1 < (lone - wanted).square().mean() / wanted.var()


def test_nested_starts_that_are_refused() -> None:
    nested = BottleneckUnit((6, 8, 8), 4, 4, topology="nested", group=(2, 2))
    latents = torch.randn(10, 4, 2, 2)
    with pytest.raises(InvalidConfig, match="as large as the one it starts from"):
        init_nested(nested, BottleneckUnit((6, 8, 8), 3, 4), latents)
    with pytest.raises(InvalidConfig, match="linear separable one, got nested from conv"):
        init_nested(nested, BottleneckUnit((6, 8, 8), 4, 4, topology="conv"), latents)
    with pytest.raises(InvalidConfig, match="starts from a separable one"):
        init_linear(nested, tail_of_ten(6), torch.randn(10, 6, 8, 8), task_metric=False)


def test_a_nested_unit_is_the_same_in_onnx_for_every_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unit = BottleneckUnit((6, 8, 12), 7, 4, topology="nested", hidden=5, group=(2, 1)).eval()
    for half, shape in ((unit.encoder, (6, 8, 12)), (unit.decoder, unit.latent_shape)):
        path = tmp_path / "half.onnx"
        path.write_bytes(to_onnx(half, shape))
        for n in (1, 3):
            x = torch.randn(n, *shape)
            with torch.no_grad():
                np.testing.assert_allclose(OnnxModule(path).run(x.numpy()), half(x).numpy(), atol=1e-4)


def test_the_fast_spread_is_the_transposed_convolution() -> None:
    unit = BottleneckUnit((6, 8, 8), 4, 4, filters=4)
    spread = unit.decoder.body.get_submodule("spatial")
    assert isinstance(spread, nn.ConvTranspose2d)
    t = torch.randn(3, 24, 2, 2)
    slow = F.conv_transpose2d(t, spread.weight, stride=4, groups=6)
    torch.testing.assert_close(spread(t), slow)


def expanding_tail() -> nn.Sequential:
    """A network that goes on with a 1x1 expansion and a batch norm, as inverted residual blocks do."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(24)
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(6, 24, 1, bias=False), norm, nn.ReLU6()), pool, nn.Linear(24, 10)
    ).eval()


def test_a_start_from_the_next_layer() -> None:
    tail = expanding_tail()
    features = torch.randn(400, 6, 4, 4) + torch.randn(400, 6, 1, 1)
    unit = BottleneckUnit((6, 4, 4), 24, 4, topology="inverted", hidden=24, filters=4).eval()
    init_next(unit, tail, features)
    with torch.no_grad():
        pooled = unit.encoder.body(features).flatten(1)
        torch.testing.assert_close(
            pooled, tail[1](tail[0](features)), atol=1e-4, rtol=1e-4
        )  # what the network itself pools
        latent = unit.encoder(features).flatten(1)
        assert latent.std(0).square().mean() == pytest.approx(1, abs=0.05)
        assert latent.mean(0).abs().max() < 0.05
        agreement = (tail(unit.decoder(unit.encoder(features))).argmax(1) == tail(features).argmax(1)).float().mean()
    assert agreement > 0.5  # ten classes


def test_starts_that_are_refused() -> None:
    features = torch.randn(50, 6, 4, 4)
    inverted = BottleneckUnit((6, 4, 4), 4, 4, topology="inverted", hidden=20)
    with pytest.raises(InvalidConfig, match="needs \\(20, 6, 1, 1\\)"):
        init_next(inverted, expanding_tail(), features)
    with pytest.raises(InvalidConfig, match="start from 'random'"):
        init_next(inverted, tail_of_ten(6), features)
    with pytest.raises(InvalidConfig, match="only an inverted or a block unit"):
        init_next(BottleneckUnit((6, 4, 4), 4, 4), expanding_tail(), features)
    with pytest.raises(InvalidConfig, match="their first layer is not linear"):
        init_linear(inverted, expanding_tail(), features, task_metric=False)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (5, 9)])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", [None, 5, 8])
def test_units_return_exactly_the_heads_size(size: tuple[int, int], stride: int, kernel: int | None) -> None:
    unit = BottleneckUnit((6, *size), 4, stride, kernel).eval()
    f = torch.randn(2, 6, *size)
    y, f_hat = unit(f, 0.5)
    assert f_hat.shape == f.shape
    assert tuple(y.shape[1:]) == unit.latent_shape == (4, -(-size[0] // stride), -(-size[1] // stride))


def test_geometries_that_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="use 1 to 7"):
        Geometry((7, 7), 8)
    with pytest.raises(InvalidConfig, match="would skip positions"):
        Geometry((7, 7), 4, 3)
    with pytest.raises(InvalidConfig, match="latent channels"):
        BottleneckUnit((4, 7, 7), 5, 2)


def test_rounding_passes_the_gradient_straight_through() -> None:
    unit = BottleneckUnit((6, 4, 4), 3, 2).eval()
    f = torch.randn(2, 6, 4, 4)
    y, f_hat = unit(f, 0.5)
    reference = unit.decoder(torch.round(y / 0.5) * 0.5)
    torch.testing.assert_close(f_hat, reference)
    f_hat.square().sum().backward()
    assert unit.encoder.mix.weight.grad is not None
    assert unit.encoder.mix.weight.grad.abs().sum() > 0


def test_a_linear_start_with_all_components_is_pooling_alone() -> None:
    """Rotation and its inverse cancel: nothing but the pooling is lost."""
    torch.manual_seed(1)
    features = torch.randn(200, 6, 8, 8)
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)).eval()
    for task_metric, stride, filters in ((False, 4, 1), (True, 4, 1), (False, 8, 4), (True, 8, 4)):
        unit = BottleneckUnit((6, 8, 8), 6 * filters, stride, filters=filters).eval()
        init_linear(unit, tail, features, task_metric=task_metric)
        f_hat = unit.decoder(unit.encoder(features))
        pooled = nn.functional.interpolate(nn.functional.avg_pool2d(features, 4), scale_factor=4)
        torch.testing.assert_close(f_hat, pooled, atol=2e-3, rtol=2e-3)


def test_pruned_channels_change_nothing() -> None:
    torch.manual_seed(2)
    unit = BottleneckUnit((6, 8, 8), 5, 4).eval()
    features = np.random.default_rng(0).normal(size=(50, 6, 8, 8)).astype(np.float16)
    with torch.no_grad():
        unit.encoder.mix_norm.weight[[1, 3]] = 1e-6
    point = UnitRecipe.model_validate(
        {"id": "p", "split": "s", "stride": 4, "channels": 5, "step": 0.05, "lambda": 1.0}
    )
    small, tables = prune_and_fit(unit, point, features)
    assert small.latent_shape == (3, 2, 2)
    assert tables.channels == 3
    f = torch.from_numpy(features.astype(np.float32))
    y, y_small = unit.encoder(f), small.encoder(f)
    torch.testing.assert_close(y[:, [0, 2, 4]], y_small)
    torch.testing.assert_close(unit.decoder(torch.round(y / 0.05)), small.decoder(torch.round(y_small / 0.05)))
    with pytest.raises(InvalidConfig, match="collapsed"):
        prune_channels(unit, torch.zeros(0, dtype=torch.int64))


def test_frozen_layers_stay_as_they_are() -> None:
    features = np.random.default_rng(0).normal(size=(64, 6, 4, 4)).astype(np.float16)
    point = UnitRecipe.model_validate(
        {
            "id": "p", "split": "s1", "stride": 4, "channels": 8, "step": 0.3, "lambda": 50.0, "topology": "inverted",
            "hidden": 24, "init": "next", "freeze": True,
        }
    )  # fmt: skip
    tail = expanding_tail().requires_grad_(requires_grad=False)
    unit = BottleneckUnit((6, 4, 4), 8, 4, topology="inverted", hidden=24).eval()
    init_next(unit, tail, torch.from_numpy(features.astype(np.float32)))
    before = {k: v.clone() for k, v in unit.state_dict().items()}
    train_unit(unit, tail, features, point, TrainingRecipe(steps=8, finish_steps=2, batch=16, warmup_steps=2))
    changed = {k for k, v in unit.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("encoder.body") for name in changed)
    assert {"encoder.mix.weight", "decoder.mix.weight"} <= changed
