"""Counting what the frames and the photographs of two bundles came to."""

import numpy as np
import pytest

from bitneck.wire.messages import Classification, ClassShare, CodedMap, Label
from bitneck_cloud.canary.photographs import equal_pixels
from bitneck_cloud.engine.tally import ENOUGH_FRAMES, Tally, note_of, share_interval


def label(index: int, score: float) -> Classification:
    return Classification((Label(index=index, name=f"class {index}", score=score),))


def test_a_tally_of_answers() -> None:
    tally = Tally()
    assert (tally.frames, tally.fault_share, tally.best_score, tally.labels()) == (0, None, None, [])
    for k in range(10):
        tally.answered("s1-r1", 10 + k, 100 if k else None, label(min(k, 6), k / 10))
    tally.answered("s2-r1", 50, None, label(6, 1.0))
    tally.failed(3)
    assert (tally.frames, tally.fault_share) == (12, 1 / 12)
    assert tally.best_score == pytest.approx(5.5 / 11)
    assert tally.points["s1-r1"].mean_payload_bytes == 14.5
    assert (tally.points["s1-r1"].mean_link_bytes, tally.points["s2-r1"].mean_link_bytes) == (100, None)
    assert tally.all.mean_payload_bytes == pytest.approx(195 / 11)
    first, *others = tally.labels()
    assert first == ("class 6", pytest.approx(5 / 11))
    assert [name for name, _ in others] == ["class 0", "class 1", "class 2", "class 3"]


def test_a_tally_of_class_maps() -> None:
    tally = Tally()
    for share in (0.5, 0.25):
        shares = (ClassShare(index=0, name="sky", share=1 - share), ClassShare(index=1, name="road", share=share))
        tally.answered("s1-r1", 10, 20, CodedMap(height=2, width=2, map=b"", classes=shares))
    assert tally.best_score is None
    assert tally.labels() == [("sky", 0.625), ("road", 0.375)]


def test_an_interval_holds_the_share_and_narrows() -> None:
    assert share_interval(0, 0) is None
    low, high = share_interval(5, 50) or (0, 0)
    assert (low, high) == (pytest.approx(0.0435, abs=1e-3), pytest.approx(0.2136, abs=1e-3))  # Wilson's, from a table
    nothing = share_interval(0, 100)
    assert nothing is not None
    assert (nothing[0], nothing[1]) == (0.0, pytest.approx(0.037, abs=1e-3))
    more = share_interval(500, 5000) or (0, 0)
    assert low < more[0] < 0.1 < more[1] < high


@pytest.mark.parametrize(
    ("answers", "faults", "said"),
    [
        (ENOUGH_FRAMES - 1, 0, "too few frames to compare: 100 of each bundle are needed, so far the candidate 99"),
        (ENOUGH_FRAMES - 1, 1, "no difference in faults can be seen"),
        (ENOUGH_FRAMES, 30, "the candidate has more faults"),
    ],
)
def test_what_may_be_said_of_faults(answers: int, faults: int, said: str) -> None:
    current, candidate = Tally(), Tally()
    for tally, number in ((current, 1000), (candidate, answers)):
        for _ in range(number):
            tally.answered("s1-r1", 10, 100, label(0, 0.5))
    for _ in range(faults):
        candidate.failed(3)
    assert note_of(current, candidate).startswith(said)
    if faults == 30:
        assert note_of(candidate, current).startswith("the candidate has fewer faults")


def test_class_maps_are_compared_by_the_names_of_their_classes() -> None:
    first = np.array([[0, 1], [2, 2]], dtype=np.uint8)
    labels = ("sky", "road", "tree")
    assert equal_pixels(first, labels, first, labels) == 1
    assert equal_pixels(first, labels, np.array([[2, 0], [1, 1]], dtype=np.uint8), ("road", "tree", "sky")) == 1
    assert equal_pixels(first, labels, first, ("sky", "road", "car")) == 0.5
    assert equal_pixels(first, labels, first[:1], labels) is None
