"""Evaluation of segmentation: mean IoU against torchmetrics, void pixels, maps of other sizes, the command line."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.coding.class_map import encode_map
from bitneck.errors import InvalidConfig
from bitneck.image import load_photo, preprocess
from bitneck_models.cli.main import app
from bitneck_models.data.class_maps import class_iou, load_class_map, mapped_photos, mean_iou
from bitneck_models.measure.evaluate import Evaluation, evaluate
from bitneck_models.networks.vision import import_torchvision
from bitneck_models.zoo.entry import tables_digests
from bitneck_models.zoo.point import save_point
from bitneck_models.zoo.records import PointRecord
from bitneck_testing.photographs import photo
from bitneck_testing.tiny_bundles import SCENE_CLASSES, SCENE_INPUT

H, W, K = SCENE_INPUT.height, SCENE_INPUT.width, len(SCENE_CLASSES)
SIZES = ((40, 24), (70, 50), (33, 90), (40, 24), (64, 64))
"""Of photographs and class maps, (width, height)."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, scene_bundle: Bundle) -> Path:
    """Class maps near to what the network says, with void of two kinds, and none of the class it says second most."""
    folder = tmp_path_factory.mktemp("scenes")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    pictures = [photo(k, size) for k, size in enumerate(SIZES)]
    answers = [logits(scene_bundle, picture).argmax(axis=0).astype(np.uint8) for picture in pictures]
    absent = int(np.argsort(np.bincount(np.ravel(answers), minlength=K))[-2])
    for k, (size, picture, answer) in enumerate(zip(SIZES, pictures, answers, strict=True)):
        picture.save(folder / "images" / f"{k}.png")
        truth = np.array(Image.fromarray(answer).resize(size, Image.Resampling.NEAREST))
        wrong = rng.random(truth.shape) < 0.3
        truth[wrong] = rng.integers(0, K, int(wrong.sum()))
        truth[truth == absent] = 255
        truth[:3, :5] = 11
        Image.fromarray(truth).save(folder / "labels" / f"{k}.png")
    return folder


def logits(bundle: Bundle, picture: Image.Image) -> np.ndarray:
    chain = SegmentChain(bundle, threads=1)
    return chain.run(preprocess(picture, SCENE_INPUT), 0, len(chain))[0]


@pytest.fixture(scope="module")
def result(scene_bundle: Bundle, data: Path) -> Evaluation:
    return evaluate(scene_bundle, mapped_photos(data))


def at_point(bundle: Bundle, point_id: str, path: Path) -> tuple[np.ndarray, int]:
    """The class map and the payload's bytes, without `photo_passes`."""
    chain, point = SegmentChain(bundle, threads=1), bundle.manifest.ladder[point_id]
    head = chain.head_length(point.split)
    f = chain.run(preprocess(load_photo(path), SCENE_INPUT), 0, head)
    payload = PointEncoder(bundle, point).encode(f).payload
    decoder = PointDecoder(bundle, point)
    output = chain.run(decoder.decode(decoder.dequantize(payload)[None]), head, len(chain))[0]
    return output.argmax(axis=0).astype(np.uint8), len(payload)


def jaccard(answers: list[np.ndarray], truths: list[np.ndarray], average: str) -> torch.Tensor:
    import_torchvision()  # torchmetrics imports it
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(num_classes=K, average=average, ignore_index=255)  # type: ignore[arg-type]
    for answer, truth in zip(answers, truths, strict=True):
        metric.update(torch.from_numpy(answer)[None], torch.from_numpy(truth.astype(np.int64))[None])
    value: torch.Tensor = metric.compute()
    return value


def test_mean_iou_equals_torchmetrics(scene_bundle: Bundle, data: Path, result: Evaluation) -> None:
    pairs = mapped_photos(data)
    truths = [load_class_map(labels, K) for _, labels in pairs]
    assert [point.id for point in result.points] == sorted(
        (p.id for p in result.points), key=lambda i: next(p.rate.payload_bytes_mean for p in result.points if p.id == i)
    )
    for point in result.points:
        passed = [at_point(scene_bundle, point.id, path) for path, _ in pairs]
        answers = [
            np.array(Image.fromarray(answer).resize(truth.shape[::-1], Image.Resampling.NEAREST))
            for (answer, _), truth in zip(passed, truths, strict=True)
        ]
        assert point.accuracy == pytest.approx(float(jaccard(answers, truths, "macro")), abs=1e-6)
        by_class = jaccard(answers, truths, "none").tolist()
        assert [point.fields["iou"][name] or 0.0 for name in SCENE_CLASSES] == pytest.approx(by_class, abs=1e-6)
        known = np.concatenate([t[t < K] for t in truths])
        given = np.concatenate([a[t < K] for a, t in zip(answers, truths, strict=True)])
        assert point.fields["pixel_accuracy"] == pytest.approx((known == given).mean())
        teachers = [logits(scene_bundle, load_photo(path)).argmax(axis=0) for path, _ in pairs]
        assert point.agreement == pytest.approx(np.mean([a == t for (a, _), t in zip(passed, teachers, strict=True)]))
        sizes = [size for _, size in passed]
        assert point.rate.payload_bytes_mean == np.mean(sizes)
        assert (point.rate.payload_bytes_p5, point.rate.payload_bytes_p95) == pytest.approx(
            np.percentile(sizes, [5, 95])
        )
        assert point.rate.bpp_payload == np.mean(sizes) * 8 / (H * W)
        assert point.rate.bpp_wire > point.rate.bpp_payload
        assert point.fields["map_bytes_mean"] == np.mean([len(encode_map(a)) for a, _ in passed])
        low, high = point.fields["mean_iou_interval"]
        assert low < high
        assert 0 <= low <= point.accuracy <= high + 0.05
        assert point.fields["mean_iou_lost_interval"][0] <= result.accuracy - point.accuracy + 0.05


