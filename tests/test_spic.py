"""Checkpoints of the paper's authors: geometry, golden values through the exported files, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck_models.cli.main import app
from bitneck_models.spic.checkpoint import SpicUnit, load_spic
from bitneck_models.spic.places import PLACES, spic_geometry
from bitneck_models.spic.point import load_features, write_spic_point
from bitneck_models.spic.record import SpicRecord
from bitneck_testing.networks import checkpoint, saved

ROOT = Path(__file__).resolve().parent.parent
SPIC = Path(os.environ.get("BITNECK_SPIC", ROOT.parent / "shared" / "spic"))
INDEX: list[dict[str, Any]] = json.loads((SPIC / "index.json").read_text()) if (SPIC / "index.json").is_file() else []

needs_spic = pytest.mark.skipif(not INDEX, reason=f"no checkpoints of the authors at {SPIC}; set BITNECK_SPIC")

UNITS = [(b, s, stride) for b, places in PLACES.items() for s, place in places.items() for stride in place.decoders]


def small(tmp_path: Path, **options: Any) -> tuple[SpicUnit, dict[str, Tensor], Path]:
    """DeepLab's s1 at stride 8: the cheapest of all."""
    state = checkpoint(256, 4, 9, **options)
    path = saved(tmp_path / "unit.pth.tar", state)
    return load_spic(path, backbone="deeplabv3_resnet50", split="s1", step=0.5, stride=8), state, path


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def run(model: bytes | Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options)
    out: np.ndarray[Any, Any] = session.run(None, {"x": x.astype(np.float32)})[0]
    return out


@pytest.mark.parametrize(("backbone", "split", "stride"), UNITS)
def test_every_unit_of_the_authors_has_a_geometry(tmp_path: Path, backbone: str, split: str, stride: int) -> None:
    """What the formula says is what the layers give; a decoder returns the feature's size, but for ResNet's s3."""
    place = PLACES[backbone][split]
    path = saved(tmp_path / "x.pth.tar", checkpoint(place.channels, 12, place.decoders[stride][0]))
    unit = load_spic(path, backbone=backbone, split=split, step=1.0, stride=stride)
    g = unit.geometry
    f = torch.zeros(1, *g.feature_shape, device="meta")
    y = unit.encoder.to("meta")(f)
    assert tuple(y.shape[1:]) == g.latent_shape
    assert tuple(unit.decoder.to("meta")(y).shape[1:]) == g.output_shape
    expected = {2: 15, 4: 17, 6: 17}[stride] if (backbone, split) == ("resnet50", "s3") else place.size
    assert g.output_shape == (place.channels, expected, expected)


def test_both_halves_compute_what_the_authors_do(tmp_path: Path) -> None:
    """Through the exported files, at the network's own feature size and at another, against plain functions."""
    unit, state, path = small(tmp_path)
    record = write_spic_point(unit, tmp_path / "point", checkpoint=path.name)
    assert (record.latent_shape, record.output_shape, record.estimate) == ((4, 8, 8), (256, 65, 65), None)
    rng = np.random.default_rng(1)
    for count, size in ((1, (65, 65)), (3, (25, 33))):
        f = rng.normal(size=(count, 256, *size)).astype(np.float32)
        t = norm(state, "bn2_1", F.conv2d(torch.from_numpy(f), state["conv2_2.weight"], stride=8, groups=256)).relu()
        y = norm(state, "bn3_1", F.conv2d(t, state["conv2_3.weight"])).relu()
        got = run(tmp_path / "point" / "encoder.onnx", f)
        np.testing.assert_allclose(got, y.numpy(), atol=1e-5, rtol=1e-4)
        t = norm(state, "bn4_1", F.conv_transpose2d(y, state["conv2_4.weight"])).relu()
        t = norm(state, "bn5_1", F.conv_transpose2d(t, state["conv2_5.weight"], stride=8, groups=256)).relu()
        decoded = run(tmp_path / "point" / "decoder.onnx", y.numpy())
        np.testing.assert_allclose(decoded, t.numpy(), atol=1e-4, rtol=1e-4)


