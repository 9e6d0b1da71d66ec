"""What a task defines: the metrics that exist, and a new one, which needs nothing but itself."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck_models.data.photos import LabelledPhoto
from bitneck_models.measure import meter as registry
from bitneck_models.measure.agreement import Agreement
from bitneck_models.measure.baselines import image_baselines
from bitneck_models.measure.evaluate import evaluate
from bitneck_models.measure.mean_iou import MeanIou
from bitneck_models.measure.meter import METRICS, Meter, Metric, metric_for, metric_titles
from bitneck_models.measure.sweeps import CODECS, BaselineSweep
from bitneck_models.measure.table import evaluation_line, evaluation_table
from bitneck_models.measure.top1 import Top1
from bitneck_models.report.curves import read_results
from bitneck_testing.networks import small_backbone
from bitneck_testing.photographs import add_photos, photo


class ParityMeter(Meter):
    """Counts answers that are even if the label is, and odd if it is."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add(self, answer: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        self.right.append(bool(answer == truth))

    def accuracy(self) -> float:
        return float(np.mean(self.right))

    def fields(self, uncompressed: "ParityMeter", agreement: float) -> dict[str, Any]:
        lost = uncompressed.accuracy() - self.accuracy()
        return {"parity": self.accuracy(), "parity_lost": lost, "agreement": agreement}

    def details(self) -> dict[str, Any]:
        return {"counted": len(self.right)}


class Parity(Metric[Path]):
    """A task of its own: whether the class's index is odd. It has one codec with two qualities."""

    key = "parity"
    title = "right parity"
    columns = ("parity",)
    sweep = BaselineSweep(codecs={"jpeg": (10, 90)}, training_free=((1.0, 1.0),), batch=2)

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        pass

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[Path]:
        del wnids, labels
        return sorted(folder.glob("*.png"))

    def path(self, photo: Path) -> Path:
        return photo

    def truth(self, photo: Path) -> NDArray[np.integer]:
        return np.array(int(photo.stem) % 2)

    def truth_folder(self, photo: Path) -> Path:
        return photo.parent

    def answer(self, output: NDArray[np.float32]) -> NDArray[np.integer]:
        return np.array(output.argmax() % 2)

    def meter(self) -> ParityMeter:
        return ParityMeter()

    def cells(self, fields: Any) -> tuple[str, ...]:
        return (f"parity {fields['parity']:.3f}",)

    def summary(self, accuracy: float, details: Any, images: int) -> str:
        return f"{details['counted']} of {images} counted, {accuracy:.2f} right"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[Path]:
    """Photographs of a task that takes the place of classification."""
    monkeypatch.setattr(registry, "METRICS", {**METRICS, "classification": f"{__name__}:Parity"})
    (tmp_path / "photos").mkdir()
    for k in range(6):
        photo(k, (60, 50)).save(tmp_path / "photos" / f"{k}.png")
    return metric_for("classification", ()).photos(tmp_path / "photos", (), ())


def test_metrics_of_the_tasks() -> None:
    metrics: list[Metric[Any]] = [metric_for("classification", ()), metric_for("segmentation", ())]
    for metric in metrics:
        assert set(metric.sweep.codecs) <= set(CODECS)
    assert [type(metric) for metric in metrics] == [Top1, MeanIou]
    assert metric_titles() == {"top1": "top-1", "mean_iou": "mean IoU"}
    assert len(metric_titles()) == len(METRICS)


def test_a_metric_that_lacks_a_method_cannot_be_made() -> None:
    class Half(Parity):
        truth = Metric.truth

    with pytest.raises(TypeError, match="truth"):
        Half((), ())


def test_a_new_task_is_evaluated_and_printed_by_its_metric(tiny_bundle: Bundle, photos: Sequence[Path]) -> None:
    result = evaluate(tiny_bundle, photos)
    document = json.loads(json.dumps(result.to_dict()))
    assert document["uncompressed"] == {"parity": result.accuracy}
    assert document["uncompressed_details"] == {"counted": 6}
    for point, measured in zip(document["points"], result.points, strict=True):
        assert point["parity"] == measured.accuracy == result.accuracy - point["parity_lost"]
        assert point["agreement"] == measured.agreement
    console = Console(width=200)
    with console.capture() as printed:
        console.print(evaluation_table(result))
    assert f"parity {result.points[0].accuracy:.3f}" in printed.get()
    assert evaluation_line(result) == f"6 of 6 counted, {result.accuracy:.2f} right"


def test_a_new_task_has_baselines_and_a_report(photos: Sequence[Path], tmp_path: Path) -> None:
    metric = metric_for("classification", ())
    right, points = image_baselines(small_backbone(), photos, tmp_path / "cache", codecs=metric.sweep.codecs)
    assert [p.setting for p in points] == ["quality 10", "quality 90"]
    document = {
        "dataset": "d",
        "images": len(photos),
        "uncompressed": {metric.key: right},
        "baselines": [point.to_dict(metric.key) for point in points],
    }
    (tmp_path / "baselines.json").write_text(json.dumps(document))
    results = read_results(tmp_path)
    assert (results.metric, results.uncompressed) == ("right parity", right)
    assert [s.accuracy for s in results.baselines["jpeg"]] == [p.accuracy for p in points]


def test_an_accuracy_that_no_task_has_is_refused(tmp_path: Path) -> None:
    document = {"dataset": "d", "images": 1, "uncompressed": {"top7": 0.5}, "baselines": []}
    (tmp_path / "baselines.json").write_text(json.dumps(document))
    with pytest.raises(InvalidConfig, match="no task has an accuracy named 'top7'; known: top1, mean_iou"):
        read_results(tmp_path)


def test_without_labels_agreement_is_measured(tiny_bundle: Bundle, scene_bundle: Bundle, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(8))
    for bundle in (tiny_bundle, scene_bundle):
        metric = Agreement()
        found = metric.photos(tmp_path / "photos", (), ())
        result = evaluate(bundle, found, metric=metric)
        assert result.accuracy == 1.0
        assert len(found) == result.images == 8
        document = json.loads(json.dumps(result.to_dict()))
        assert document["uncompressed"] == {"agreement": 1.0}
        for point, measured in zip(document["points"], result.points, strict=True):
            low, high = point["agreement_interval"]
            assert low <= point["agreement"] <= high
            assert point["agreement"] == pytest.approx(measured.accuracy)
            assert measured.rate.payload_bytes_mean > 0
        ladder = result.ladder("photos, agreement", {p.id: "" for p in result.points})
        assert {p.accuracy for p in ladder.points.values()} == {p.accuracy for p in result.points}
        assert "8 photographs without labels" in evaluation_line(result)
        assert evaluation_table(result).row_count == len(result.points)


def test_agreement_is_that_of_an_evaluation_with_labels(tiny_bundle: Bundle, tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(6))
    files = sorted((tmp_path / "photos").iterdir())
    labelled = evaluate(tiny_bundle, [LabelledPhoto(path, 0) for path in files])
    unlabelled = evaluate(tiny_bundle, files, metric=Agreement())
    assert [p.agreement for p in labelled.points] == [p.agreement for p in unlabelled.points]
    assert [p.rate for p in labelled.points] == [p.rate for p in unlabelled.points]
