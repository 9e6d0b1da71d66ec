"""Answers before anyone reads them: the buffer, and the filters."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.coding.class_map import encode_map
from bitneck.errors import InvalidConfig, UnknownModel
from bitneck.wire.messages import CodedMap
from bitneck_cloud.answers.document import MapForm, Published, json_of
from bitneck_cloud.answers.filters import AnswerFilter, Wanted
from bitneck_cloud.answers.hub import Hub
from bitneck_cloud.answers.subscriptions import Subscription
from bitneck_cloud.fleet.patterns import Groups, Pattern
from bitneck_testing.consumers.published import EPOCH, GROUPS, LABELS, answered, everything, published, subscriptions

# The document


@pytest.mark.parametrize("name", ["cat", "Kätzchen", "猫", "🐈", "\ud83d", "a\u2028b\nc\x7f"])
def test_a_document_is_one_line_of_ascii(name: str) -> None:
    """Whatever a bundle calls its classes."""
    document = {"labels": [{"index": 1, "name": name, "score": 1e-06}], "map": None, "seq": (1 << 64) - 1}
    text = json_of(document)
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text) == document


# The buffer


@given(
    st.lists(st.one_of(st.integers(0, 5000), st.tuples(st.integers(0, 3), st.integers(1, 9))), max_size=60),
    st.integers(1, 8),
    st.integers(2000, 30_000),
)
def test_readers_get_everything_or_are_told(steps: list[int | tuple[int, int]], most: int, most_bytes: int) -> None:
    """An int keeps an answer with a map of so many bytes; a pair lets a reader take some."""
    hub = Hub(EPOCH, most=most, most_bytes=most_bytes)
    positions, seen, missed = [1] * 4, [0] * 4, [0] * 4
    for step in steps:
        if isinstance(step, int):
            hub.keep([published(hub.end, map_bytes=step)])
            continue
        who, count = step
        reading = hub.read(positions[who], everything, most=count, look_at=99)
        if reading.missed is not None:
            assert reading.missed.before == positions[who] + (reading.missed.count or 0)
            missed[who] += reading.missed.count or 0
        for it in reading.answers:
            it.text(MapForm.RUNS)
            hub.count(it)
        seen[who] += len(reading.answers)
        positions[who] = reading.position
        assert len(hub) <= most
        assert hub.bytes <= most_bytes or len(hub) == 1
    for who, position in enumerate(positions):
        assert seen[who] + missed[who] == position - 1


def test_documents_count_as_bytes() -> None:
    hub = Hub(EPOCH, most=10, most_bytes=9000)
    hub.keep([published(k, map_bytes=1000) for k in (1, 2, 3)])
    assert (len(hub), hub.bytes) == (3, 7500)
    newest = hub.read(3, everything, most=1, look_at=1).answers[0]
    newest.text(MapForm.RUNS)  # more than 1333 bytes of base64
    hub.count(newest)
    assert len(hub) == 2
    assert hub.bytes == sum(it.size for it in hub.read(2, everything, most=9, look_at=9).answers)


@pytest.mark.parametrize("after", ["x", "5", "0123abcd", "0123abcd-", "0123ABCD-1", "0123abcd-1\n", "-1", "0" * 30])
def test_only_ids_are_taken(after: str) -> None:
    with pytest.raises(InvalidConfig, match="no id of an answer"):
        Hub(EPOCH, most=1, most_bytes=1).begin(after)


async def test_those_who_want_the_same_are_told_the_same() -> None:
    """One text is made for all of them, however many there are."""
    own = subscriptions()

    def opened(form: MapForm = MapForm.NONE, after: str = "", **wanted: Any) -> Subscription:
        return own.open(Wanted(**wanted), LABELS, form=form, after=after, holder=None)

    first, second, behind, of_cats, with_maps = (
        opened(), opened(), opened(), opened(classes=("cat",)), opened(MapForm.RUNS)
    )  # fmt: skip
    own.keep([published(1), published(2)])
    told = await first.next(30.0)
    assert await second.next(30.0) is told
    for other in (of_cats, with_maps):
        assert (await other.next(30.0)).answers == told.answers
        assert first.sent == second.sent == other.sent == 2
    own.keep([published(3)])
    newer = await first.next(30.0)
    assert await second.next(30.0) is newer
    assert (await behind.next(30.0)).answers == (*told.answers, *newer.answers)
    late = opened(after=f"{EPOCH}-2")
    assert (await late.next(30.0)).answers == newer.answers
    assert late.sent == 1


async def test_a_subscriber_looks_at_many_answers_without_keeping_the_loop() -> None:
    readers = subscriptions(most=10_000)
    readers.keep([published(k, client="other") for k in range(1, 5001)])
    wanted = Wanted(client=("me",))
    it = readers.open(wanted, LABELS, form=MapForm.NONE, after="0", holder=None, who="test")
    readers.keep([published(5001, client="me")])
    async with asyncio.timeout(30):
        news = await it.next(30.0)
    assert [json.loads(text)["number"] for _, text in news.answers] == [5001]
    assert news.upto == f"{EPOCH}-5001"
    readers.close(it)
    assert len(readers) == 0


# Filters


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        (Wanted(classes=("dog",), min_score=0.75), True),
        (Wanted(classes=("1",)), True),
        (Wanted(classes=("cat",), min_score=0.26), False),
        (Wanted(classes=("[7]",)), False),  # the name of a class that was not found
        (Wanted(classes=("cat", "[7]"), min_score=0.2), True),
        (Wanted(classes=("d?g", "c*"), min_score=0.75), True),
        (Wanted(classes=("2",)), False),
        (Wanted(min_score=0.76), False),
        (Wanted(client=("c",)), True),
        (Wanted(client=("C",)), False),
        (Wanted(client=("[abc]", "x*")), True),
        (Wanted(client=("@letters",)), True),
        (Wanted(client=("@digits", "x*")), False),
        (Wanted(session=("s-2",)), False),
        (Wanted(model=("scene",)), False),
        (Wanted(model=("scene", "t*")), True),
    ],
)
def test_a_filter_fits(wanted: Wanted, fits: bool) -> None:
    """Of what a subscriber gets, and of the document that sinks look at."""
    chosen = AnswerFilter(wanted, GROUPS)
    chosen.check_served(LABELS)
    assert chosen(published(1)) is fits
    found = [(1, "dog", 0.75), (0, "cat", 0.25)]
    assert chosen.takes("c", "tiny", "s-1", found) is fits


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(classes=("raod",)), "nearest names are 'road'"),
        (Wanted(classes=("raod",), model=("t*",)), "indices are 0 to 2"),
        (Wanted(classes=("2",), model=("scene",)), "indices are 0 to 1"),
        (Wanted(classes=("[7",)), r"nearest names are '\[7\]'"),
        (Wanted(model=("none*",)), "no model 'none\\*' is served; there are: tiny, scene"),
    ],
)
def test_a_filter_names_what_it_does_not_know(wanted: Wanted, message: str) -> None:
    with pytest.raises((InvalidConfig, UnknownModel), match=message):
        AnswerFilter(wanted, GROUPS).check_served(LABELS)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(client=("@nobody",)), "no group 'nobody' in the settings; there are: letters, digits"),
        (Wanted(client=("",)), "a pattern has 1 to 128 characters, got 0"),
        (Wanted(model=("a\n",)), "control characters"),
        (Wanted(classes=("x",) * 65), "65 values of class, at most 64"),
        (Wanted(session=("x" * 257,)), "at most 256 characters"),
        (Wanted(min_score=1.1), "give 0 to 1"),
    ],
)
def test_what_is_no_filter_is_refused(wanted: Wanted, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        AnswerFilter(wanted, GROUPS)


def test_a_pattern_that_means_harm_is_matched_in_no_time() -> None:
    hard = AnswerFilter(Wanted(client=("*a" * 64,)), GROUPS)
    assert not hard(published(1, client="a" * 127 + "b"))


def test_what_one_look_costs_is_bounded() -> None:
    """Repeats are no patterns of their own, names are looked up, and all groups together have a bound."""
    names = {f"g{k}": tuple(f"cam-{k}-{i}" for i in range(1024)) for k in range(64)}
    wild = {f"w{k}": tuple(f"cam-{k}-{i}-*" for i in range(1024)) for k in range(3)}
    groups = Groups(names | wild)
    chosen = AnswerFilter(Wanted(client=("@w0",) * 64), groups)
    looked: list[str] = []
    match = Pattern.matches

    def counted(pattern: Pattern, name: str) -> bool:
        looked.append(name)
        return match(pattern, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pattern, "matches", counted)
        assert not chosen.takes_client("cam-1-1-1", "tiny")
        assert len(looked) == 1024
        every = AnswerFilter(Wanted(client=tuple(f"@{name}" for name in names)), groups)
        assert every.takes_client("cam-63-1023", "tiny")
        assert not every.takes_client("cam-63-1024", "tiny")
        assert len(looked) == 1024
    assert AnswerFilter(Wanted(client=("@w0", "@w1")), groups).takes_client("cam-1-1-1", "tiny")
    with pytest.raises(InvalidConfig, match="3072 patterns of clients, those of groups included; at most 2048"):
        AnswerFilter(Wanted(client=("@w0", "@w1", "@w2")), groups)


def test_a_picture_of_a_map_is_made_once() -> None:
    import numpy as np

    coded = encode_map(np.arange(16, dtype=np.uint8).reshape(4, 4))
    output = CodedMap(height=4, width=4, map=coded, classes=())
    it = Published(1, "server", answered(map_bytes=1))
    object.__setattr__(it.answered, "output", output)
    assert it.takes_long(MapForm.PNG)
    assert it.made(MapForm.PNG) is None
    text = it.text(MapForm.PNG)
    assert it.made(MapForm.PNG) is text
    assert it.text(MapForm.PNG) is text
