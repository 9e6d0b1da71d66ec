"""Units with a light encoder and a heavy decoder, and units that serve a range of steps."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck_models.losses.rate_terms import RateKind, build_rate
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.training.unit import StepReport, train_unit
from bitneck_models.units.layers import split_prelus
from bitneck_models.units.prune import prune_channels
from bitneck_models.units.starts import init_blocks, init_deeper, init_linear, init_next
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """An inverted residual block: 1x1 to 24 channels, depthwise 3x3, 1x1 to 5."""

    def __init__(self, stride: int, *, shortcut: bool = False) -> None:
        super().__init__()
        self.shortcut = shortcut
        outputs = 6 if shortcut else 5
        self.layers = nn.Sequential(
            nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, stride, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, f: Tensor) -> Tensor:
        g: Tensor = self.layers(f)
        return f + g if self.shortcut else g


def tail_with(block: Block) -> nn.Sequential:
    """A network that goes on with an inverted residual block."""
    outputs = 6 if block.shortcut else 5
    return nn.Sequential(block, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(outputs, 10)).eval()


def features(count: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 6, 7, 7) + 2 * torch.randn(count, 6, 1, 1)


def unit_of(stride: int, **options: object) -> BottleneckUnit:
    return BottleneckUnit((6, 7, 7), 8, stride, 3, 1, "block", 24, **options).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(("stride", "pool"), [(1, 1), (3, 3)])
def test_a_block_unit_starts_as_a_copy_of_the_networks_next_block(stride: int, pool: int) -> None:
    torch.manual_seed(3)
    block = Block(1)
    tail = tail_with(block).requires_grad_(requires_grad=False)
    unit = unit_of(stride, pool=pool, decoder_blocks=(1, 1))
    f = features(300)
    init_next(unit, tail, f)
    with torch.no_grad():
        torch.testing.assert_close(unit.encoder.body[:-1](f), block.layers[:6](f), atol=1e-4, rtol=1e-4)
        y = unit.encoder(f)
        assert (
            tuple(y.shape[1:])
            == unit.latent_shape
            == (8, 7 // stride + (7 % stride > 0), 7 // stride + (7 % stride > 0))
        )
        assert y.square().mean(dim=(0, 2, 3)).mean() == pytest.approx(1, abs=0.1)
        if pool == 1:  # what the block projects to is in the latent
            g = block(f).transpose(0, 1).flatten(1)
            latent = torch.cat([y.transpose(0, 1).flatten(1), torch.ones(1, g.shape[1])])
            fit = torch.linalg.lstsq(latent.T, g.T).solution
            assert (latent.T @ fit - g.T).square().mean() < 0.02 * g.var()


def test_starts_from_the_next_block_that_are_refused() -> None:
    torch.manual_seed(3)
    f = features(60)
    with pytest.raises(InvalidConfig, match="kernel 3 and the stride 2, the unit's 3 and 1"):
        init_next(unit_of(1), tail_with(Block(2)), f)
    with pytest.raises(InvalidConfig, match="more than three layers"):
        init_next(unit_of(1), tail_with(Block(1, shortcut=True)), f)
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(6, 24, 1), nn.BatchNorm2d(24)), nn.Flatten(), nn.Linear(24 * 49, 10))
    with pytest.raises(InvalidConfig, match="no inverted residual block"):
        init_next(unit_of(1), plain.eval(), f)
    with pytest.raises(InvalidConfig, match="their first layer is not linear"):
        init_linear(unit_of(1), tail_with(Block(1)), f, task_metric=False)


@pytest.mark.parametrize("topology", ["separable", "block"])
def test_residual_blocks_begin_as_the_identity_and_can_be_pruned(topology: str) -> None:
    f = features(40)
    options = {"topology": topology, "hidden": 24 if topology == "block" else None}
    unit = BottleneckUnit((6, 7, 7), 6, 1, decoder_blocks=(2, 1), **options).eval()  # type: ignore[arg-type]
    if topology == "separable":
        init_linear(unit, tail_with(Block(1)), f, task_metric=False)
        with torch.no_grad():
            torch.testing.assert_close(unit(f, 1e-4)[1], f, atol=0.05, rtol=0.05)
    small = prune_channels(unit, torch.tensor([0, 2, 5]))
    y = unit.encoder(f)
    y[:, [1, 3, 4]] = 0
    torch.testing.assert_close(small.decoder(small.encoder(f)), unit.decoder(y), atol=1e-4, rtol=1e-4)


def trained(unit: BottleneckUnit, **options: object) -> list[StepReport]:
    recipe = UnitRecipe.model_validate(
        {
            "id": "p", "split": "s1", "stride": 1, "channels": 8, "kernel": 3, "step": 0.3, "lambda": 50.0,
            "topology": "block", "hidden": 24, "init": "next", "task": [{"kind": "kl"}], **options,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    tail = tail_with(Block(1)).requires_grad_(requires_grad=False)
    reports: list[StepReport] = []
    schedule = TrainingRecipe(steps=30, finish_steps=10, batch=16, warmup_steps=5, precision="float32")
    train_unit(unit, tail, features(64).numpy().astype(np.float16), recipe, schedule, report=reports.append)
    return reports


def test_a_frozen_encoder_stays_as_it_is() -> None:
    unit = unit_of(1, decoder_blocks=(1, 1))
    before = {k: v.clone() for k, v in unit.state_dict().items()}
    trained(unit, freeze="encoder")
    changed = {k for k, v in unit.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(name.startswith("encoder") for name in changed)
    assert {"decoder.mix.weight", "decoder.body.coarse.0.spatial.weight"} <= changed


def test_a_unit_of_many_steps_is_rounded_at_steps_over_its_whole_range() -> None:
    unit = unit_of(1)
    steps: list[float] = []
    unit.register_forward_pre_hook(lambda _unit, given: steps.append(given[1] / 0.3))
    trained(unit, multiples=(0.5, 4))
    assert min(steps) >= 0.5
    assert max(steps) <= 4
    assert np.quantile(steps, [0.25, 0.75]) == pytest.approx([0.84, 2.38], rel=0.35)  # evenly on a logarithmic scale
    again = unit_of(1)
    reports = trained(again, multiples=(0.5, 4))
    assert reports == trained(unit_of(1), multiples=(0.5, 4))


def test_multiples_that_are_refused() -> None:
    with pytest.raises(ValueError, match="smallest one 2 is above the largest 1"):
        trained(unit_of(1), multiples=(2, 1))


@pytest.mark.parametrize("kind", ["hyperprior", "factorized", "l1"])
def test_wider_bins_cost_about_the_logarithm_less(kind: RateKind) -> None:
    """A density that is fitted at one step is right at others: doubling a small step saves a bit a value."""
    torch.manual_seed(0)
    rate = build_rate(kind, 4)
    y = torch.randn(200, 4, 5, 5) * 6
    optimizer = torch.optim.Adam(rate.parameters(), lr=3e-2)
    rate.fit_scale(y.std(dim=(0, 2, 3)))
    for _ in range(60):
        optimizer.zero_grad()
        loss = rate(y, 1.0).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        fine, coarse = (rate(y, 1.0, multiple, hard=True).mean().item() for multiple in (1.0, 2.0))
    assert fine - coarse == pytest.approx(100, rel=0.15)


def test_a_decoder_is_exported_as_onnx_runtime_computes_it_fastest() -> None:
    torch.manual_seed(0)
    unit = unit_of(2, decoder_blocks=(1, 1))
    prelus = [module for module in unit.decoder.modules() if isinstance(module, nn.PReLU)]
    for prelu in prelus:
        nn.init.uniform_(prelu.weight, -1, 2)
    model = onnx.load_from_string(to_onnx(split_prelus(unit.decoder), unit.latent_shape))
    kinds = {node.op_type for node in model.graph.node}
    assert prelus
    assert "ConvTranspose" in kinds
    assert not kinds & {"PRelu", "Einsum"}
    assert [module for module in unit.decoder.modules() if isinstance(module, nn.PReLU)] == prelus
    y_hat = torch.randn(3, *unit.latent_shape)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": y_hat.numpy()})[0]), unit.decoder(y_hat))


@pytest.mark.parametrize(("channels", "stride", "kernel"), [(8, 2, 2), (5, 2, 3)])
def test_a_deeper_unit_starts_as_the_unit_that_it_starts_from(channels: int, stride: int, kernel: int) -> None:
    def made(latent: int, **options: object) -> BottleneckUnit:
        return BottleneckUnit((6, 7, 7), latent, stride, kernel, 1 if kernel > stride else 4, **options).eval()  # type: ignore[arg-type]

    torch.manual_seed(5)
    source, unit = made(channels), made(channels, decoder_blocks=(2, 1), decoder_width=10)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    init_deeper(unit, source)
    f = features(3)
    with torch.no_grad():
        for got, expected in zip(unit(f, 0.5), source(f, 0.5), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.02)  # batch norms divide by sqrt(1 + 1e-5)


def test_a_unit_starts_from_one_with_other_blocks() -> None:
    """The blocks that both have are taken over; more of them change nothing."""

    def made(*blocks: int) -> BottleneckUnit:
        return BottleneckUnit((6, 8, 8), 5, 2, 2, 4, decoder_blocks=blocks, decoder_width=10).eval()  # type: ignore[arg-type]

    torch.manual_seed(6)
    source, fewer, more = made(2, 1), made(1, 0), made(3, 1)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    init_blocks(fewer, source)
    init_blocks(more, source)
    f = torch.rand(3, 6, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(more(f, 0.5), source(f, 0.5))
        assert fewer.decoder(source.encoder(f)).isfinite().all()
    own, theirs = fewer.decoder.state_dict(), source.decoder.state_dict()
    assert {key.split(".")[2] for key in theirs.keys() - own.keys() if "coarse" in key} == {"1"}
    assert all(torch.equal(value, theirs[key]) for key, value in own.items())
