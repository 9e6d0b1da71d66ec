"""What is shipped: every zoo entry's points equal their records, and the exported bundle equals the zoo."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.manifest import sha256_hex
from bitneck_models.backbones import build_backbone
from bitneck_models.evaluation import evaluate
from bitneck_models.export import prove
from bitneck_models.photos import labelled_photos, proof_images
from bitneck_models.recipe import PointRecipe, TrainingRecipe
from bitneck_models.similar import ConditionalRecord
from bitneck_models.zoo import PointRecord, ZooEntry

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "models" / "zoo" / "efficientnet_lite0"
BUNDLE = ROOT / "build" / "efficientnet_lite0"

needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="make bundle has not run")
EVAL = Path(os.environ.get("BITNECK_DATA", ROOT.parent / "shared" / "data")) / "imagenet-eval-400"


def test_every_point_is_trained_measured_and_as_its_record_says() -> None:
    entry = ZooEntry(ZOO)
    ladder = entry.ladder()
    assert ladder is not None
    trained = entry.shipped()
    assert [p.id for p in trained] == [p.id for p in entry.recipe.points if p.ship]
    assert set(ladder.points) == {p.id for p in trained}
    backbone = build_backbone(entry.recipe.backbone)
    for point in trained:
        folder = entry.point_folder(point.id)
        record = PointRecord.model_validate_json((folder / "record.json").read_bytes())
        assert PointRecipe.model_validate(record.recipe) == point
        assert TrainingRecipe.model_validate(record.training) == entry.recipe.training_of(point)
        unit, tables = entry.unit(backbone, point), entry.tables(point)
        assert unit.latent_shape[0] == tables.channels <= point.channels
        assert record.unit_sha256 == sha256_hex((folder / "unit.safetensors").read_bytes())
        assert record.tables_sha256 == sha256_hex((folder / "tables.npz").read_bytes())
        assert entry.conditional(point) is not None
        similar = ConditionalRecord.model_validate_json((folder / "conditional.json").read_bytes())
        assert similar.tables_sha256 == record.tables_sha256
        assert similar.conditional_sha256 == sha256_hex((folder / "conditional.npz").read_bytes())
        assert similar.bytes_similar["still"] < 0.5 * similar.bytes_alone["still"]
    for split in {p.split for p in trained}:
        points = sorted((ladder.points[p.id] for p in trained if p.split == split), key=lambda p: p.payload_bytes)
        assert len(points) >= (6 if split == "s1" else 4)
        accuracies = [p.accuracy for p in points]
        assert accuracies == sorted(accuracies), f"{split} is not monotone"


def test_documents_show_what_was_measured() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "update_tables.py"), "--check"], check=True)


@needs_bundle
def test_the_bundle_is_the_zoos() -> None:
    entry, bundle = ZooEntry(ZOO), Bundle.open(BUNDLE)
    backbone = build_backbone(entry.recipe.backbone)
    units = {p.id: entry.unit(backbone, p) for p in entry.shipped()}
    assert set(units) == {p.id for p in bundle.manifest.ladder}
    proof = prove(bundle, backbone, units, proof_images(backbone.input, None, count=2))
    assert proof.worst <= 1e-4
    for point in entry.shipped():
        ours, theirs = entry.tables(point), bundle.tables(point.id)
        assert all(np.array_equal(a, b) for a, b in zip(ours.counts, theirs.counts, strict=True))
        conditional, shipped = entry.conditional(point), bundle.conditional(point.id)
        assert conditional is not None
        assert shipped is not None
        assert conditional.to_npz() == shipped.to_npz()
    ladder = entry.ladder()
    assert ladder is not None
    assert {p.id: p.payload_bytes for p in bundle.manifest.ladder} == {
        k: p.payload_bytes for k, p in ladder.points.items()
    }
    assert not any(b"/" + name in path.read_bytes() for name in (b"home/", b"root/") for path in BUNDLE.rglob("*.onnx"))


@needs_bundle
@pytest.mark.skipif(not EVAL.is_dir(), reason=f"no photographs at {EVAL}; set BITNECK_DATA")
def test_the_recorded_ladder_is_measured_again() -> None:
    """On every eighth photograph of the evaluation set: bytes exactly like the record's, and floors that hold."""
    entry, bundle = ZooEntry(ZOO), Bundle.open(BUNDLE)
    backbone = build_backbone(entry.recipe.backbone)
    photos = labelled_photos(EVAL, backbone.wnids, backbone.labels)
    result = evaluate(bundle, photos[::8])
    recorded = entry.ladder()
    assert recorded is not None
    assert recorded.images == len(photos)
    for point in result.points:
        assert point.payload_bytes_mean <= point.ideal_bytes_mean * 1.01 + 4
        assert point.payload_bytes_mean == pytest.approx(recorded.points[point.id].payload_bytes, rel=0.1)
        assert point.agreement == pytest.approx(recorded.points[point.id].agreement, abs=0.2)
