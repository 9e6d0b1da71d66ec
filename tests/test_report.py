"""The report: what it reads, what it computes from it, what it draws and writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bitneck.errors import InvalidConfig
from bitneck_models.report.curves import Sample, bytes_at, rate_saving, read_results
from bitneck_models.report.pictures import draw
from bitneck_models.report.tables import markdown


def curve(*points: tuple[float, float]) -> tuple[Sample, ...]:
    return tuple(
        Sample(name=str(k), payload_bytes=b, bpp=b / 6272, accuracy=a, agreement=a) for k, (b, a) in enumerate(points)
    )


def test_bytes_for_an_accuracy() -> None:
    line = curve((100, 0.5), (200, 0.4), (400, 0.7), (800, 0.7))
    assert bytes_at(line, 0.3) == 100
    assert bytes_at(line, 0.5) == 100
    assert bytes_at(line, 0.6) == pytest.approx(200)  # halfway from (100, 0.5) to (400, 0.7), in log(bytes)
    assert bytes_at(line, 0.7) == pytest.approx(400)
    assert bytes_at(line, 0.71) is None
    assert bytes_at((), 0.5) is None


def test_rate_saved_at_equal_agreement() -> None:
    dear, cheap = curve((100, 0.5), (400, 0.9)), curve((80, 0.5), (320, 0.9))
    assert rate_saving(cheap, dear) == pytest.approx(0.2)
    assert rate_saving(dear, cheap) == pytest.approx(-0.25)
    assert rate_saving(dear, dear) == pytest.approx(0)
    assert rate_saving(dear, curve((10, 0.1), (20, 0.2))) is None


def evaluation(name: str, split_of: dict[str, str], **extra: Any) -> dict[str, Any]:
    part = {"parameters": 1000, "multiply_adds": 20000}
    points = [
        {
            "id": f"{split}-{title}-{k}", "split": split, "top1": 0.5 + k / 10, "agreement": 0.6 + k / 10,
            "top1_interval": [0.4, 0.6], "top1_lost_interval": [0.0, 0.1], "payload_bytes_mean": 50.0 * 2**k,
            "payload_bytes_p5": 40.0, "payload_bytes_p95": 60.0, "ideal_bytes_mean": 50.0 * 2**k - 1,
            "bpp_payload": 50 * 2**k / 6272,
            "complexity": dict.fromkeys(("head", "encoder", "decoder", "tail"), part),
            "recipe": {"curve": title}, "record": {"estimated_bytes": 48.0},
        }
        for title, split in split_of.items()
        for k in range(3)
    ]  # fmt: skip
    return {"name": name, "dataset": "d", "images": 100, "uncompressed": {"top1": 0.9}, "points": points} | extra


def baselines() -> dict[str, Any]:
    points = [
        {"codec": codec, "setting": f"quality {q}", "split": split, "bytes_mean": 1000.0 * q, "bpp": q,
         "top1": 0.3 + q / 10, "agreement": 0.3 + q / 10}
        for codec, split in (("jpeg", ""), ("avif", ""), ("raw 8 bit", "s1"))
        for q in (1, 3, 6)
    ]  # fmt: skip
    return {"dataset": "d", "images": 100, "uncompressed": {"top1": 0.9}, "baselines": points}


def test_a_page_with_pictures(tmp_path: Path) -> None:
    documents = {
        "ladder": evaluation("efficientnet_lite0", {"": "s1"}),
        "rate_terms": evaluation("rate_terms", {"s1 hyperprior": "s1", "s1 l1": "s1", "s2 l1": "s2"}),
        "topologies": evaluation("topologies", {"conv": "s1"}),
        "baselines": baselines(),
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    results = read_results(tmp_path)
    assert set(results.baselines) == {"jpeg", "avif", "raw 8 bit s1"}
    assert list(results.studies["efficientnet_lite0"]) == ["s1"]
    pictures = draw(results, tmp_path)
    assert sorted(pictures) == ["accuracy.png", "encoder.png", "rate_terms.png", "topologies.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = markdown(results, "make it", {"rate_terms": "What it means."}, pictures)
    assert "![Rate terms: hyperprior and l1](results/rate_terms.png)" in text
    assert "What it means." in text
    needed = math.exp(math.log(1000) + (0.5 - 0.4) / (0.6 - 0.4) * math.log(3))  # top-1 0.5 between qualities 1 and 3
    assert f"| `s1--0` | 50.0 | jpeg | {needed:.0f} | 1/{needed / 50:.0f} |" in text
    assert "| s1 l1 | +0 % |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results"),
        ("{", "no results of"),
        ("[]", "no results of"),
        (json.dumps(evaluation("x", {"a": "s1"}) | {"points": [{}]}), "recipe"),
        (json.dumps(evaluation("x", {"a": "s1"}, images=99)), "different photographs"),
        (json.dumps(evaluation("x", {"a": "s1"})).replace("0.6,", "NaN,"), "NaN is no number"),
        (json.dumps(evaluation("x", {"a": "s1"})).replace("0.6,", "1e999,"), "1e999 is no number"),
        (json.dumps(evaluation("x", {"a": "s1"})).replace("50.0,", "0.0,"), "has 0.0 bytes"),
    ],
)
def test_results_that_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
        (tmp_path / "b.json").write_text(json.dumps(baselines()))
    with pytest.raises(InvalidConfig, match=message):
        read_results(tmp_path)
