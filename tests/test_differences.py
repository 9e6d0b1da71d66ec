"""Differences between curves over the same photographs: what is kept of each photograph, pairing, intervals."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck_models.measure.each import EachPhoto, photos_crc32c
from bitneck_models.measure.evaluate import evaluate
from bitneck_models.measure.intervals import RESAMPLES
from bitneck_models.report.curves import Curve, Sample, read_results
from bitneck_models.report.differences import compared, mean_difference, resampled_curves
from bitneck_models.report.pictures import draw
from bitneck_models.report.tables import markdown

PHOTOS = 400


def sample(name: str, each: EachPhoto, photos: str = "same") -> Sample:
    size, right, agrees = (float(v.mean()) for v in (each.payload_bytes, each.right, each.agrees))
    return Sample(
        name=name,
        payload_bytes=size,
        bpp=size / 6272,
        accuracy=right,
        agreement=agrees,
        each=each,
        photos_crc32c=photos,
    )


def measured(seed: int = 0, *, wrong: float = 0.0, scale: float = 1.0, photos: str = "same") -> Curve:
    """Four points. Hard photographs are hard at every point; a share of all of them is wrong whatever the point."""
    rng = np.random.default_rng(seed)
    hardness, spoilt = rng.random(PHOTOS), np.random.default_rng(99).random(PHOTOS) < wrong
    sizes = rng.integers(60, 140, PHOTOS)
    points = []
    for k, limit in enumerate((0.6, 0.7, 0.8, 0.85)):
        right = (hardness < limit) & ~spoilt
        each = EachPhoto(payload_bytes=np.rint(sizes * 2**k * scale).astype(np.int64), right=right, agrees=right)
        points.append(sample(str(k), each, photos))
    return tuple(points)


# What is kept


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_each_photograph_comes_back(rows: list[tuple[int, bool, bool]]) -> None:
    each = EachPhoto.from_dict(json.loads(json.dumps(EachPhoto.of(rows).to_dict())), len(rows))
    back = zip(each.payload_bytes.tolist(), each.right.tolist(), each.agrees.tolist(), strict=True)
    assert list(back) == rows


@pytest.mark.parametrize("broken", ["count", "cut", "key"])
def test_results_of_other_photographs_are_refused(broken: str) -> None:
    fields, count = EachPhoto.of([(5, True, False)] * 9).to_dict(), 9
    if broken == "count":
        count = 10
    elif broken == "cut":
        fields["right"] = fields["right"][:-4]
    else:
        del fields["agrees"]
    with pytest.raises((ValueError, KeyError)):
        EachPhoto.from_dict(fields, count)


def test_the_checksum_is_of_names_and_order() -> None:
    a, b = Path("one/a.png"), Path("two/b.png")
    assert photos_crc32c([a, b]) == photos_crc32c([Path("other/a.png"), b])
    assert photos_crc32c([a, b]) != photos_crc32c([b, a])


def test_class_maps_have_no_results_of_each_photograph(scene_bundle: Bundle) -> None:
    with pytest.raises(InvalidConfig, match="this bundle is for segmentation"):
        evaluate(scene_bundle, [(Path("a.png"), Path("b.png"))], each=True)


# Differences


def test_a_mean_difference_is_over_the_bytes_that_both_cover() -> None:
    def line(*points: tuple[float, float]) -> Curve:
        return tuple(
            Sample(name=str(k), payload_bytes=b, bpp=0, accuracy=a, agreement=a) for k, (b, a) in enumerate(points)
        )

    low, high = line((100, 0.5), (400, 0.7)), line((200, 0.7), (800, 0.9))
    # Over 200 to 400 bytes: 0.6 to 0.7 against 0.7 to 0.8.
    assert mean_difference(low, high, lambda s: s.accuracy) == pytest.approx(-0.1)
    assert mean_difference(low, line((500, 0.5), (600, 0.6)), lambda s: s.accuracy) is None


def test_a_curve_does_not_differ_from_itself() -> None:
    """Were the resamples of the two curves not the same, the intervals would have a width."""
    found = compared(measured(), measured())
    for difference in (found.accuracy, found.agreement, found.bytes_share):
        assert difference is not None
        assert difference.value == pytest.approx(0, abs=1e-12)
        assert difference.interval == pytest.approx((0, 0), abs=1e-12)


def test_a_paired_interval_is_that_of_the_photographs_that_differ() -> None:
    ours, theirs = measured(wrong=0.05), measured()
    changed = np.mean([a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)])
    found = compared(ours, theirs).accuracy
    assert found is not None
    assert found.value == pytest.approx(changed, abs=0.005)
    share = -found.value  # of the photographs: each differs, or not, along the whole curve but for its hardest end
    half = 1.96 * math.sqrt(share * (1 - share) / PHOTOS)
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(half, rel=0.2)
    unpaired = 1.96 * math.sqrt(2 * 0.25 * 0.75 / PHOTOS)
    assert half < unpaired / 2


def test_fewer_bytes_for_the_same_answers() -> None:
    ours, theirs = measured(scale=0.5), measured()
    saved = compared(ours, theirs).bytes_share
    assert saved is not None
    assert saved.value == pytest.approx(-0.5, abs=0.01)
    assert saved.interval == pytest.approx((-0.5, -0.5), abs=0.01)
    back = compared(theirs, ours).bytes_share
    assert back is not None
    assert back.value == pytest.approx(1.0, abs=0.02)


def test_resamples_are_of_whole_photographs() -> None:
    """A resampled point's bytes and answers are those of the same photographs."""
    right: NDArray[np.bool_] = np.arange(PHOTOS) % 2 == 0
    each = EachPhoto(payload_bytes=np.where(right, 300, 100).astype(np.int64), right=right, agrees=~right)
    draws = resampled_curves((sample("a", each),))
    assert len(draws) == RESAMPLES
    for (drawn,) in draws:
        assert drawn.payload_bytes == pytest.approx(100 + 200 * drawn.accuracy)
        assert drawn.agreement == pytest.approx(1 - drawn.accuracy)
    spread = np.std([drawn.accuracy for (drawn,) in draws])
    assert spread == pytest.approx(0.5 / math.sqrt(PHOTOS), rel=0.1)


