"""The learned baselines, on a network of three stages and generated photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck_models.cli.main import app
from bitneck_models.learned.image_codec import ImageCodec, ImageCoder
from bitneck_models.learned.layers import Gdn
from bitneck_models.learned.recipe import ImageCodecRecipe, load_learned
from bitneck_models.learned.training import LearnedStep, train_codecs
from bitneck_models.losses.rate_terms import Noise, gaussian_bin_bits
from bitneck_models.training.photo_sets import photo_sets
from bitneck_testing.networks import run, small_backbone
from bitneck_testing.photographs import photo

SOURCES = """
backbone = "small"
[[data]]
folder = "photos"
validate_every = 4
[first]
steps = 6
batch = 4
precision = "float32"
[further]
steps = 3
batch = 4
precision = "float32"
"""
CODEC = 'kind = "scale_hyperprior"\nname = "codec"\nchannels = 4\nlatent_channels = 6\ncrop = 32\nlambdas = [1.0, 1e-4]'
STUDENT = """
kind = "entropic_student"
name = "student"
stage = "stem"
layers = ["stem", "body"]
encoder_channels = 4
latent_channels = 3
lambdas = [100.0, 1.0]
"""
TUNING = '[tuning]\nsteps = 3\nbatch = 4\nprecision = "float32"'


def write(folder: Path, *parts: str) -> str:
    (folder / "recipe.toml").write_text("\n".join(parts))
    return str(folder / "recipe.toml")


def label_photos(folder: Path, count: int) -> None:
    """Photographs for `small_backbone`, with classes."""
    folder.mkdir()
    for k in range(count):
        photo(100 + k, (60, 50)).save(folder / f"{k}.png")
    (folder / "labels.csv").write_text("file,index\n" + "".join(f"{k}.png,{k}\n" for k in range(count)))


@pytest.mark.parametrize(("name", "parts"), [("codec", (CODEC, SOURCES)), ("student", (STUDENT, SOURCES, TUNING))])
def test_a_learned_baseline_is_trained_once_and_measured(name: str, parts: tuple[str, ...], home: Path) -> None:
    label_photos(home / "eval", 6)
    arguments = ("learned", write(home, *parts), "--train-data", ".", "--data", "eval", "--workers", "0", "--json")
    document = json.loads(run(*arguments))
    assert document["images"] == 6
    assert document["train_photos"] == 15
    assert [p["codec"] for p in document["baselines"]] == [name] * 2
    assert all(p["bytes_mean"] > 0 and p["bpp"] == p["bytes_mean"] * 8 / 32**2 for p in document["baselines"])
    checkpoints = {path: path.stat().st_mtime_ns for path in (home / "runs" / name).iterdir()}
    assert len(checkpoints) == (2 if name == "codec" else 4)
    assert json.loads(run(*arguments)) == document
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
    photo(50).save(home / "photos" / "another.png")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InvalidConfig)
    assert "belongs to other photographs" in str(result.exception)


def large_codec() -> ImageCodec:
    """A codec of random weights whose symbols and standard deviations are of many sizes."""
    torch.manual_seed(0)
    codec = ImageCodec(8, 12).eval()
    with torch.no_grad():
        for layer, factor in ((codec.h_a[-1], 30.0), (codec.h_s[-2], 60.0)):
            layer.weight.mul_(factor)  # type: ignore[operator, union-attr]
        codec.h_s[-2].bias.fill_(6.0)  # type: ignore[operator, union-attr]
    return codec


def test_what_is_decoded_is_the_rounded_latent_and_costs_what_the_densities_say() -> None:
    codec, pictures = large_codec(), torch.rand(6, 3, 40, 56)  # neither side a multiple of 16
    y, z = codec.symbols(pictures)
    sigma = codec.sigma(torch.from_numpy(z).float(), y.shape[2:]).detach()
    assert np.abs(y).max() > 3
    assert sigma.max() > 2
    tables = FactorizedModel.fit(z)
    coder = ImageCoder(codec, tables)
    for k, x in enumerate(pictures):
        payloads = coder.encode(x[None])
        with torch.no_grad():
            expected = codec.g_s(torch.from_numpy(y[k : k + 1]).float())[:, :, :40, :56].clamp(0, 1)
        assert torch.equal(coder.decode(payloads, (40, 56)), expected)
        ideal = tables.ideal_bits(z[k]), gaussian_bin_bits(torch.from_numpy(y[k]).float(), sigma[k]).sum().item()
        for payload, bits in zip(payloads, ideal, strict=True):
            assert bits / 8 - 1 <= len(payload) <= 1.01 * bits / 8 + 4


def test_every_weight_of_the_codec_learns_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    codec = ImageCodec(8, 12)
    loss, rate, error = codec.loss(0.01, torch.rand(2, 3, 64, 64), Noise([1, 2]))
    assert loss.item() == pytest.approx(rate + 0.01 * error)
    loss.backward()
    still = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still


def test_a_run_that_was_cut_off_ends_with_the_same_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_learned(Path(write(home, CODEC, SOURCES)))
    assert isinstance(recipe, ImageCodecRecipe)
    backbone = small_backbone()
    sets = photo_sets(recipe, home, backbone)
    whole = train_codecs(recipe, backbone, sets, home / "whole", workers=0)
    monkeypatch.setattr("bitneck_models.learned.training._SAVE_EVERY", 2)

    for name, step in (("lambda-1", 5), ("lambda-2", 3)):

        def cut_off(told: LearnedStep, at: tuple[str, int] = (name, step)) -> None:
            if (told.run, told.step) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_codecs(recipe, backbone, sets, home / "cut", workers=0, report=cut_off)
    resumed = train_codecs(recipe, backbone, sets, home / "cut", workers=0)
    for ours, theirs in zip(resumed, whole, strict=True):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("simple", [False, True])
def test_an_inverse_normalization_multiplies_by_what_the_other_divides_by(simple: bool) -> None:
    x = torch.randn(2, 5, 3, 3)
    forward, inverse = Gdn(5, simple=simple), Gdn(5, inverse=True, simple=simple)
    torch.testing.assert_close(forward(x) * inverse(x), x * x)
    i = 2
    size = x.abs() if simple else x**2
    norm = 1 + 1e-6 + (size * forward.gamma[i].square()[None, :, None, None]).sum(1)
    torch.testing.assert_close(forward(x)[:, i], x[:, i] / (norm if simple else norm.sqrt()))


def test_what_is_refused(home: Path) -> None:
    label_photos(home / "eval", 3)
    for old, new, message in (
        ("[1.0, 1e-4]", "[1e-4, 1.0]", "the largest first"),
        ("crop = 32", "crop = 48", "do not fit into the input of small"),
        ("crop = 32", "crops = 32", "crops"),
        ('kind = "scale_hyperprior"', "", "kind must be one of scale_hyperprior, entropic_student"),
        ("crop = 32", "crop = 32\nseed = 1", "seed"),
    ):
        recipe = write(home, CODEC.replace(old, new), SOURCES)
        result = CliRunner().invoke(app, ["learned", recipe, "--train-data", ".", "--data", "eval"])
        assert isinstance(result.exception, InvalidConfig)
        assert message in str(result.exception)
    for old, new, message in (
        ('stage = "stem"', 'stage = "body"', "is before body"),
        ('stage = "stem"\nlayers = ["stem", "body"]', 'stage = "body"\nlayers = ["body"]', "a quarter of the input"),
        ('"body"]', '"bodies"]', "no stage 'bodies'"),
    ):
        recipe = write(home, STUDENT.replace(old, new), SOURCES, TUNING)
        result = CliRunner().invoke(app, ["learned", recipe, "--train-data", ".", "--data", "eval"])
        assert isinstance(result.exception, InvalidConfig)
        assert message in str(result.exception)


def test_the_shipped_recipes_are_read() -> None:
    folder = Path(__file__).parents[1] / "models" / "learned"
    kinds = {path.stem: load_learned(path).kind for path in folder.glob("*.toml")}
    assert kinds == {"scale_hyperprior": "scale_hyperprior", "entropic_student": "entropic_student"}
