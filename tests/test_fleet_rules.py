"""Rules of rates by patterns and groups, and what is remembered of clients."""

import time
from typing import Any

import pytest

from bitneck.errors import InvalidConfig, UnknownRule
from bitneck_cloud.fleet.patterns import Groups, Pattern
from bitneck_cloud.fleet.records import ClientBook, ClientRecord
from bitneck_cloud.fleet.rules import MAX_RULES, RuleBook
from bitneck_cloud.fleet.tables import RateTable, book_of
from bitneck_cloud.sessions.rates import FixedPoint

GROUPS = {"doors": ("door-*", "gate"), "night": ("cam-1?",)}
CONFIG = '[groups]\ndoors = ["door-*", "gate"]\nnight = ["cam-1?"]\n'


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("*", ["", "x", "a\nb"], []),
        ("cam-*", ["cam-", "cam-1"], ["cam", "Cam-1", "xcam-1"]),
        ("cam-?", ["cam-1"], ["cam-", "cam-12"]),
        ("cam-[0-3]", ["cam-0", "cam-3"], ["cam-4", "cam-"]),
        ("cam-[!0-3]", ["cam-4", "cam-x"], ["cam-3"]),
        ("[@]door", ["@door"], ["door"]),
        ("a[*]b", ["a*b"], ["axb"]),
        ("a.b", ["a.b"], ["axb"]),
        ("[]", ["[]"], [""]),
        ("[z-a]x", [], ["zx", "ax", "x"]),
        ("[abc", ["[abc"], ["a"]),
    ],
)
def test_patterns(pattern: str, names: list[str], others: list[str]) -> None:
    assert [name for name in [*names, *others] if Pattern(pattern).matches(name)] == names


@pytest.mark.parametrize("text", ["", "x" * 129, "cam\n", "\x1b[2J", "a\u202eb"])
def test_patterns_that_no_name_can_have_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfig):
        Pattern(text)


def test_no_pattern_takes_long() -> None:
    begin = time.process_time()
    assert not Pattern("*a" * 63 + "b").matches("a" * 128)
    assert not Pattern("?*" * 64).matches("a" * 63)
    assert time.process_time() - begin < 1.0


def test_the_most_specific_rule_counts() -> None:
    texts = ["*", "cam-*", "cam-1*", "@night", "cam-12", "*-12"]
    book = book_of(tuple(RateTable(clients=text, point=f"p{k}") for k, text in enumerate(texts)), Groups(GROUPS))
    assert [rule.clients.text for rule in book.rules] == ["cam-12", "@night", "cam-1*", "cam-*", "*-12", "*"]

    def first(client: str, model: str = "tiny") -> str:
        rule = next(iter(book.matching(model, client)))
        assert isinstance(rule.policy, FixedPoint)
        return rule.policy.point

    assert [first(name) for name in ("cam-12", "cam-13", "cam-134", "cam-2", "x-12", "x")] == [
        "p4", "p3", "p2", "p1", "p5", "p0",
    ]  # fmt: skip
    book = book.put(RateTable(clients="cam-*", model="tiny", point="p6").rule(Groups()))
    assert (first("cam-2"), first("cam-2", "other"), first("cam-134")) == ("p6", "p1", "p2")
    later = book.put(RateTable(clients="*-2", point="p7").rule(Groups()))  # as many characters as... fewer than cam-*
    assert [r.clients.text for r in later.rules][-3:] == ["*-12", "*-2", "*"]
    equal = book.put(RateTable(clients="*am-2", point="p8").rule(Groups()))
    assert next(equal.matching("other", "cam-2")).clients.text == "*am-2"  # the later one of equals


def test_books_are_bounded_and_have_one_rule_for_the_same_patterns() -> None:
    book = RuleBook()
    for k in range(MAX_RULES):
        book = book.put(RateTable(clients=f"cam-{k}", auto=True).rule(Groups()))
    with pytest.raises(InvalidConfig, match=f"there may be {MAX_RULES} rules"):
        book.put(RateTable(clients="one more", auto=True).rule(Groups()))
    again = book.put(RateTable(clients="cam-7", point="x").rule(Groups()))
    assert len(again.rules) == MAX_RULES
    assert len(again.without(("*", "cam-7")).rules) == MAX_RULES - 1
    with pytest.raises(UnknownRule, match="GET /v1/rate"):
        again.without(("*", "cam-x"))
    with pytest.raises(InvalidConfig, match="two rules have the model '\\*' and the clients 'a'"):
        book_of((RateTable(clients="a", auto=True), RateTable(clients="a", point="x")), Groups())


@pytest.mark.parametrize(
    ("groups", "text"),
    [({"Doors": ("x",)}, "group id 'Doors' is malformed"), ({"doors": ()}, "1 to 1024 patterns"),
     ({"doors": ("",)}, "a pattern has"), ({f"g{k}": ("x",) for k in range(257)}, "256 groups")],
)  # fmt: skip
def test_groups_that_are_refused(groups: dict[str, tuple[str, ...]], text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        Groups(groups)


def known(client: str, last_seen: float, **values: Any) -> ClientRecord:
    return ClientRecord(client=client, model="tiny", caller="address 10.0.0.7", last_seen=last_seen, **values)


def test_the_clients_that_ended_longest_ago_fall_out() -> None:
    book = ClientBook(2, [known("b", 20.0, frames=1), known("c", 30.0), known("a", 10.0)])
    found = book.gone()
    assert set(found) == {("b", "tiny"), ("c", "tiny")}
    assert book.to_write(found) == ([], [])
    assert book.to_write({}) == ([], [("b", "tiny"), ("c", "tiny")])
    both = known("b", 20.0, frames=1, point="s1-r1") + known("b", 40.0, frames=2, faults=1)
    assert (both.frames, both.faults, both.last_seen, both.point) == (3, 1, 40.0, "s1-r1")
