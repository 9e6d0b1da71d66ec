"""What is shipped: every zoo entry's points equal their records, and the exported bundle equals the zoo."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitneck.bundle import Bundle
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.symbols import dequantize, quantize
from bitneck.image import load_photo, preprocess
from bitneck.manifest import sha256_hex
from bitneck_models.data.class_maps import mapped_photos
from bitneck_models.data.photos import labelled_photos
from bitneck_models.export.proof import proof_images, prove
from bitneck_models.measure.evaluate import evaluate
from bitneck_models.networks.registry import build_backbone
from bitneck_models.training.steps import point_id
from bitneck_models.zoo.entry import ZooEntry, coding_digest
from bitneck_models.zoo.network_training import NetworkTraining, load_network_training
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe
from bitneck_models.zoo.records import ConditionalRecord, ContextRecord, NetworkRecord, UnitRecord
from bitneck_models.zoo.selection import successors

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "models" / "zoo" / "efficientnet_lite0"
MAP_ZOO = ROOT / "models" / "zoo" / "deeplabv3_efficientnet_lite0"
BUNDLE = ROOT / "build" / "efficientnet_lite0"

needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="make bundle has not run")
DATA = Path(os.environ.get("BITNECK_DATA", ROOT.parent / "shared" / "data"))
EVAL = DATA / "imagenet-eval-400"
MAP_EVAL = DATA / "camvid" / "test"


@pytest.mark.parametrize(
    ("zoo", "wanted"), [(ZOO, {"s1": 8, "s2": 8, "s3": 8, "s4": 6}), (MAP_ZOO, {"s1": 12, "s2": 12, "s3": 7})]
)
def test_every_point_is_fitted_measured_and_as_its_record_says(zoo: Path, wanted: dict[str, int]) -> None:
    entry = ZooEntry(zoo)
    ladder, points = entry.ladder(), entry.points()
    assert ladder is not None
    trained = {unit.id: unit for unit in entry.shipped()}
    assert list(trained) == [unit.id for unit in entry.recipe.units if unit.ship]
    backbone = entry.backbone()
    channels = {}
    for unit in trained.values():
        folder = entry.unit_folder(unit.id)
        record = UnitRecord.model_validate_json((folder / "record.json").read_bytes())
        assert UnitRecipe.model_validate(record.recipe) == unit.model_copy(update={"ship": True})
        assert TrainingRecipe.model_validate(record.training) == entry.recipe.training_of(unit)
        assert record.unit_sha256 == sha256_hex((folder / "unit.safetensors").read_bytes())
        channels[unit.id] = entry.unit(backbone, unit).latent_shape[0]
        assert channels[unit.id] <= unit.channels
    retired = successors(points, {name: point for name, point in points.items() if point.unit in trained})
    kept = {name: point for name, point in points.items() if name not in retired}
    assert set(ladder.points) == set(kept)
    for name, point in kept.items():
        folder, tables = entry.point_folder(name), entry.tables(name)
        assert (trained[point.unit].split, channels[point.unit]) == (point.split, tables.channels)
        assert name == point_id(point.unit, float(f"{point.step / trained[point.unit].step:.3g}"))
        assert point.tables_sha256 == sha256_hex((folder / "tables.npz").read_bytes())
        assert ladder.points[name].tables_digest == coding_digest(tables, entry.contexts(name))
        if (folder / "contexts.npz").is_file():
            coded = ContextRecord.model_validate_json((folder / "contexts.json").read_bytes())
            assert coded.contexts_sha256 == sha256_hex((folder / "contexts.npz").read_bytes())
            assert coded.bytes_contexts < 0.97 * coded.bytes_factorized
        assert entry.conditional(name) is not None
        similar = ConditionalRecord.model_validate_json((folder / "conditional.json").read_bytes())
        assert similar.tables_sha256 == point.tables_sha256
        assert similar.conditional_sha256 == sha256_hex((folder / "conditional.npz").read_bytes())
        assert similar.bytes_similar["still"] < 0.5 * similar.bytes_alone["still"]
    for split, count in wanted.items():
        rungs = sorted((p for p in kept.values() if p.split == split), key=lambda p: p.validation_bytes)
        agreements = [point.validation_agreement for point in rungs]
        assert agreements == sorted(agreements), f"{split} is not monotone on the photographs put aside"
        assert len(rungs) >= count
    assert set(wanted) == {point.split for point in kept.values()}


def test_the_network_trained_here_is_its_record_and_small() -> None:
    network = MAP_ZOO / "network.safetensors"
    record = NetworkRecord.model_validate_json((MAP_ZOO / "network.json").read_bytes())
    assert NetworkTraining.model_validate(record.recipe) == load_network_training(MAP_ZOO)
    assert record.sha256 == sha256_hex(network.read_bytes())
    assert network.stat().st_size < 10_000_000
    backbone = ZooEntry(MAP_ZOO).backbone()
    assert backbone.weights_sha256 == record.sha256
    assert set(record.test_iou_by_class) == set(backbone.labels)
    ladder = ZooEntry(MAP_ZOO).ladder()
    assert ladder is not None
    assert ladder.uncompressed_accuracy == pytest.approx(record.test_iou, abs=2e-3)  # ONNX Runtime, and torch


@pytest.mark.skipif(not MAP_EVAL.is_dir(), reason=f"no photographs at {MAP_EVAL}; set BITNECK_DATA")
def test_units_for_class_maps_are_as_measured() -> None:
    """Torch on a few photographs, against the recorded ladder: symbols' ideal code length and agreement."""
    entry = ZooEntry(MAP_ZOO)
    backbone, ladder = entry.backbone(), entry.ladder()
    assert ladder is not None
    photos = [photo for photo, _ in mapped_photos(MAP_EVAL)][::40]
    x = torch.from_numpy(np.concatenate([preprocess(load_photo(photo), backbone.input) for photo in photos]))
    points = {p.split: p for p in reversed(entry.shipped())}  # the first of each split point
    with torch.no_grad():
        teacher = backbone(x).argmax(1)
        for split, point in points.items():
            unit, tables = entry.unit(backbone, point), entry.tables(point.id)
            y = unit.encoder(backbone.head(split)(x)).numpy()
            symbols = np.stack([quantize(one, point.step, tables.lo, tables.hi) for one in y])
            answer = backbone.tail(split)(unit.decoder(torch.from_numpy(dequantize(symbols, point.step)))).argmax(1)
            ideal_bytes = np.mean([tables.ideal_bits(one) for one in symbols]) / 8
            if (contexts := entry.contexts(point.id)) is not None:
                codec = ContextCodec(tables, contexts, unit.latent_shape)
                ideal_bytes = np.mean([codec.ideal_bits(one) for one in symbols]) / 8
            assert ideal_bytes == pytest.approx(ladder.points[point.id].payload_bytes, rel=0.25)
            assert (answer == teacher).float().mean().item() == pytest.approx(
                ladder.points[point.id].agreement, abs=0.05
            )


