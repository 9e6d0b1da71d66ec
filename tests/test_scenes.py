"""Scenes made from photographs, and conditional tables fitted to them: from the recipe to the bundle."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.conditional_codec import ConditionalCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig, UnknownPoint
from bitneck.manifest import InputSpec, sha256_hex
from bitneck_models.data.scenes import Camera, Path2D, moving, still
from bitneck_models.fitting.conditional import fit_conditional
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import save_point
from bitneck_models.zoo.records import ConditionalRecord, ContextRecord
from bitneck_testing.networks import keep_every_point, run
from bitneck_testing.photographs import photo
from bitneck_testing.tiny_bundles import INPUT

WIDE = InputSpec(
    height=24, width=40, resize=None, fit="stretch", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)


def change(frames: list[Image.Image]) -> float:
    pixels = [np.asarray(frame, dtype=np.float32) for frame in frames]
    return float(np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(pixels)]))


@pytest.mark.parametrize("size", [(48, 40), (40, 300), (33, 33), (299, 299)])
@pytest.mark.parametrize("spec", [INPUT, WIDE])
def test_scenes_are_repeatable_and_move_as_they_are_told(size: tuple[int, int], spec: InputSpec) -> None:
    picture, camera = photo(3, size), Camera(noise=1.0)

    def standing(noise: float = 1.0) -> list[Image.Image]:
        return list(still(picture, spec, Camera(noise=noise), 4, np.random.default_rng(1)))

    def going(speed: float, growth: float = 0.0) -> list[Image.Image]:
        path = Path2D(speed=speed, growth=growth)
        return list(moving(picture, spec, camera, path, 12, np.random.default_rng(1)))

    frames = standing()
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in standing()]
    assert abs(frames[0].width / frames[0].height - spec.width / spec.height) < 0.01
    assert change(frames) < change(standing(noise=8.0))
    assert change(frames) < change(going(0.05)) < change(going(0.2))
    assert len({frame.size for frame in going(0.3, growth=0.2)}) == 1  # it turns back at the edges


def test_tables_are_fitted_to_how_much_changes() -> None:
    rng = np.random.default_rng(0)
    before = np.rint(rng.laplace(size=(400, 5, 2, 2)) * np.array([0.2, 0.5, 1, 2, 4]).reshape(1, 5, 1, 1)).astype(int)
    little = np.where(rng.random(before.shape) < 0.05, before + rng.choice([-1, 1], before.shape), before)
    nothing_in_common = rng.permutation(before)
    tables = FactorizedModel.fit(np.concatenate([before, little, nothing_in_common]).astype(np.int32))
    pairs = [np.stack([before, after], axis=1) for after in (little, nothing_in_common)]
    model = fit_conditional(tables, pairs)
    assert model.to_npz() == fit_conditional(tables, pairs).to_npz()
    codec = ConditionalCodec("p", tables, model, (5, 2, 2))

    def bits(after: np.ndarray) -> tuple[float, float]:
        pairs = list(zip(before.astype(np.int32)[:100], after.astype(np.int32)[:100], strict=True))
        return (
            sum(tables.ideal_bits(b) for _, b in pairs),
            sum(codec.ideal_bits(b, codec.keep(a)) for a, b in pairs),
        )

    alone, similar = bits(little)
    assert similar < 0.4 * alone
    alone, similar = bits(nothing_in_common)
    assert similar < 1.03 * alone  # a bit for the motion, and little else
    assert model.keep[0].min() > model.keep[1].max()


def test_from_a_trained_entry_to_a_bundle_with_conditional_tables(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    keep_every_point(ZooEntry(home / "zoo"))
    run("export", "zoo", "--out", "bundle")
    assert not Bundle.open(home / "bundle").has_conditional
    assert "s1-r1" in run("similar", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "12")
    run("export", "zoo", "--out", "bundle")
    entry, bundle = ZooEntry(home / "zoo"), Bundle.open(home / "bundle")
    for point in entry.shipped():
        folder = entry.point_folder(point.id)
        record = ConditionalRecord.model_validate_json((folder / "conditional.json").read_bytes())
        assert record.photos == 12
        assert record.bytes_similar["still"] < record.bytes_alone["still"]
        assert record.conditional_sha256 == sha256_hex((folder / "conditional.npz").read_bytes())
        model = bundle.conditional(point.id)
        assert model is not None
        assert model.to_npz() == (folder / "conditional.npz").read_bytes()
    # Tables that are not the ones it was fitted to, a record that is lost, and a point that is trained anew.
    folder = entry.point_folder("s1-r1")
    tables = (folder / "tables.npz").read_bytes()
    (folder / "tables.npz").write_bytes((entry.point_folder("s1-r2") / "tables.npz").read_bytes())
    with pytest.raises(BundleCorrupt, match="fitted to other tables"):
        entry.conditional("s1-r1")
    with pytest.raises(InvalidConfig, match="export the entry again"):
        run("similar", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "10")
    (folder / "tables.npz").write_bytes(tables)
    (folder / "conditional.json").rename(home / "away.json")
    with pytest.raises(BundleCorrupt, match="no record beside it"):
        entry.conditional("s1-r1")
    (home / "away.json").rename(folder / "conditional.json")
    save_point(folder, entry.tables("s1-r1"), entry.points()["s1-r1"])
    assert entry.conditional("s1-r1") is None


def test_from_a_trained_entry_to_a_bundle_with_contexts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", "zoo", "--data", ".")
    keep_every_point(ZooEntry(home / "zoo"))
    run("export", "zoo", "--out", "bundle")
    fit = ("contexts", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "12")
    monkeypatch.setattr("bitneck_models.fitting.contexts._LEAST_SAVED", 1.0)
    assert "no" in run(*fit, "--point", "s1-r1", "--point", "s1-r1")
    with pytest.raises(UnknownPoint, match="s1-r9"):
        run(*fit, "--point", "s1-r9")
    run(*fit)
    entry = ZooEntry(home / "zoo")
    before = entry.points()
    fitted = {name for name in before if (entry.point_folder(name) / "contexts.json").is_file()}
    assert fitted
    assert all(entry.contexts(name) is None for name in before)
    monkeypatch.setattr("bitneck_models.fitting.contexts._LEAST_SAVED", -1.0)
    records = json.loads(run(*fit, "--json"))
    run("export", "zoo", "--out", "bundle")
    bundle = Bundle.open(home / "bundle")
    assert set(records) == fitted
    for name in fitted:
        record = ContextRecord.model_validate(records[name])
        model = bundle.contexts(name, bundle.tables(name))
        assert model is not None
        assert record.contexts_sha256 == sha256_hex(model.to_npz())
        assert entry.points()[name].validation_bytes == record.bytes_contexts
    folder = entry.point_folder(min(fitted))
    whole = (folder / "contexts.npz").read_bytes()
    (folder / "contexts.npz").write_bytes(whole[:-1])
    with pytest.raises(BundleCorrupt, match=r"contexts\.npz is not what its record is about"):
        entry.contexts(min(fitted))
    (folder / "contexts.npz").write_bytes(whole)
    # Contexts of other tables, a record that is lost, and a point that is fitted anew.
    name = min(fitted)
    folder = entry.point_folder(name)
    tables = (folder / "tables.npz").read_bytes()
    (folder / "tables.npz").write_bytes(entry.tables(max(set(before) - {name})).to_npz())
    for ask in (lambda: entry.contexts(name), entry.points):
        with pytest.raises(BundleCorrupt, match="run `bitneck-models contexts` again"):
            ask()
    (folder / "tables.npz").write_bytes(tables)
    (folder / "contexts.json").rename(home / "away.json")
    with pytest.raises(BundleCorrupt, match="no record beside it"):
        entry.contexts(name)
    (home / "away.json").rename(folder / "contexts.json")
    save_point(folder, entry.tables(name), entry.points()[name])
    assert entry.contexts(name) is None


def test_photographs_too_small_for_scenes_are_told(home: Path) -> None:
    run("train", "zoo", "--data", ".", "--unit", "s1-r2")
    run("export", "zoo", "--out", "bundle")
    for path in (home / "photos").iterdir():
        photo(0, (20, 20)).save(path)
    with pytest.raises(InvalidConfig, match="of the input's size"):
        run("similar", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "10")
