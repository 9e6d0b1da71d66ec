"""Units and operating points: more steps of a unit, what a ladder keeps, shared layers, and zoo entries of old."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder
from bitneck.errors import BundleCorrupt, InvalidConfig, UnknownPoint
from bitneck.image import preprocess
from bitneck.runtime import ModulePool
from bitneck_edge.encoder import EdgeEncoder
from bitneck_models.cli.main import app
from bitneck_models.export.bundle import export_bundle
from bitneck_models.export.proof import proof_images
from bitneck_models.training.steps import point_id
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.selection import successors
from bitneck_models.zoo.upgrade import upgrade_entry
from bitneck_testing.networks import RECIPE, keep_every_point, run, small_backbone
from bitneck_testing.photographs import photo

# Steps


def test_one_unit_many_rates(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    document = json.loads(
        run("steps", "zoo/units/s1-r2", "--steps", "1,2,4", "--data", ".", "--photos", "12", "--json")
    )
    rows = {row["point"]: row for row in document["points"]}
    assert {name for name, row in rows.items() if row["new"]} == {"s1-r2-x2", "s1-r2-x4"}
    assert rows["s1-r2-x4"]["bytes"] < rows["s1-r2-x2"]["bytes"] < rows["s1-r2"]["bytes"]
    entry = ZooEntry(home / "zoo")
    assert entry.points()["s1-r2-x2"].step == pytest.approx(0.2)
    keep_every_point(entry)
    run("export", "zoo", "--out", "bundle")
    bundle = Bundle.open(home / "bundle")
    manifest = bundle.manifest
    assert {point.id: point.unit for point in manifest.points} == {
        "s1-r1": "s1-r1", "s1-r2": "s1-r2", "s1-r2-x2": "s1-r2", "s1-r2-x4": "s1-r2",
    }  # fmt: skip
    assert len([path for path in manifest.files if path.startswith("units/s1-r2/")]) == 2
    pool = ModulePool()
    encoder = EdgeEncoder(bundle, threads=1, pool=pool)
    sizes = {}
    for point in ("s1-r2", "s1-r2-x2", "s1-r2-x4"):  # a switch among points of one unit loads nothing
        sizes[point] = len(encoder.encode(photo(3, (60, 50)), point).encoded.payload)
        assert pool.loads == 2  # the head and the encoder
        assert len(encoder._encoders) == 3
    assert sizes["s1-r2-x4"] < sizes["s1-r2"]
    encoder.encode(photo(3, (60, 50)), "s1-r1")
    assert pool.loads == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo/units/s1-r2", "--steps", "two"], "expected numbers with commas"),
        (["zoo/units/s1-r2", "--steps", "1000"], "1/64 to 64"),
        (["zoo/units/s1-r2", "--steps", "-1"], "1/64 to 64"),
        (["zoo/units/s9"], "has no unit 's9'"),
        (["zoo"], "folders of units of one zoo entry"),
        (["zoo/units/s1-r2"], "is not trained yet"),
    ],
)
def test_steps_that_are_refused(home: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        CliRunner().invoke(app, ["steps", *arguments, "--data", str(home)], catch_exceptions=False)


def test_ids_say_the_multiple() -> None:
    assert [point_id("s1-r6", m) for m in (1, 1.41, 2.0, 0.5)] == ["s1-r6", "s1-r6-x1.41", "s1-r6-x2", "s1-r6-x0.5"]


# What a ladder keeps


@dataclass(frozen=True)
class Point:
    split: str
    validation_bytes: float
    validation_agreement: float


def test_a_ladder_keeps_what_no_other_point_of_its_split_beats() -> None:
    points = {
        "low": Point("s1", 10, 0.5),
        "beaten": Point("s1", 20, 0.4),
        "same": Point("s1", 10, 0.5),
        "high": Point("s1", 30, 0.9),
        "dear": Point("s1", 40, 0.9),
        "early": Point("s2", 99, 0.3),
        "gone": Point("s1", 25, 0.7),
        "best": Point("s1", 90, 0.99),
        "other": Point("s9", 1, 0.1),
    }
    candidates = {name: p for name, p in points.items() if name not in ("gone", "best", "other")}
    assert successors(points, candidates) == {
        "beaten": "low",  # the cheapest that agrees as often
        "same": "low",  # of two equals the first by id
        "dear": "high",
        "gone": "high",
        "best": "high",  # none agrees as often: the one that agrees most
        "other": "low",  # nothing is left of its split point: the cheapest that agrees as often
    }
    assert successors(points, {}) == {}
    rest = {name: p for name, p in points.items() if name not in candidates}
    assert successors(points, candidates, compete=False).keys() == rest.keys()  # a study keeps every candidate


def test_a_study_ships_also_the_points_that_others_beat(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    entry = ZooEntry(home / "zoo")
    keep_every_point(entry)
    low, high = sorted(entry.points().items(), key=lambda item: item[1].validation_bytes)
    beaten = high[1].model_copy(update={"validation_agreement": low[1].validation_agreement / 2})
    (entry.point_folder(high[0]) / "point.json").write_text(beaten.model_dump_json())
    run("export", "zoo", "--out", "ladder")
    recipe = home / "zoo" / "recipe.toml"
    recipe.write_text("study = true\n" + recipe.read_text())
    run("export", "zoo", "--out", "study")
    points = {name: [p.id for p in Bundle.open(home / name).manifest.points] for name in ("ladder", "study")}
    assert points["ladder"] == [low[0]]
    assert sorted(points["study"]) == ["s1-r1", "s1-r2"]


def test_a_retired_point_is_refused_with_the_name_of_its_successor(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    entry = ZooEntry(home / "zoo")
    keep_every_point(entry)
    recipe = home / "zoo" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('id = "s1-r1"', 'id = "s1-r1"\nship = false'))
    run("export", "zoo", "--out", "bundle")
    ladder = Bundle.open(home / "bundle").manifest.ladder
    assert [point.id for point in ladder] == ["s1-r2"]
    with pytest.raises(UnknownPoint, match=r"s1-r1 is retired; this bundle has s1-r2 in its place"):
        ladder["s1-r1"]


# Layers that encoders share


def test_a_frozen_layer_that_two_encoders_begin_with_is_one_file(home: Path) -> None:
    text = RECIPE.replace('init = "principal"', 'topology = "inverted"\nhidden = 24\ninit = "random"\nfreeze = true')
    text = text.replace("step = 0.1", "step = 0.01").replace("step = 0.3", "step = 0.02")
    text = text.replace('init = "s1-r2"', 'topology = "inverted"\nhidden = 24\nfreeze = true\ninit = "s1-r2"')
    (home / "zoo" / "recipe.toml").write_text(text)
    run("train", "zoo", "--data", ".")
    entry, backbone = ZooEntry(home / "zoo"), small_backbone()
    keep_every_point(entry)
    bundle, proof = export_bundle(entry, backbone, home / "bundle", proof_images(backbone.input, home / "photos"))
    manifest = bundle.manifest
    assert [unit.layer for unit in manifest.units] == ["s1-0", "s1-0"]
    assert [path for path in manifest.files if path.startswith("layers/")] == ["layers/s1-0.onnx"]
    assert set(proof.encoders) == {"s1-r1", "s1-r2"}  # through both files
    assert proof.worst < 1e-4
    # Other weights in that layer: each encoder is whole again.
    unit = entry.unit(backbone, entry.recipe.unit("s1-r1"))
    with torch.no_grad():
        unit.encoder.body[0].weight.mul_(1.5)
    replaced: dict[str, BottleneckUnit] = {"s1-r1": unit}
    original = ZooEntry.unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZooEntry, "unit", lambda self, b, r: replaced.get(r.id) or original(self, b, r))
        bundle, _ = export_bundle(entry, backbone, home / "bundle", proof_images(backbone.input, home / "photos"))
    assert [unit.layer for unit in bundle.manifest.units] == [None, None]
    f = backbone.head("s1")(torch.from_numpy(preprocess(photo(1, (60, 50)), backbone.input)))
    with torch.no_grad():
        expected = unit.encoder(f).numpy()
    got = PointEncoder(bundle, bundle.manifest.ladder["s1-r1"]).latent(f.detach().numpy())
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


# Zoo entries of the format before


def old_entry(home: Path) -> None:
    """Turn the trained entry into one of the format before."""
    zoo = home / "zoo"
    for folder in sorted((zoo / "units").iterdir()):
        point = zoo / "points" / folder.name
        record = json.loads((folder / "record.json").read_text())
        fitted = json.loads((point / "point.json").read_text())
        for key in ("validation_photos", "validation_bytes", "validation_agreement", "tables_sha256"):
            record[key] = fitted[key]
        (point / "record.json").write_text(json.dumps(record))
        (folder / "unit.safetensors").rename(point / "unit.safetensors")
        (point / "point.json").unlink()
    shutil.rmtree(zoo / "units")
    recipe = zoo / "recipe.toml"
    recipe.write_text("# ours\n" + recipe.read_text().replace("[[units]]", "[[points]]  # a point"))


def test_an_old_entry_is_upgraded_without_training(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", "zoo", "--data", ".")
    keep_every_point(ZooEntry(home / "zoo"))
    run("export", "zoo", "--out", "before")
    old_entry(home)
    with pytest.raises(InvalidConfig, match="run `bitneck-models upgrade"):
        ZooEntry(home / "zoo")
    with monkeypatch.context() as cut:  # a cut after the first unit
        cut.setattr("bitneck_models.zoo.upgrade._POINTS", None)
        with pytest.raises(AttributeError):
            upgrade_entry(home / "zoo")
    assert run("upgrade", "zoo").startswith("zoo: nothing to convert")  # the units were moved; now the recipe is
    assert (home / "zoo" / "recipe.toml").read_text().startswith("# ours\n")
    run("export", "zoo", "--out", "after")
    assert Bundle.open(home / "after").bundle_id == Bundle.open(home / "before").bundle_id
    assert json.loads(run("upgrade", "zoo", "--json")) == {"zoo": "zoo", "units": []}


def test_an_entry_that_cannot_be_upgraded(home: Path) -> None:
    run("train", "zoo", "--data", ".", "--unit", "s1-r2")
    old_entry(home)
    record = home / "zoo" / "points" / "s1-r2" / "record.json"
    for text in ("no json", "{}", '{"recipe": 3}'):
        record.write_text(text)
        with pytest.raises(BundleCorrupt, match=r"record\.json"):
            upgrade_entry(home / "zoo")
    with pytest.raises(InvalidConfig, match="cannot be upgraded"):
        upgrade_entry(home / "nowhere")
    (home / "zoo" / "points" / "x").mkdir()
    (home / "zoo" / "points" / "x" / "point.json").write_text("{}")
    with pytest.raises(BundleCorrupt, match="not the record of an operating point"):
        ZooEntry.points(type("Entry", (), {"folder": home / "zoo"})())
