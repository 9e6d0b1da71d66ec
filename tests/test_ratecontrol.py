"""Automatic rate: on traces against fixed rates and an oracle, and rule by rule. No clock but the arguments'."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import InvalidConfig
from bitneck.ladder import Ladder, OperatingPoint
from bitneck_edge.link.cost import OVERHEAD_BYTES
from bitneck_edge.ratecontrol import Decision, RateController, rungs
from bitneck_testing.rate_simulation import SCENES, frames_to_react, ladder_of, run

ZOO = Path(__file__).parent.parent / "models" / "zoo" / "efficientnet_lite0"


def point(name: str, payload_bytes: float, accuracy: float) -> OperatingPoint:
    return OperatingPoint(
        id=name, unit="u", split=name.split("-")[0], step=1.0, stride=1, latent_shape=(1, 1, 1),
        payload_bytes=payload_bytes, bpp_payload=payload_bytes, accuracy=accuracy,
    )  # fmt: skip


LADDER = Ladder(
    [
        point("s1-r1", 30, 0.70),
        point("s1-r2", 90, 0.80),
        point("s1-r3", 300, 0.85),
        point("s2-r1", 200, 0.75),
        point("s2-r2", 900, 0.84),
    ]
)


def controller(target_s: float = 0.3, **values: object) -> RateController:
    return RateController(LADDER, target_s=target_s, **values)  # type: ignore[arg-type]


class Drive:
    """Frames, one after another, over a link of a constant rate."""

    def __init__(self, rate: RateController, *, base_s: float = 0.05, bytes_per_s: float = 1e9) -> None:
        self.rate, self.base_s, self.bytes_per_s = rate, base_s, bytes_per_s
        self.now, self.seq = 0.0, 0

    def frame(self) -> Decision:
        self.seq += 1
        self.now += 0.2
        decision = self.rate.choose(self.now)
        size = next(p.payload_bytes for p in LADDER if p.id == decision.point)
        self.rate.sent(self.seq, decision, int(size), self.now)
        delay = self.base_s + (size + OVERHEAD_BYTES) / self.bytes_per_s
        self.rate.answered(self.seq, self.now + delay, server_s=0.0)
        return decision

    def frames(self, count: int) -> list[str]:
        return [self.frame().point for _ in range(count)]


@pytest.mark.parametrize("name", SCENES)
def test_traces_against_fixed_rates_and_the_oracle(name: str) -> None:
    ladder = ladder_of(ZOO)
    outcomes = run(SCENES[name], ladder)
    auto, oracle = outcomes["auto"], outcomes["oracle"]
    assert auto.accuracy >= 0.95 * oracle.accuracy
    assert auto.misses <= 0.02
    assert auto.accuracy >= 0.99 * max(outcomes["lowest"].accuracy, outcomes["highest"].accuracy)


@pytest.mark.parametrize("name", ["fourfold drop and back", "s3, fourfold drop"])
def test_a_fourfold_drop_is_met_within_three_frames(name: str) -> None:
    ladder = ladder_of(ZOO)
    assert frames_to_react(SCENES[name], ladder, 60.0, run(SCENES[name], ladder)["auto"]) <= 3


def test_only_points_that_are_worth_their_bytes() -> None:
    assert [p.id for p in rungs(LADDER)] == ["s1-r1", "s1-r2", "s1-r3"]
    assert [p.id for p in rungs(LADDER, ["s2"])] == ["s2-r1", "s2-r2"]
    unmeasured = Ladder([*LADDER, point("s1-new", 0, 0)])
    assert [p.id for p in rungs(unmeasured)] == ["s1-r1", "s1-r2", "s1-r3"]


def test_it_begins_low_and_climbs_on_a_link_that_carries_all() -> None:
    drive = Drive(controller())
    points = drive.frames(40)
    assert points[0] == "s1-r1"
    assert set(points[-10:]) == {"s1-r3"}


def test_a_frame_without_an_answer_is_news_too() -> None:
    drive = Drive(controller())
    drive.frames(40)
    drive.rate.sent(41, Decision("s1-r3", ""), 300, 10.0)
    assert drive.rate.choose(10.02).point == "s1-r3"
    decision = drive.rate.choose(10.29)
    assert decision.point != "s1-r3"
    assert "a frame has waited 290 ms" in decision.reason


def test_every_decision_has_a_reason_and_a_fall_is_not_undone_at_once() -> None:
    drive = Drive(controller())
    drive.frames(40)
    drive.bytes_per_s = 1500.0  # 300 bytes and what goes with them take 0.27 s now
    first = next(k for k, name in enumerate(drive.frames(5)) if name != "s1-r3")
    assert first <= 2
    below = drive.rate.choose(drive.now + 0.01)
    assert below.reason
    drive.bytes_per_s = 1e9
    held = drive.frame()
    assert held.point == below.point  # a moment's good news is not enough


def test_probes_that_fail_become_rare() -> None:
    """What small frames take says that there may be room for larger ones; there is none."""
    drive = Drive(controller(target_s=0.35), base_s=0.2, bytes_per_s=1700.0)
    probes = []
    for _ in range(600):
        decision = drive.frame()
        if decision.probe:
            probes.append(drive.now)
        else:
            assert decision.point == "s1-r1"
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert len(gaps) >= 5
    assert all(later >= 1.4 * earlier for earlier, later in itertools.pairwise(gaps) if later < 55)


def test_a_probe_that_succeeds_is_kept() -> None:
    drive = Drive(controller(target_s=0.35), base_s=0.2, bytes_per_s=2500.0)
    drive.frames(20)
    kept = [decision.point for decision in (drive.frame() for _ in range(100)) if not decision.probe]
    assert set(kept) == {"s1-r2"}


def test_a_satellite_is_climbed_by_a_probe() -> None:
    drive = Drive(controller(target_s=0.9), base_s=0.6)
    points = drive.frames(60)
    assert points[-1] == "s1-r3"


def test_split_points_within_a_budget() -> None:
    rate = controller(max_edge_s=0.02, edge_s={"s1": 0.03, "s2": 0.01})
    assert [p.id for p in rate.points] == ["s2-r1", "s2-r2"]

    def frames(begin: int, count: int, edge_s: dict[str, float]) -> None:
        for seq in range(begin, begin + count):
            point = rate.points[0]
            rate.encoded(Decision(point.id, ""), edge_s=edge_s[point.split])
            rate.sent(seq, Decision(point.id, ""), 200, seq * 0.2)
            rate.answered(seq, seq * 0.2 + 0.05, server_s=0.0)

    frames(1, 60, {"s1": 0.15, "s2": 0.05})  # everything is slow: the fastest is used
    assert {p.split for p in rate.points} == {"s2"}
    frames(61, 60, {"s1": 0.009, "s2": 0.003})  # and fast again, if s1 is as much slower as it was
    assert {p.split for p in rate.points} == {"s1"}  # whose points dominate those of s2
    assert "the split points are now s1" in rate.choose(24.1).reason
    assert "split points" not in rate.choose(24.1).reason  # once
    frames(121, 60, {"s1": 0.03, "s2": 0.01})
    assert {p.split for p in rate.points} == {"s2"}


def test_a_probe_that_is_never_sent_is_not_the_last() -> None:
    drive = Drive(controller(target_s=0.35), base_s=0.2, bytes_per_s=1700.0)
    asked = 0
    for _ in range(300):
        drive.now += 0.2
        if drive.rate.choose(drive.now).probe:
            asked += 1  # the picture could not be read
            continue
        drive.now -= 0.2
        drive.frame()
    assert asked >= 3


def test_a_new_link_is_judged_anew() -> None:
    drive = Drive(controller())
    drive.frames(40)
    drive.rate.reconnected(drive.now)
    assert drive.rate.choose(drive.now + 0.01).point == "s1-r1"
    assert drive.rate.delay_s is None


def test_settings_that_make_no_sense() -> None:
    for values in ({"target_s": 0.0}, {"target_s": 1.0, "max_edge_s": 0.0}):
        with pytest.raises(InvalidConfig, match="above zero"):
            RateController(LADDER, **values)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig):
        RateController(Ladder([]), target_s=1.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["choose", "sent", "answered", "lost", "reconnected"]), st.floats(0, 2)), max_size=200
    )
)
def test_anything_may_happen_in_any_order(events: list[tuple[str, float]]) -> None:
    rate = controller(max_edge_s=0.05, edge_s={"s1": 0.04, "s2": 0.01})
    now, seq, decision = 0.0, 0, Decision("s1-r1", "")
    for what, value in events:
        now += value
        match what:
            case "choose":
                decision = rate.choose(now)
                assert decision.reason
                assert decision.point in {p.id for p in rate.points}
            case "sent":
                seq += 1
                rate.encoded(decision, edge_s=value, other_s=value)
                rate.sent(seq, decision, int(value * 1000), now)
            case "answered":
                rate.answered(seq - int(value * 3), now, server_s=value / 10)
            case "lost":
                rate.lost(seq - int(value * 3), now)
            case _:
                rate.reconnected(now)
        assert math.isfinite(rate.base_s)
