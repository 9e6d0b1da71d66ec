"""The table of unanswered frames, against a plain model of it: numbers, window, resends, retries, references."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.coding.conditional_codec import Reference
from bitneck.errors import Overloaded
from bitneck.wire.frames import MAX_MESSAGE_BYTES, check_frame, wire_bytes
from bitneck_edge.link.records import Coded, Records

LONG, SHORT = bytes(40), bytes(10)


def symbols(point: str, seq: int) -> Reference:
    return Reference(point, np.zeros((1, 1, 1), np.int8), seq)


def table(*, window: int = 4, reach: int = 4, key_every: int = 10) -> Records[int]:
    records = Records[int](key_every=key_every)
    records.opened(window=window, reach=reach)
    return records


def add(records: Records[int], point: str = "p", now_s: float = 0.0, payload: bytes = LONG) -> Any:
    """A frame of similar pictures, which takes fewer bytes if it is coded against another one."""
    seq = records.next_seq
    coded = Coded(symbols=symbols(point, seq), candidate=records.candidate(point), payload=SHORT)
    return records.add(point, payload, answer=seq, now_s=now_s, similar=coded)


@given(st.lists(st.one_of(st.just("send"), st.just("reconnect"), st.integers(1, 30)), max_size=100))
def test_nothing_is_lost_and_nothing_is_answered_twice(steps: list[str | int]) -> None:
    records, waiting, sent_s = table(window=5), set[int](), dict[int, float]()
    duplicates = 0
    for now_s, step in enumerate(steps):
        if step == "send":
            seq = records.next_seq
            if records.has_room():
                record = records.add("p", b"", answer=seq, now_s=now_s)
                assert (record.frame.seq, record.answer) == (seq, seq)
                waiting.add(seq)
                sent_s[seq] = now_s
            else:
                with pytest.raises(Overloaded):
                    records.add("p", b"", answer=seq, now_s=now_s)
                assert records.next_seq == seq
        elif step == "reconnect":
            assert records.seqs == tuple(sorted(waiting))
            for k in records.seqs:
                frame = records.resend(k, now_s)
                assert frame is not None
                assert frame.seq == k
                sent_s[k] = now_s
        else:
            assert isinstance(step, int)
            record = records.settle(step, answered=True)
            assert (record is not None) == (step in waiting)
            duplicates += step not in waiting
            waiting.discard(step)
            assert records.resend(step, now_s) is None
        assert len(records) == len(waiting) <= records.window
        assert all((k in records) == (k in waiting) for k in range(1, 31))
        assert records.oldest_sent_s == min((sent_s[k] for k in waiting), default=None)
        assert records.duplicates == duplicates


def test_a_frame_is_tried_again_only_so_often() -> None:
    records = table(window=2)
    records.add("p", b"x", answer=0, now_s=0.0)
    tries = 0
    while records.retry(1, 1.0 + tries) is not None:
        tries += 1
    assert tries == 3
    assert records.oldest_sent_s == 3.0
    assert records.retry(99, 5.0) is None
    records.restart()  # another session may be asked as often
    assert records.retry(1, 6.0) is not None


def test_fewer_frames_than_the_window_may_be_in_flight() -> None:
    records = table(window=3)
    records.add("p", b"", answer=0, now_s=0.0)
    assert [records.has_room(in_flight) for in_flight in (0, 1, 2, 9)] == [True, False, True, True]
    for _ in range(2):
        records.add("p", b"", answer=0, now_s=0.0)
    assert [records.has_room(in_flight) for in_flight in (0, 1, 2, 9)] == [False] * 4


def test_giving_up_returns_every_answer_place_once() -> None:
    records = table()
    for k in range(3):
        records.add("p", b"", answer=k, now_s=0.0)
    records.settle(2, answered=False)
    assert [record.answer for record in records.give_up()] == [0, 2]
    assert (len(records), records.give_up(), records.oldest_sent_s) == (0, (), None)
    assert records.settle(1, answered=True) is None


def test_an_oversized_frame_leaves_no_trace() -> None:
    records = table()
    with pytest.raises(Overloaded, match="choose an operating point of a lower rate"):
        records.add("p", bytes(MAX_MESSAGE_BYTES), answer=0, now_s=0.0)
    assert (records.next_seq, len(records)) == (1, 0)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["send p", "send q", "forget", "restart"]),
            st.tuples(st.sampled_from(["answer", "fail", "refuse", "resend"]), st.integers(0, 5)),
        ),
        max_size=120,
    ),
    st.integers(0, 6),
    st.integers(1, 8),
)
def test_a_reference_is_always_an_answered_frame_of_the_session(steps: list[Any], reach: int, key_every: int) -> None:
    records = table(window=200, reach=reach, key_every=key_every)
    unanswered, good, run = dict[int, tuple[str, int]](), dict[int, str](), {"p": 0, "q": 0}
    for step in steps:
        if step in ("forget", "restart"):
            getattr(records, "forget_references" if step == "forget" else "restart")()
            good.clear()
        elif isinstance(step, str):
            point = step[-1]
            record = add(records, point)
            seq, distance = record.frame.seq, record.frame.reference
            assert record.refers == bool(distance)
            if distance:
                assert good[seq - distance] == point
                assert distance <= reach
                assert distance == seq - max(k for k, name in good.items() if name == point)
                check_frame(record.frame, seq - distance)  # the reference's CRC is its number here
                assert record.frame.payload == SHORT
                run[point] += 1
                assert run[point] < key_every
            else:
                usable = [k for k, name in good.items() if name == point and seq - k <= reach]
                assert not usable or run[point] + 1 >= key_every
                run[point] = 0
            check_frame(record.alone)
            assert (record.alone.payload, record.alone.seq) == (LONG, seq)
            unanswered[seq] = point, distance
        elif len(unanswered) > step[1]:
            chosen = sorted(unanswered)[step[1]]
            if step[0] == "resend":
                frame = records.resend(chosen, 0.0)
                assert frame is not None
                assert frame.reference == 0
                continue
            if step[0] == "refuse":
                records.reference_refused(chosen)
                if unanswered[chosen][1]:
                    good.clear()
                continue
            assert records.settle(chosen, answered=step[0] == "answer") is not None
            point, _ = unanswered.pop(chosen)
            if step[0] == "answer" and reach:
                good[chosen] = point
            assert records.settle(chosen, answered=True) is None  # a second answer counts for nothing


def test_a_candidate_of_an_earlier_session_is_dropped() -> None:
    records = table(window=9, reach=4)
    add(records)
    records.settle(1, answered=True)
    candidate = records.candidate("p")
    assert candidate is not None
    coded = Coded(symbols=symbols("p", 9), candidate=candidate, payload=SHORT)
    assert records.add("p", LONG, answer=0, now_s=0.0, similar=coded).frame.reference == 1
    for _ in range(3):
        records.add("p", LONG, answer=0, now_s=0.0)
    assert records.candidate("p") is None  # five frames back
    assert records.add("p", LONG, answer=0, now_s=0.0, similar=coded).frame.reference == 0
    records = table(window=9, reach=4)
    add(records)
    records.settle(1, answered=True)
    records.forget_references()
    assert records.candidate("p") is None
    assert records.add("p", LONG, answer=0, now_s=0.0, similar=coded).frame.reference == 0


def test_the_smaller_coding_is_sent() -> None:
    """What the reference costs counts: its distance is two bytes."""
    records = table()
    add(records)
    records.settle(1, answered=True)
    same = Coded(symbols=symbols("p", 2), candidate=records.candidate("p"), payload=LONG)
    record = records.add("p", LONG, answer=0, now_s=0.0, similar=same)
    assert (record.refers, record.frame) == (False, record.alone)
    assert record.frame.reference == 0
    records.settle(2, answered=True)
    smaller = Coded(symbols=symbols("p", 3), candidate=records.candidate("p"), payload=LONG[:-3])
    record = records.add("p", LONG, answer=0, now_s=0.0, similar=smaller)
    assert (record.refers, record.frame.reference) == (True, 1)
    assert wire_bytes(record.frame) == wire_bytes(record.alone) - 1
    assert records.retry(3, 1.0) == (record.alone, 0.0)


def test_an_older_frame_that_is_answered_late_is_no_reference() -> None:
    records = table()
    add(records)
    add(records)
    records.settle(2, answered=True)
    records.settle(1, answered=True)
    candidate = records.candidate("p")
    assert candidate is not None
    assert candidate.seq == 2