def test_the_authors_rate_estimator_runs_in_ours(tmp_path: Path) -> None:
    """Their latent is not in units of the step, and their density has one unit a layer."""
    unit, state, _ = small(tmp_path)
    y = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(2)).relu()
    h = F.conv2d(y, state["priorEncoder.conv1.weight"], state["priorEncoder.conv1.bias"], padding=1, groups=4)
    h = norm(state, "priorEncoder.bn1", h).relu()
    z = F.conv2d(h, state["priorEncoder.conv2.weight"], state["priorEncoder.conv2.bias"])
    z = torch.round(norm(state, "priorEncoder.bn2", z))

    def cumulative(v: Tensor) -> Tensor:
        for k in range(1, 5):
            v = v * F.softplus(state[f"bitEstimator_z.f{k}.h"]) + state[f"bitEstimator_z.f{k}.b"]
            if k < 4:
                v = v + torch.tanh(v) * torch.tanh(state[f"bitEstimator_z.f{k}.a"])
        return torch.sigmoid(v)

    hyper = -torch.log2((cumulative(z + 0.5) - cumulative(z - 0.5)).clamp(1e-9)).sum()
    u = F.conv_transpose2d(z, state["priorDecoder.deconv1.weight"], state["priorDecoder.deconv1.bias"])
    u = norm(state, "priorDecoder.bn1", u).relu()
    u = F.conv_transpose2d(
        u, state["priorDecoder.deconv2.weight"], state["priorDecoder.deconv2.bias"], padding=1, groups=4
    )
    sigma = norm(state, "priorDecoder.bn2", u).exp().double()
    s = torch.round(y / 0.5).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf((s + 0.5) / sigma) - normal.cdf((s - 0.5) / sigma)
    bits = hyper - torch.log2(p.clamp(1e-9)).sum()
    assert unit.estimated_bits(y) == pytest.approx(float(bits) / 5, rel=1e-3)
    assert unit.prior_trained
    assert not small(tmp_path, trained=False)[0].prior_trained


