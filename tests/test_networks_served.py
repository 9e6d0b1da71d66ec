"""The paper's networks through edge and cloud: units made in seconds, tables fitted, a bundle exported and served."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitneck.bundle import Bundle
from bitneck.chain import SegmentChain
from bitneck.errors import BundleCorrupt, InvalidConfig, ModelFailure
from bitneck.image import preprocess
from bitneck.manifest import Manifest
from bitneck.wire.messages import Classification
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_edge.client import EdgeClient
from bitneck_models.data.photos import LabelledPhoto
from bitneck_models.export.bundle import export_bundle
from bitneck_models.export.proof import Proof, proof_images
from bitneck_models.measure.evaluate import evaluate
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.registry import build_backbone
from bitneck_models.networks.weights import RANDOM
from bitneck_models.spic.checkpoint import load_spic
from bitneck_models.spic.places import PLACES
from bitneck_models.spic.point import write_spic_point
from bitneck_models.training.point import point_record
from bitneck_models.training.tables import prune_and_fit
from bitneck_models.training.validation import Validation
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.point import new_unit, round_weights, save_point, save_unit
from bitneck_models.zoo.records import UnitRecord
from bitneck_testing.networks import checkpoint, saved
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import Frames, assert_a_batch_equals_frame_by_frame

RECIPE = """
name = "paper"
backbone = "NAME"
[[data]]
folder = "photos"
validate_every = 2
"""
POINT = """
[[units]]
id = "SPLIT-r1"
split = "SPLIT"
stride = 2
channels = 6
step = 0.5
lambda = 1.0
init = "random"
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def features(backbone: Backbone, split: str) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]:
    """Of a few pictures: (4, C, Hf, Wf)."""
    x = np.concatenate([preprocess(photo(k, (90, 70)), backbone.input) for k in range(4)])
    f: np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]
    f = backbone.head(split)(torch.from_numpy(x)).numpy().astype(np.float16)
    return f


def make_entry(backbone: Backbone, folder: Path) -> ZooEntry:
    """A unit of random weights at every split point, with tables fitted to it."""
    folder.mkdir()
    text = RECIPE.replace("NAME", backbone.name) + "".join(POINT.replace("SPLIT", s) for s in backbone.splits)
    (folder / "recipe.toml").write_text(text)
    entry = ZooEntry(folder)
    for point in entry.recipe.units:
        unit = new_unit(backbone, point)
        round_weights(unit)
        unit, tables = prune_and_fit(unit, point, features(backbone, point.split))
        record = UnitRecord(
            recipe={}, training={}, code_version="", torch_version="", train_features=4, lambda_final=1.0,
            estimated_bytes=1.0, trained=date(2026, 1, 1),
        )  # fmt: skip
        save_unit(entry.unit_folder(point.id), unit, record)
        fitted = point_record(point, point.step, 4, Validation(payload_bytes=1.0, agreement=1.0))
        save_point(entry.point_folder(point.id), tables, fitted)
    return entry


@pytest.fixture(scope="module")
def resnet50() -> Backbone:
    return build_backbone("resnet50", RANDOM)