def test_documents_show_what_was_measured() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "update_tables.py"), "--check"], check=True)


@needs_bundle
def test_the_bundle_is_the_zoos() -> None:
    entry, bundle = ZooEntry(ZOO), Bundle.open(BUNDLE)
    backbone = build_backbone(entry.recipe.backbone)
    used = {unit.id for unit in bundle.manifest.units}
    units = {unit.id: entry.unit(backbone, unit) for unit in entry.shipped() if unit.id in used}
    assert set(units) == used
    proof = prove(bundle, backbone, units, proof_images(backbone.input, None, count=2))
    assert proof.worst <= 1e-4
    for point in bundle.manifest.points:
        ours, theirs = entry.tables(point.id), bundle.tables(point.id)
        assert all(np.array_equal(a, b) for a, b in zip(ours.counts, theirs.counts, strict=True))
        contexts, coded = entry.contexts(point.id), bundle.contexts(point.id, theirs)
        assert (contexts is None) == (coded is None)
        assert contexts is None or coded is None or contexts.digest == coded.digest
        conditional, shipped = entry.conditional(point.id), bundle.conditional(point.id)
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
        assert point.rate.payload_bytes_mean <= point.rate.ideal_bytes_mean * 1.01 + 4
        assert point.rate.payload_bytes_mean == pytest.approx(recorded.points[point.id].payload_bytes, rel=0.1)
        assert point.agreement == pytest.approx(recorded.points[point.id].agreement, abs=0.2)
