"""Which operating point the next frame gets: the user's, the cloud's, or the rate controller's."""

import logging

import pytest

from bitneck.errors import UnknownPoint
from bitneck.ladder import Ladder, OperatingPoint
from bitneck_edge.answers.results import Switch
from bitneck_edge.points import MeanInterval, PointChoice, Wish
from bitneck_edge.ratecontrol import RateController


def point(number: int) -> OperatingPoint:
    return OperatingPoint(
        id=f"p{number}", unit="u", split="s", step=1.0, stride=1, latent_shape=(1, 1, 1), payload_bytes=100.0 * number,
        bpp_payload=0.1 * number, accuracy=0.5 + 0.1 * number,
    )  # fmt: skip


LADDER = Ladder([point(1), point(2), point(3)])


def choice() -> tuple[PointChoice, list[Switch]]:
    switches: list[Switch] = []
    return PointChoice(LADDER, RateController(LADDER, target_s=0.4), switches.append), switches


@pytest.mark.parametrize(
    ("wish", "asked", "auto", "first"),
    [
        (Wish.of(""), "", False, "p3"),  # nobody wants anything: the best
        (Wish.of(""), "p2", False, "p2"),
        (Wish.of("p1"), "", False, "p1"),
        (Wish.of("p1"), "p2", False, "p1"),  # a point that the user names stands against the cloud's
        (Wish.of("auto"), "", True, "p1"),  # nothing is known of the link yet
        (Wish.of("auto"), "p2", False, "p2"),  # the cloud's stands against a choice that has not begun
        (Wish(auto=True, point="p3"), "p2", True, "p1"),  # and not against one that has
        (Wish(auto=False, point="p9"), "", False, "p3"),  # the bundle of before had it, this one has not
        (Wish(auto=False, point="p9"), "p2", False, "p2"),
        (Wish(auto=False, point="p2", own=Wish.of("p1")), "p3", False, "p3"),  # the cloud asked before, and asks now
        (Wish(auto=False, point="p2", own=Wish.of("p1")), "", False, "p1"),  # and asks no more
        (Wish(auto=False, point="p2", own=Wish.of("")), "", False, "p3"),
        (Wish(auto=False, point="p2", own=Wish.of("auto")), "", True, "p1"),
    ],
)
def test_the_first_point(wish: Wish, asked: str, auto: bool, first: str, caplog: pytest.LogCaptureFixture) -> None:
    points, switches = choice()
    assert (points.auto, points.point) == (False, "")
    points.begin(wish, asked, 0.0)
    assert (points.auto, points.point, switches) == (auto, first, [])
    assert points.choose(0.0, 0.0).point == first
    assert ("the cloud asks new sessions for p2" in caplog.text) == (wish == Wish.of("auto") and asked == "p2")
    assert points.wish == Wish(auto, first)


@pytest.mark.parametrize("setting", ["p1", "", "auto"])
def test_what_the_user_wished_is_remembered_while_the_cloud_asks_for_another_point(setting: str) -> None:
    points, _ = choice()
    points.begin(Wish.of(setting), "", 0.0)
    assert points.wish.own is None
    points.ask("p2", "a rate")
    points.ask("p3", "another one")
    assert (points.wish.point, points.wish.own) == ("p3", Wish.of(setting))
    following, _ = choice()
    following.begin(points.wish, "p2", 0.0)
    assert (following.point, following.wish.own) == ("p2", Wish.of(setting))
    following.set("p3")
    assert following.wish.own is None
    following.ask("p1", "a rate")
    assert following.wish.own == Wish(auto=False, point="p3")
    following.ask("", "no rate")
    assert following.wish == Wish(auto=True, point=following.wish.point)
    assert following.wish.own is None


@pytest.mark.parametrize(("asked", "auto", "first"), [("p2", False, "p2"), ("", True, "p1")])
def test_the_cloud_may_ask_before_the_first_point_is_chosen(asked: str, auto: bool, first: str) -> None:
    points, switches = choice()
    points.ask(asked, "a test")
    points.begin(Wish.of("p3"), "", 0.0)
    assert (points.auto, points.point, switches) == (auto, first, [])


def test_the_program_and_the_cloud_change_the_point(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    points, switches = choice()
    points.begin(Wish.of("auto"), "", 0.0)
    points.last_seq = 7
    points.set("p2")
    assert (points.auto, points.point) == (False, "p2")
    points.set("p2")
    points.ask("p3", "asked by a test")
    assert (points.auto, points.point) == (False, "p3")
    points.ask("p9", "a mistake")
    assert "this bundle does not have" in caplog.text
    assert (points.auto, points.point) == (False, "p3")
    points.ask("", "handed back")
    assert (points.auto, points.point) == (True, "p3")
    assert points.choose(1.0, 0.0).point == "p1"  # the controller begins with the lowest
    assert switches == [
        Switch(7, "p1", "p2", "set by the program"),
        Switch(7, "p2", "p3", "asked by a test"),
        Switch(7, "p3", "p1", "chosen for each frame from here on; nothing is known of the link yet"),
    ]


def test_an_unknown_point_changes_nothing() -> None:
    points, switches = choice()
    points.begin(Wish.of("auto"), "", 0.0)
    with pytest.raises(UnknownPoint, match="p1, p2, p3"):
        points.set("p9")
    assert (points.auto, points.point, switches) == (True, "p1", [])
    points.set("auto")
    assert points.auto


def test_the_mean_interval() -> None:
    interval = MeanInterval()
    for at in (10.0, 10.5):
        interval.add(at)
    assert interval.seconds == 0.5
    interval.add(11.5)
    assert interval.seconds == pytest.approx(0.55)
    interval.add(11.0)  # a picture that was taken before the last one
    assert 0 < interval.seconds < 0.55