@pytest.fixture(scope="module")
def classifier(resnet50: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ResNet-50 at its own size, and points imported from checkpoints; those at s3 decode to 15x15 and 17x17."""
    folder = tmp_path_factory.mktemp("resnet50")
    entry = make_entry(resnet50, folder / "zoo")
    for split, stride, name in (("s1", 4, "s1-authors"), ("s3", 2, "s3-authors"), ("s3", 4, "s3-coarse")):
        place = PLACES["resnet50"][split]
        path = saved(folder / "authors.pth.tar", checkpoint(place.channels, 4, place.decoders[stride][0]))
        unit = load_spic(path, backbone="resnet50", split=split, step=0.25, stride=stride)
        out = folder / "zoo" / "points" / name
        write_spic_point(unit, out, checkpoint=path.name, features=features(resnet50, split))
    bundle, proof = export_bundle(entry, resnet50, folder / "bundle", proof_images(resnet50.input, None, count=2))
    assert proof.worst < 1e-4
    assert set(proof.chain) == {f"{w} {s}{t}" for s in ("s1", "s2", "s3") for w, t in (
        ("head", ""), ("head", " + tail"), ("torch head", " + tail"),
    )}  # fmt: skip
    return bundle


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """DeepLab v3 for a smaller input; `bitneck-models export` at its own size is measured in docs/networks.md."""
    whole = build_backbone("deeplabv3_resnet50", RANDOM)
    upsample = nn.Upsample((65, 81), mode="bilinear", align_corners=False)
    spec = whole.input.model_copy(update={"height": 65, "width": 81})
    small = replace(whole, stages={**whole.stages, "upsample": upsample}, input=spec)
    folder = tmp_path_factory.mktemp("deeplab")
    entry = make_entry(small, folder / "zoo")
    bundle, proof = export_bundle(entry, small, folder / "bundle", proof_images(spec, None, count=2))
    assert proof.worst < 1e-4
    return bundle


@pytest.fixture(scope="module")
def server(classifier: Bundle) -> Iterator[Server]:
    with running_server(classifier.root) as running:
        yield running


def logits(bundle: Bundle, point: str, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """By the bundle's own numerics, without server and client."""
    frames = Frames(bundle)
    encoder = frames.encoders[point]
    x = preprocess(photo(seed, (90, 70)), bundle.manifest.input)
    f = frames.chain.run(x, 0, frames.chain.head_length(encoder.point.split))
    return frames.logits(point, encoder.encode(f).payload)


@pytest.mark.parametrize("point", ["s1-r1", "s2-r1", "s3-r1", "s1-authors", "s3-authors", "s3-coarse"])
async def test_resnet50_answers(server: Server, classifier: Bundle, tmp_path: Path, point: str) -> None:
    async with EdgeClient(server.grpc, point=point, cache_dir=tmp_path, threads=1) as client:
        answer = await client.infer(photo(7, (90, 70)))
    expected = logits(classifier, point, 7)
    assert answer.point == point
    assert answer.payload_bytes > 0
    assert answer.labels[0].index == int(expected.argmax())


@pytest.mark.parametrize("point", ["s1-r1", "s2-r1", "s3-r1"])
async def test_deeplab_answers(segmenter: Bundle, tmp_path: Path, point: str) -> None:
    with running_server(segmenter.root) as running:
        async with EdgeClient(running.grpc, point=point, cache_dir=tmp_path, threads=1) as client:
            answer = await client.infer(photo(7, (90, 70)))
    assert (segmenter.manifest.task, segmenter.manifest.backbone) == ("segmentation", "deeplabv3_resnet50")
    assert answer.segmentation is not None
    expected = logits(segmenter, point, 7).argmax(axis=0)
    assert answer.segmentation.map.shape == (65, 81)
    assert (answer.segmentation.map == expected).all()
    assert len(np.unique(expected)) > 1


def test_decoders_of_three_sizes_share_a_batch(classifier: Bundle) -> None:
    """Each frame gets the answer that it gets alone, in its own place."""
    manifest = classifier.manifest
    assert [manifest.decoded_shape(p) for p in ("s3-r1", "s3-authors", "s3-coarse")] == [
        (1024, 14, 14), (1024, 15, 15), (1024, 17, 17),
    ]  # fmt: skip
    assert [unit.id for unit in manifest.units if unit.decoded_shape] == ["s3-authors", "s3-coarse"]
    model, frames = ServedModel(classifier), Frames(classifier)
    points = ["s3-authors", "s1-r1", "s3-coarse", "s3-r1", "s3-authors", "s1-authors"]
    assert_a_batch_equals_frame_by_frame(frames, model, points)


def test_a_size_that_fails_takes_only_its_own_frames_along(classifier: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model, frames = ServedModel(classifier), Frames(classifier)
    points = ["s3-coarse", "s3-r1", "s3-authors"]
    latents = [model.decode(point, frames.payload(point, k)) for k, point in enumerate(points)]
    run = SegmentChain.run

    def failing(chain: SegmentChain, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        if x.shape[2:] == (17, 17):
            raise ModelFailure("no room")
        return run(chain, x, start, stop)

    monkeypatch.setattr(SegmentChain, "run", failing)
    results = model.compute(points, latents)
    assert [type(result) for result in results] == [ModelFailure, Classification, Classification]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1024, 14, 14], "must differ"),
        ([512, 15, 15], "height and width only"),
        ([1024, 29, 14], "too large for"),
    ],
)
def test_decoded_shapes_that_are_refused(classifier: Bundle, shape: list[int], message: str) -> None:
    document = json.loads(classifier.manifest.to_json())
    unit = next(u for u in document["units"] if u["id"] == "s3-authors")
    unit["decoded_shape"] = shape
    with pytest.raises(BundleCorrupt, match=f"s3-authors.*{message}"):
        Manifest.from_json(json.dumps(document).encode(), "x")