def test_curves_without_a_common_range_have_no_difference() -> None:
    found = compared(measured(scale=100), measured())
    assert (found.accuracy, found.agreement) == (None, None)
    assert found.bytes_share is not None  # they reach the same agreements, at other bytes


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="other photographs"):
        compared(measured(), measured(photos="other"))
    without = tuple(dataclasses.replace(s, each=None) for s in measured())
    with pytest.raises(InvalidConfig, match="no results of each photograph"):
        compared(without, measured())


# The page


def document(name: str, curves: dict[str, Curve], titles: dict[str, Any]) -> dict[str, Any]:
    part = {"parameters": 1000, "multiply_adds": 20000}
    points = [
        {
            "id": f"{unit}{'' if k == 0 else f'-x{k}'}", "unit": unit, "split": "s1", "top1": s.accuracy,
            "agreement": s.agreement, "payload_bytes_mean": s.payload_bytes, "bpp_payload": s.bpp,
            "complexity": dict.fromkeys(("head", "encoder", "decoder", "tail"), part),
            "recipe": {"curve": titles[unit]}, "record": {"estimated_bytes": 48.0},
            "each": s.each.to_dict() if s.each is not None else None,
        }
        for unit, curve in curves.items()
        for k, s in enumerate(curve)
    ]  # fmt: skip
    return {
        "name": name, "dataset": "d", "images": PHOTOS, "photos_crc32c": "same", "uncompressed": {"top1": 0.9},
        "points": points,
    }  # fmt: skip


def test_arms_that_studies_share_are_compared_on_the_page(tmp_path: Path) -> None:
    curves = {"s1-a": measured(), "s1-b": measured(scale=0.5)}
    titles = {"s1-a": {"layers": "pool", "steps": "one unit"}, "s1-b": {"layers": "last"}}
    (tmp_path / "arms.json").write_text(json.dumps(document("arms", curves, titles)))
    more = document("more", {"s1-c": measured(scale=2)}, {"s1-c": {"steps": "four units"}})
    (tmp_path / "more.json").write_text(json.dumps(more))
    results = read_results(tmp_path)
    assert {study: list(found) for study, found in results.studies.items()} == {
        "layers": ["pool", "last"], "steps": ["one unit", "four units"],
    }  # fmt: skip
    assert results.ladder is None
    text = markdown(results, "make it", {}, draw(results, tmp_path))
    assert "![Layers to distil from (Fig. 4 of the paper)](results/layers.png)" in text
    assert "| pool | last | " in text
    (row,) = [line for line in text.splitlines() if line.startswith("| one unit | four units |")]
    assert "-50 % (-50 to -50)" in row
    assert "bytes saved at equal agreement" not in text.lower()
    assert text.count("48.0 bytes") == 4  # a unit's own step, in each study that it is in


def test_a_point_that_two_documents_have_is_refused(tmp_path: Path) -> None:
    text = json.dumps(document("layers", {"s1-a": measured()}, {"s1-a": "pool"}))
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(InvalidConfig, match="twice in the curve 'pool'"):
        read_results(tmp_path)