def test_an_imported_point_with_features(tmp_path: Path) -> None:
    unit, _, path = small(tmp_path, trained=False)
    np.save(tmp_path / "features.npy", np.random.default_rng(3).normal(size=(20, 256, 17, 17)).astype(np.float16))
    out = tmp_path / "point"
    arguments = ["import-spic", str(path), "--backbone", "deeplabv3_resnet50", "--split", "s1", "--step", "0.5"]
    arguments += ["--stride", "8", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--features", str(tmp_path / "features.npy")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "never trained" in result.stdout
    assert "no split point" in result.stdout
    record = SpicRecord.read(out)
    assert record.estimate is not None
    assert record.estimate.features == 20
    tables = FactorizedModel.from_npz((out / "tables.npz").read_bytes())
    features = load_features(tmp_path / "features.npy")
    symbols = np.rint(run(out / "encoder.onnx", np.asarray(features)) / np.float32(0.5)).astype(np.int32)
    assert tables.channels == 4
    assert record.estimate.tables_bits == pytest.approx(np.mean([tables.ideal_bits(s) for s in symbols]))
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (document["estimate"], document["checkpoint"], document["prior_trained"]) == (None, "unit.pth.tar", False)
    assert not (out / "tables.npz").exists()  # imported again, without features
    (out / "decoder.onnx").write_bytes(b"x")
    with pytest.raises(BundleCorrupt, match=r"decoder\.onnx is not the file"):
        SpicRecord.read(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "unit.safetensors").touch()
    with pytest.raises(InvalidConfig, match="no imported point"):
        write_spic_point(unit, tmp_path / "other", checkpoint="x")


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = checkpoint(256, 4, 9)
    path = tmp_path / "x.pth.tar"

    def refused(message: str, **changes: Any) -> None:
        arguments = {"backbone": "deeplabv3_resnet50", "split": "s1", "step": 1.0, "stride": 8} | changes
        with pytest.raises(InvalidConfig, match=message) as caught:
            load_spic(path, **arguments)
        assert "\n" not in str(caught.value)

    refused("no such checkpoint")
    path.write_bytes(b"not a checkpoint at all")
    refused("is no checkpoint|not readable")
    whole = saved(path, good).read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("not readable as a checkpoint|is no checkpoint")
    torch.save({"state_dict": good | {"conv2_2.weight": Exploit()}}, path)
    refused("no code in it was run")
    path.write_bytes(pickle.dumps(Exploit()))
    refused("no code in it was run")
    assert not (tmp_path / "exploited").exists()
    torch.save([good], path)
    refused("no state dict")
    torch.save({"state_dict": {"conv2_2.weight": "text"}}, path)
    refused("no state dict")
    saved(path, {k: v for k, v in good.items() if k != "bn5_1.running_var"})
    refused(r"1 keys missing, such as bn5_1.running_var")
    saved(path, good | {"fc.weight": torch.zeros(3)})
    refused(r"1 keys not expected, such as fc.weight")
    saved(path, {"fc.weight": torch.zeros(3)})
    refused("keys missing.*; 1 keys not expected")
    saved(path, good | {"conv2_4.weight": torch.zeros(256, 4, 1, 1)})
    refused(r"conv2_4.weight has shape \(256, 4, 1, 1\), expected \(4, 256, 1, 1\)")
    saved(path, good | {"conv2_2.weight": torch.zeros(256)})
    refused("expected four dimensions")
    saved(path, good | {"priorEncoder.conv2.weight": torch.zeros(16, 4, 1, 1)})
    refused("priorEncoder.conv2.weight has shape")
    saved(path, good | {"bn3_1.bias": torch.full((4,), float("nan"))})
    refused("bn3_1.bias has values that are not finite")
    saved(path, good | {"bn3_1.running_var": -torch.ones(4)})
    refused("negative variance")
    saved(path, good | {"bn3_1.bias": torch.zeros(4, dtype=torch.float16)})
    refused(r"bn3_1.bias is torch.float16")
    saved(path, good)
    refused("try stride 8", stride=4)
    refused("stride 2 has no unit at s1", stride=2)
    refused("no unit at 's4'", split="s4")
    refused("no units for 'vgg16'", backbone="vgg16")
    refused("expected a positive number", step=0.0)
    refused("expected a positive number", step=float("nan"))
    saved(path, checkpoint(256, 4, 5))
    refused("a unit for 256 channels, the feature at s2 of deeplabv3_resnet50 has 2048", split="s2", stride=4)
    with pytest.raises(InvalidConfig, match="another network's or split point's"):
        spic_geometry("resnet50", "s1", 2, 32, 9)


def test_features_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npy"
    with pytest.raises(InvalidConfig, match="not readable"):
        load_features(path)
    for content in (np.zeros((3, 4), np.float32), np.zeros((1, 2, 3, 4), np.int64), np.zeros((0, 2, 3, 4), np.float32)):
        np.save(path, content)
        with pytest.raises(InvalidConfig, match="expected floating point"):
            load_features(path)
    np.save(path, np.array([Exploit()], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidConfig, match="not readable"):
        load_features(path)
    np.savez(tmp_path / "f.npz", latent=np.zeros(3))
    with pytest.raises(InvalidConfig, match="it has: latent"):
        load_features(tmp_path / "f.npz")
    np.savez(tmp_path / "f.npz", feature=np.zeros((2, 3, 4), np.float16))
    assert load_features(tmp_path / "f.npz").shape == (1, 2, 3, 4)
    unit, _, _ = small(tmp_path)
    with pytest.raises(InvalidConfig, match="expected \\(256, 65, 65\\)"):
        write_spic_point(unit, tmp_path / "p", checkpoint="x", features=np.zeros((1, 64, 9, 9), np.float32))
    with pytest.raises(InvalidConfig, match="not finite"):
        write_spic_point(unit, tmp_path / "p", checkpoint="x", features=np.full((1, 256, 9, 9), np.inf, np.float32))


@needs_spic
@pytest.mark.parametrize("entry", INDEX, ids=lambda e: f"{e['task']}-{e['split']}-{e['index']}")
def test_published_checkpoints_give_their_golden_values(entry: dict[str, Any], tmp_path: Path) -> None:
    """Through the exported files: symbols equal but next to a rounding boundary, decoded features within 1e-4."""
    name = f"{entry['task']}-{entry['split']}-{entry['index']}"
    path = SPIC / f"{name}.pth.tar"
    unit = load_spic(
        path,
        backbone={"classification": "resnet50", "segmentation": "deeplabv3_resnet50"}[entry["task"]],
        split=entry["split"].lower().removeprefix("u"),
        step=entry["step"],
        stride=entry["stride"],
    )
    g = unit.geometry
    assert [list(shape) for shape in (g.feature_shape, g.latent_shape, g.output_shape)] == [
        entry["feature_shape"], entry["latent_shape"], entry["output_shape"],
    ]  # fmt: skip
    assert not unit.prior_trained
    golden_path = SPIC / f"{name}.golden.npz"
    if not golden_path.is_file():
        return
    golden = np.load(golden_path)
    features = load_features(golden_path)
    record = write_spic_point(unit, tmp_path / "p", checkpoint=path.name, features=features)
    assert record.estimate is not None
    assert record.estimate.estimated_bits > 0
    y = run(tmp_path / "p" / "encoder.onnx", np.asarray(features))[0]  # (Cr, h, w)
    np.testing.assert_allclose(y, golden["latent"], atol=1e-4 * np.abs(golden["latent"]).max())
    ratio = y / np.float32(entry["step"])
    boundary = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-4
    assert np.array_equal(np.rint(ratio)[~boundary], golden["symbols"][~boundary])
    y_hat = golden["symbols"].astype(np.float32) * np.float32(entry["step"])
    decoded = run(tmp_path / "p" / "decoder.onnx", y_hat[None])[0]
    assert decoded.shape == golden["decoded"].shape
    assert np.abs(decoded - golden["decoded"]).max() <= 1e-4 * np.abs(golden["decoded"]).max()
