"""Turns of callers and sessions in the engine's queue, and limits of callers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import Overloaded
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.engine.fair_queue import FairQueue

STALL_S = 2
CALLS = 40
"""That a connection may have open."""
HALF_A_REQUEST = (
    b"PUT /v1/rate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
)
WAIT_S = 30.0
"""Within this time, what must come true has come true on any machine."""


def test_callers_and_their_sessions_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for k in range(4):
        for session in "ab":
            queue.push(f"greedy {session}{k}", "greedy", session)
    queue.push("modest 0", "modest", "c")
    order = list(queue.drain())
    assert order.index("modest 0") == 1
    assert order[0] == "greedy a0"
    assert order[2:] == ["greedy b0", "greedy a1", "greedy b1", "greedy a2", "greedy b2", "greedy a3", "greedy b3"]


def test_a_full_queue_makes_room_for_whoever_has_little_in_it() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for k in range(4):
        assert queue.push(f"greedy {k}", "greedy", "s") is None
    with pytest.raises(Overloaded):
        queue.push("greedy 4", "greedy", "s")
    assert queue.push("modest 0", "modest", "t") == "greedy 3"
    assert queue.push("modest 1", "modest", "t") == "greedy 2"
    with pytest.raises(Overloaded):  # both have two
        queue.push("modest 2", "modest", "t")
    assert list(queue.drain()) == ["greedy 0", "modest 0", "greedy 1", "modest 1"]


def test_what_does_not_fit_keeps_its_place() -> None:
    queue: FairQueue[int] = FairQueue(10)
    for item, session in ((1, "a"), (2, "a"), (10, "b"), (3, "a")):
        queue.push(item, "caller", session)
    assert queue.pop(lambda item: item >= 10) == 10
    assert queue.pop(lambda item: item >= 10) is None
    assert list(queue.drain()) == [1, 2, 3]


@pytest.mark.parametrize("of_one_caller", [True, False])
def test_what_does_not_fit_is_served_next_whatever_comes_beside_it(of_one_caller: bool) -> None:
    """Two that always have frames of one model, and a short visit of a third, keep no other model waiting."""
    queue: FairQueue[str] = FairQueue(100)

    def push(item: str, name: str) -> None:
        queue.push(item, "caller" if of_one_caller else name, name)

    def batch() -> set[str]:
        model = queue.pop(lambda _: True)
        assert model is not None
        taken = [model, *(queue.pop(lambda item: item == model) for _ in range(3))]
        for name in "xy":
            for _ in range(2):
                push("a", name)
        return {item for item in taken if item is not None}

    for name in "xyxyxyxyxyxyxyxy":
        push("a", name)
    assert batch() == {"a"}
    push("b", "modest")
    push("a", "visitor")
    assert {"b"} in [batch() for _ in range(2)]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ab")), max_size=60), st.integers(1, 20))
def test_nothing_is_lost_or_reordered_within_a_session(pushes: list[tuple[str, str]], limit: int) -> None:
    queue: FairQueue[tuple[str, str, int]] = FairQueue(limit)
    inside: list[tuple[str, str, int]] = []
    for k, (caller, session) in enumerate(pushes):
        try:
            displaced = queue.push((caller, session, k), caller, session)
        except Overloaded:
            assert len(queue) == limit
            continue
        inside.append((caller, session, k))
        if displaced is not None:
            inside.remove(displaced)
        assert len(queue) == len(inside) <= limit
    out = list(queue.drain())
    assert sorted(out) == sorted(inside)
    for caller, session in set(pushes):
        assert [k for c, s, k in out if (c, s) == (caller, session)] == sorted(
            k for c, s, k in inside if (c, s) == (caller, session)
        )


def test_limits_of_callers_are_bounded_themselves() -> None:
    limits = CallerLimits(max_calls=2, max_frames_per_s=1.0)
    for k in range(10_000):
        limits.frame(f"caller {k}", 0.0)
    limits.begin("a", "calls")
    limits.begin("a", "calls")
    with pytest.raises(Overloaded):
        limits.begin("a", "calls")
    limits.begin("a", "others", 1)
    limits.end("a", "calls")
    limits.begin("a", "calls")
    for _ in range(15):
        limits.frame("new", 100.0)
    limits.frame("new", 100.0)
    with pytest.raises(Overloaded, match="1 frames a second"):
        limits.frame("new", 100.0)
    limits.frame("new", 101.0)
