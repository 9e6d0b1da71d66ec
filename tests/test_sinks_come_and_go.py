"""Sinks that are set up, taken away, set up again, or changed: what waits for each of them in the queue's file."""

import json
import sqlite3
from pathlib import Path

import numpy as np

from bitneck_cloud.answers.sinks.queue.access import checkpoint
from bitneck_testing.consumers.committer import outgoing, wait_for
from bitneck_testing.consumers.documents import answer, coded_map
from bitneck_testing.consumers.queues import NOW, WIDE, drain, entry, jsonl, keep_house, numbers, opened, stored_bytes


def test_sinks_beyond_the_bits_of_a_row_have_rows_of_their_own(tmp_path: Path) -> None:
    path, names = tmp_path / "queue.db", [f"s{k}" for k in range(150)]
    bounds = dict.fromkeys(names, WIDE)
    with opened(path, bounds) as (file, _):
        for number in range(1, 151):
            file.add([entry(number, *(names if number % 10 == 0 else names[number - 1 : number]))], NOW)
        for number, name in enumerate(names, 1):
            assert numbers([each.body for each in file.take(name, 100, 1000)]) == sorted({number, *range(10, 151, 10)})
    with opened(path, bounds) as (file, _):
        for number, name in enumerate(names, 1):
            assert numbers(drain(file, name, 4)) == sorted({number, *range(10, 151, 10)})
            keep_house(file)
        checkpoint(path)
    assert stored_bytes(path) == 0


def test_what_waits_for_a_sink_that_is_gone_is_kept_a_week(tmp_path: Path) -> None:
    path, day = tmp_path / "queue.db", 86_400.0
    with opened(path, dict.fromkeys(("a", "gone"), WIDE)) as (file, _):
        file.add([entry(number, "a", "gone") for number in range(1, 4)], NOW)
        file.add([entry(4, "a", "gone")], NOW + day)
    for days, waiting in ((1.1, {"gone": 4}), (7.1, {"gone": 1}), (8.1, {}), (8.2, {})):
        with opened(path, {"a": WIDE}, now=NOW + days * day) as (file, others):
            assert others == waiting
            assert file.held["a"].queued == 4
    with opened(path, dict.fromkeys(("a", "gone"), WIDE), now=NOW + 8.3 * day) as (file, _):
        assert file.held["gone"].queued == 0
        assert numbers(drain(file, "a")) == [1, 2, 3, 4]


def test_a_sink_that_comes_back_gets_what_waited_and_nothing_of_the_time_between(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with opened(path, dict.fromkeys(("a", "b"), WIDE)) as (file, _):
        file.add([entry(1, "a", "b"), entry(2, "a")], NOW)
    with opened(path, {"a": WIDE}) as (file, others):
        assert others == {"b": 1}
        file.add([entry(3, "a")], NOW)
        keep_house(file)
    with opened(path, dict.fromkeys(("a", "b"), WIDE)) as (file, others):
        assert others == {}
        file.add([entry(4, "a", "b")], NOW)
        assert numbers(drain(file, "b")) == [1, 4]
        assert numbers(drain(file, "a")) == [1, 2, 3, 4]


def test_a_new_sink_gets_nothing_of_one_whose_place_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with opened(path, dict.fromkeys(("slow", "gone"), WIDE)) as (file, _):
        file.add([entry(number, "slow", "gone") for number in range(1, 6)], NOW)
        drain(file, "gone")
    with opened(path, {"slow": WIDE}):
        pass
    with opened(path, dict.fromkeys(("slow", "new"), WIDE)) as (file, _):
        assert file.held["new"].queued == 0
        file.add([entry(6, "slow", "new")], NOW)
        assert numbers(drain(file, "new")) == [6]
        keep_house(file)
        assert numbers(drain(file, "slow")) == [1, 2, 3, 4, 5, 6]


def test_names_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    for number in range(1, 101):
        with opened(path, dict.fromkeys(("stays", f"s{number}"), WIDE)) as (file, others):
            assert others == {}
            file.add([entry(number, "stays", f"s{number}")], NOW)
            assert numbers(drain(file, f"s{number}")) == [number]
    with opened(path, {"stays": WIDE}) as (file, _):
        assert numbers(drain(file, "stays")) == list(range(1, 101))
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT slot, name FROM sinks").fetchall() == [(0, "stays")]
    db.close()


def test_a_sink_whose_form_of_maps_changes_gets_what_waits_in_its_form(tmp_path: Path) -> None:
    document = answer(1, map=coded_map(np.zeros((8, 8), np.uint8)))
    with outgoing(tmp_path, *(jsonl(tmp_path / "nowhere", name, maps=name) for name in ("runs", "none"))) as running:
        running.commit([document])
    with outgoing(
        tmp_path, jsonl(tmp_path, "runs"), jsonl(tmp_path, "none", maps="runs"), jsonl(tmp_path, "new", maps="runs")
    ) as running:
        running.commit([answer(2)])
        wait_for(lambda: [state.delivered for state in running.states()] == [2, 2, 1])
    found = {name: json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0]) for name in ("runs", "none")}
    assert found["runs"] == found["none"] == document | {"map": None}  # what waits without a map gets none