def test_the_uncompressed_network(scene_bundle: Bundle, data: Path, result: Evaluation) -> None:
    pairs = mapped_photos(data)
    truths = [load_class_map(labels, K) for _, labels in pairs]
    answers = []
    for (path, _), truth in zip(pairs, truths, strict=True):
        answer = logits(scene_bundle, load_photo(path)).argmax(axis=0).astype(np.uint8)
        answers.append(np.array(Image.fromarray(answer).resize(truth.shape[::-1], Image.Resampling.NEAREST)))
    assert result.accuracy == pytest.approx(float(jaccard(answers, truths, "macro")), abs=1e-6)
    assert result.accuracy > max(point.accuracy for point in result.points)
    assert result.images == len(SIZES)
    ladder = result.ladder("scenes", tables_digests(scene_bundle))
    assert ladder.uncompressed_accuracy == result.accuracy
    assert ladder.points["s1-r2"].accuracy == next(p.accuracy for p in result.points if p.id == "s1-r2")


def test_classes_that_occur_nowhere_do_not_count() -> None:
    matrix = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert class_iou(matrix).tolist()[:2] == [3 / 4, 4 / 5]
    assert np.isnan(class_iou(matrix)[2])
    assert mean_iou(matrix) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_class_that_is_answered_and_not_there_counts(scene_bundle: Bundle, data: Path, result: Evaluation) -> None:
    found = {int(k) for _, path in mapped_photos(data) for k in np.unique(load_class_map(path, K))} - {255}
    (absent,) = set(range(K)) - found
    assert result.details["iou"][SCENE_CLASSES[absent]] == 0


def test_void_is_what_the_caller_says(scene_bundle: Bundle, data: Path, result: Evaluation) -> None:
    pairs = mapped_photos(data)
    assert evaluate(scene_bundle, pairs, ignore=[11, 255]) == result
    with pytest.raises(InvalidConfig, match=r"0\.png: index 255, but there are 5 classes and \[11\] are ignored"):
        evaluate(scene_bundle, pairs, ignore=[11])
    fewer = evaluate(scene_bundle, pairs[:2], ignore=[0, 11, 255])
    assert fewer.details["iou"]["sky"] in (0, None)
    with pytest.raises(InvalidConfig, match=r"labels: every pixel of every class map is void"):
        evaluate(scene_bundle, pairs[:1], ignore=[*range(K), 11, 255])
    with pytest.raises(InvalidConfig, match="no photographs"):
        evaluate(scene_bundle, [])


RECIPE = """
name = "scene"
backbone = "tiny"
[[data]]
folder = "photos"
[training]
[[units]]
id = "s1-r1"
split = "s1"
stride = 1
channels = 4
step = 0.5
lambda = 1
"""


def test_the_command_line(
    scene_bundle: Bundle, tiny_bundle: Bundle, data: Path, result: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for point in scene_bundle.manifest.ladder:
        record = PointRecord(
            unit=point.unit, split=point.split, step=point.step, validation_photos=1, validation_bytes=1.0,
            validation_agreement=1.0, fitted=date(2026, 1, 1),
        )  # fmt: skip
        save_point(tmp_path / "points" / point.id, scene_bundle.tables(point.id), record)
    command = ["evaluate", "--bundle", str(scene_bundle.root), "--data", str(data)]
    done = CliRunner().invoke(app, [*command, "--json", "--record", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["uncompressed"] == {"mean_iou": result.accuracy}
    assert document["images"] == len(SIZES)
    for point, known in zip(document["points"], result.points, strict=True):
        assert (point["id"], point["mean_iou"]) == (known.id, known.accuracy)
        assert point["iou"].keys() == set(SCENE_CLASSES)
    ladder = json.loads((tmp_path / "ladder.json").read_bytes())
    assert ladder["points"]["s2-r1"]["accuracy"] == next(p.accuracy for p in result.points if p.id == "s2-r1")
    table = CliRunner().invoke(app, [*command, "--ignore-index", "11", "--ignore-index", "255"], env={"COLUMNS": "200"})
    assert table.exit_code == 0, table.output
    assert f"uncompressed: mean IoU {result.accuracy:.4f}" in table.stdout
    assert "map bytes" in table.stdout
    refused = CliRunner().invoke(app, [*command, "--ignore-index", "11"])
    assert isinstance(refused.exception, InvalidConfig)
    other = ["evaluate", "--bundle", str(tiny_bundle.root), "--data", str(data), "--ignore-index", "255"]
    refused = CliRunner().invoke(app, other)
    assert isinstance(refused.exception, InvalidConfig)
    assert "for segmentation" in str(refused.exception)


def test_class_maps_are_found_by_folder_and_name(tmp_path: Path) -> None:
    for name in ("images/a/1.png", "images/b/1.png", "labels/a/1.png", "labels/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0, (20, 10)).save(tmp_path / name)
    pairs = mapped_photos(tmp_path)
    assert [labels.relative_to(tmp_path).as_posix() for _, labels in pairs] == ["labels/a/1.png", "labels/b/1.png"]
    photo(0, (20, 10)).save(tmp_path / "images" / "b" / "1.jpg")
    with pytest.raises(InvalidConfig, match=r"labels/b/1\.png is the class map of several photographs"):
        mapped_photos(tmp_path)
