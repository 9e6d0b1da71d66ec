"""The ladder and the choice of a point."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import InvalidConfig, RateUnreachable, UnknownPoint
from bitneck.ladder import (
    FixedPoint,
    Ladder,
    MaxBytesPerFrame,
    MaxKbps,
    MinAccuracy,
    OperatingPoint,
    choose,
)


def point(name: str, size: float, accuracy: float) -> OperatingPoint:
    return OperatingPoint(
        id=name, split="s1", step=1.0, stride=4, latent_shape=(8, 2, 2), payload_bytes=size,
        bpp_payload=size * 8 / 50176, accuracy=accuracy,
    )  # fmt: skip


LADDER = Ladder([point("high", 250, 0.86), point("low", 60, 0.73), point("mid", 120, 0.82), point("odd", 200, 0.80)])


def test_order_and_choice() -> None:
    assert [p.id for p in LADDER] == ["low", "mid", "odd", "high"]
    assert LADDER.best.id == "high"
    assert choose(LADDER, FixedPoint("mid")).id == "mid"
    assert choose(LADDER, MaxBytesPerFrame(249)).id == "mid"  # not "odd", which costs more and knows less
    assert choose(LADDER, MinAccuracy(0.8)).id == "mid"
    assert choose(LADDER, MaxKbps(10), frames_per_s=10).id == "mid"  # 125 bytes a frame
    assert choose(LADDER, MaxKbps(10), frames_per_s=20).id == "low"


def test_what_cannot_be_had() -> None:
    with pytest.raises(UnknownPoint, match="low, mid, odd, high"):
        LADDER["nope"]
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
    with pytest.raises(InvalidConfig, match="accuracy"):
        point("a", 1, 1.5)


@given(
    st.lists(st.tuples(st.floats(1, 1000), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(1, 1000),
    st.floats(0, 1),
)
def test_choices_keep_their_promise(points: list[tuple[float, float]], limit: float, accuracy: float) -> None:
    ladder = Ladder([point(f"p{k}", size, acc) for k, (size, acc) in enumerate(points)])
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