def test_a_proof_with_no_number_in_it_does_not_hold() -> None:
    assert not Proof({"a": 1e-6}, {}, {"b": float("nan")}).worst <= 1e-4


def test_an_imported_point_is_measured_like_any_other(classifier: Bundle, tmp_path: Path) -> None:
    photo(1, (90, 70)).save(tmp_path / "one.png")
    result = evaluate(classifier, [LabelledPhoto(tmp_path / "one.png", 3)])
    (authors,) = [p for p in result.points if p.id == "s1-authors"]
    assert authors.complexity.encoder.parameters > 2048 * 9
    work = {p.id: p.complexity for p in result.points}
    network = work["s3-r1"].head.multiply_adds + work["s3-r1"].tail.multiply_adds
    assert network == work["s1-r1"].head.multiply_adds + work["s1-r1"].tail.multiply_adds > 4e9
    assert work["s3-coarse"].tail.multiply_adds > work["s3-r1"].tail.multiply_adds
    document = ZooEntry(classifier.root.parent / "zoo").annotated(json.loads(json.dumps(result.to_dict())))
    curves = {p["id"]: p["recipe"]["curve"] for p in document["points"] if p["id"] == "s1-authors"}
    assert curves == {"s1-authors": "s1 of the authors"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "deeplabv3_resnet50"}, "is for s1 of deeplabv3_resnet50, the network is resnet50"),
        ({"split": "s4"}, "is for s4 of resnet50"),
        ({"true_cut": False}, "it cannot be sent"),
        ({"feature_shape": [2048, 9, 9]}, "is for features of"),
        ({"output_shape": [1024, 8, 8]}, "decoded shape \\(1024, 8, 8\\) must differ .* in height and width only"),
        ({"output_shape": [2048, 4000, 4000]}, "is too large for"),
        ({"files": {}}, "import it with --features"),
    ],
)
def test_imported_points_that_cannot_run(
    classifier: Bundle, resnet50: Backbone, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "zoo"
    (folder / "points" / "x").mkdir(parents=True)
    (folder / "recipe.toml").write_text((classifier.root.parent / "zoo" / "recipe.toml").read_text())
    source = classifier.root.parent / "zoo" / "points" / "s1-authors"
    for path in source.iterdir():
        (folder / "points" / "x" / path.name).write_bytes(path.read_bytes())
    record = folder / "points" / "x" / "spic.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    entry = ZooEntry(folder)
    with pytest.raises(InvalidConfig, match=f"imported point x .*{message}"):
        export_bundle(entry, resnet50, tmp_path / "bundle", proof_images(resnet50.input, None, count=2))
    (folder / "points" / "x").rename(folder / "points" / "s1-r1")
    with pytest.raises(InvalidConfig, match="a unit of the recipe too"):
        entry.imported()
