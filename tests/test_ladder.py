"""The ladder and the choice of a point."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import InvalidConfig, RateUnreachable, UnknownPoint
from bitneck.ladder import Ladder, OperatingPoint
from bitneck_cloud.sessions.rates import FixedPoint, MaxBytesPerFrame, MaxKbps, MinAccuracy, choose, usual_link
from bitneck_edge.cli.report import points_table


def point(name: str, size: float, accuracy: float) -> OperatingPoint:
    return OperatingPoint(
        id=name, unit="u", split="s1", step=1.0, stride=4, latent_shape=(8, 2, 2), payload_bytes=size,
        bpp_payload=size * 8 / 50176, accuracy=accuracy,
    )  # fmt: skip


LADDER = Ladder([point("high", 250, 0.86), point("low", 60, 0.73), point("mid", 120, 0.82), point("odd", 200, 0.80)])


def test_order_and_choice() -> None:
    assert [p.id for p in LADDER] == ["low", "mid", "odd", "high"]
    assert LADDER.best.id == "high"
    assert choose(LADDER, FixedPoint("mid")).id == "mid"
    assert choose(LADDER, MaxBytesPerFrame(249)).id == "mid"  # not "odd", which costs more and knows less
    assert choose(LADDER, MinAccuracy(0.8)).id == "mid"
    assert choose(LADDER, MaxKbps(25), frames_per_s=10).id == "mid"  # 312 bytes of the link a frame
    assert choose(LADDER, MaxKbps(40), frames_per_s=20).id == "low"  # 250
    with pytest.raises(RateUnreachable, match=r"low, takes 246 up, of which 60 are its payload, and 151 down"):
        choose(LADDER, MaxKbps(10), frames_per_s=10)


def test_what_cannot_be_had() -> None:
    with pytest.raises(UnknownPoint, match="low, mid, odd, high"):
        LADDER["nope"]
    many = Ladder(point(f"s{k % 4 + 1}-r{k}", k + 1.0, 0.5) for k in range(33))
    with pytest.raises(UnknownPoint, match=r"this bundle has 33, and the nearest names are: (s\d-r\d+, ){2}s\d-r\d+$"):
        many["s1-r9"]
    with pytest.raises(RateUnreachable, match="the lowest, low"):
        choose(LADDER, MaxBytesPerFrame(59))
    with pytest.raises(RateUnreachable, match="the best, high"):
        choose(LADDER, MinAccuracy(0.9))
    for policy in (MaxBytesPerFrame(0), MaxKbps(-1), MaxKbps(float("nan")), MinAccuracy(1.1)):
        with pytest.raises(InvalidConfig):
            choose(LADDER, policy)
    with pytest.raises(InvalidConfig, match="same id"):
        Ladder([point("a", 1, 0.1), point("a", 2, 0.2)])
    with pytest.raises(InvalidConfig, match="at least one"):
        Ladder([])
    for size, accuracy in ((1.0, 1.5), (1.0, float("nan")), (-1.0, 0.5), (float("nan"), 0.5), (float("inf"), 0.5)):
        with pytest.raises(InvalidConfig, match="accuracy"):
            point("a", size, accuracy)
    for frames_per_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidConfig, match="frame rate"):
            choose(LADDER, MaxKbps(10), frames_per_s=frames_per_s)
    for bad in ("S1", "../s1", "", "s1\n"):
        with pytest.raises(InvalidConfig, match="malformed"):
            point(bad, 1, 0.5)


def test_of_equals_the_cheapest_and_then_the_id_decides() -> None:
    ladder = Ladder([point("b", 10, 0.5), point("c", 9, 0.5), point("a", 10, 0.5)])
    assert [p.id for p in ladder] == ["c", "a", "b"]
    assert ladder.best.id == ladder.at_most(10).id == ladder.at_least(0.5).id == "c"
    assert "a" in ladder
    assert "z" not in ladder
    assert len(ladder) == 3
    assert ladder["a"].id == "a"


@given(
    st.lists(st.tuples(st.floats(1, 1000), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(1, 1000),
    st.floats(0, 1),
)
def test_choices_keep_their_promise(points: list[tuple[float, float]], limit: float, accuracy: float) -> None:
    ladder = Ladder([point(f"p{k}", size, acc) for k, (size, acc) in enumerate(points)])
    sizes = [p.payload_bytes for p in ladder]
    assert sizes == sorted(sizes)
    assert ladder.best == ladder.at_most(max(sizes))
    assert ladder.best.accuracy == max(acc for _, acc in points)
    most = usual_link(max(sizes), 0.2).busier * 5 * 8e-3
    assert choose(ladder, MaxKbps(1.001 * most), frames_per_s=5) == ladder.best
    fitting = [acc for size, acc in points if size <= limit]
    if fitting:
        chosen = ladder.at_most(limit)
        assert chosen.payload_bytes <= limit
        assert chosen.accuracy == max(fitting)
    reaching = [size for size, acc in points if acc >= accuracy]
    if reaching:
        cheapest = ladder.at_least(accuracy)
        assert cheapest.accuracy >= accuracy
        assert cheapest.payload_bytes == min(reaching)


def test_what_was_not_measured_is_never_weighed() -> None:
    new, low = point("s1-new", 0, 0), point("s1-r1", 30, 0.7)
    ladder = Ladder([new, low])
    assert ladder.measured == (low,)
    assert choose(ladder, FixedPoint("s1-new")) is new
    assert choose(ladder, MaxBytesPerFrame(40)) is low
    assert choose(ladder, MinAccuracy(0.0)) is low
    with pytest.raises(RateUnreachable, match="the lowest, s1-r1"):
        choose(ladder, MaxBytesPerFrame(10))
    assert Ladder([new]).measured == (new,)


def test_points_that_were_not_measured_say_so() -> None:
    point = {"split": "s1", "step": 1.0, "stride": 2, "latent_shape": (1, 1, 1)}
    ladder = Ladder(
        OperatingPoint(id=name, unit="u", payload_bytes=size, bpp_payload=size, accuracy=size / 10, **point)
        for name, size in (("s1-old", 5.0), ("s1-new", 0.0))
    )
    table = points_table(ladder)
    assert list(table.columns[2].cells) == ["not measured", "5.0"]
