"""The queue's file: a log with a cursor for each sink. What it promises holds after a kill at any moment."""

import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bitneck_cloud.answers.sinks.queue.access import checkpoint, log_bytes
from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.answers.sinks.state import Bounds, Entry, Queued
from bitneck_testing.consumers.committer import Committer, outgoing, wait_for
from bitneck_testing.consumers.documents import answers
from bitneck_testing.consumers.queues import (
    NOW,
    WIDE,
    copied,
    drain,
    entry,
    jsonl,
    keep_house,
    numbers,
    opened,
    stored_bytes,
)

# Compared with a queue for each sink


@dataclass
class Waiting:
    """What one sink should have: numbers, times and documents, and how many of them its sender has."""

    bounds: Bounds
    maps: bool
    answers: deque[tuple[int, float, bytes]] = field(default_factory=deque)
    dropped: dict[str, int] = field(default_factory=lambda: {"bytes": 0, "age": 0})
    taken: list[Queued] = field(default_factory=list)

    def drop(self, reason: str, now: float) -> None:
        has = len(self.taken)
        while len(self.answers) > has:
            size = sum(len(body) for _, _, body in self.answers)
            if not (
                size > self.bounds.most_bytes if reason == "bytes" else self.answers[has][1] < now - self.bounds.age_s
            ):
                break
            del self.answers[has]
            self.dropped[reason] += 1


class Compared:
    """A file, and what should be in it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.random = path, random.Random(seed)
        self.sinks = {
            "all": Waiting(Bounds(3_000, 40.0), maps=False),
            "maps": Waiting(Bounds(20_000, 60.0), maps=True),
            "seldom": Waiting(Bounds(1_000, 300.0), maps=False),
        }
        self.gone: dict[str, Waiting] = {}
        self.seen: set[tuple[str, int]] = set()
        self.now, self.number = NOW, 0
        self.ids: dict[str, set[str]] = {}
        self.open(path)

    def open(self, path: Path) -> None:
        self.path = path
        for waiting in self.sinks.values():
            waiting.taken = []
            waiting.dropped = {"bytes": 0, "age": 0}
        bounds = {name: waiting.bounds for name, waiting in self.sinks.items()}
        self.file = QueueFile(path, bounds, sync=False)
        others = self.file.open(self.now)
        assert others == {name: len(it.answers) for name, it in self.gone.items() if it.answers}
        assert self.file.last_number() == self.number

    def commit(self) -> None:
        entries = []
        for _ in range(self.random.choice([1, 1, 2, 5, 20])):
            self.number += 1
            stream = self.random.choice(["session a", "session b", "spool c"])
            seq = self.random.randint(max(1, self.number - 30), self.number)
            sinks = tuple(name for name in self.sinks if self.random.random() < (0.1 if name == "seldom" else 0.9)) or (
                "all",
            ) * ("all" in self.sinks)
            if not sinks:
                continue
            with_map = self.random.random() < 0.5
            bare = b"%d " % self.number + b"x" * self.random.choice([10, 100])
            mapped = bare + b"y" * self.random.choice([50, 6000])
            bodies: dict[bytes, list[str]] = {}
            for name in sinks:
                bodies.setdefault(mapped if with_map and self.sinks[name].maps else bare, []).append(name)
            entries.append(Entry(stream, seq, self.number, tuple((tuple(n), body) for body, n in bodies.items())))
        if not entries:
            return
        self.number = entries[-1].number
        told = set()
        for each in entries:
            if (each.stream, each.seq) in self.seen:
                continue
            self.seen.add((each.stream, each.seq))
            for names, body in each.bodies:
                for name in names:
                    self.sinks[name].answers.append((each.number, self.now, body))
                    told.add(name)
        assert self.file.add(entries, self.now) == told
        if not told:  # of repeats alone nothing is kept
            self.number = self.file.last_number()
        for name in told:
            self.sinks[name].drop("bytes", self.now)

    def take(self, name: str) -> None:
        waiting = self.sinks[name]
        most, most_bytes = self.random.choice([1, 5, 50]), self.random.choice([200, 10_000])
        waiting.taken = self.file.take(name, most, most_bytes)
        expected: list[bytes] = []
        for _, _, body in list(waiting.answers)[:most]:
            if expected and sum(map(len, expected)) + len(body) > most_bytes:
                break
            expected.append(body)
        assert [each.body for each in waiting.taken] == expected[: len(waiting.taken)]
        assert len(waiting.taken) >= min(1, len(expected))  # it may be less than it asked for
        assert [each.id for each in waiting.taken] == sorted({each.id for each in waiting.taken})

    def settle(self, name: str) -> None:
        waiting = self.sinks[name]
        done = self.random.choice([0, len(waiting.taken) // 2, len(waiting.taken)])
        reasons = [self.random.choice(["", "", "refused"]) for _ in range(done)]
        self.file.settle(name, waiting.taken, reasons, self.now)
        for _ in range(done):
            waiting.answers.popleft()
        waiting.taken = []

    def keep_house(self) -> None:
        self.now += self.random.choice([1, 1, 1, 20])
        for _ in range(self.random.choice([1, 100])):  # a kill may come between
            if not self.file.save(self.number, self.now):
                break
        while self.file.expire(self.now):
            pass
        for waiting in self.sinks.values():
            waiting.drop("age", self.now)
        if self.random.random() < 0.5:
            checkpoint(self.path)

    def restart(self, folder: Path) -> None:
        """It is killed; another one goes on, perhaps with other sinks."""
        path = copied(self.path, folder)
        self.file.close()
        if self.random.random() < 0.5:
            name = self.random.choice(["maps", "seldom"])
            if name in self.sinks:
                self.gone[name] = self.sinks.pop(name)
            else:
                self.sinks[name] = self.gone.pop(name)
        self.open(path)

    def check(self, folder: Path) -> None:
        for name, waiting in self.sinks.items():
            held = self.file.held[name]
            assert held.queued == len(waiting.answers), name
            assert held.bytes == sum(len(body) for _, _, body in waiting.answers), name
            assert held.oldest_at == (waiting.answers[0][1] if waiting.answers else 0.0), name
            assert {reason: held.dropped[reason] for reason in ("bytes", "age")} == waiting.dropped, name
        bounds = dict.fromkeys([*self.sinks, *self.gone], WIDE)
        with opened(copied(self.path, folder), bounds, self.now) as (file, others):
            assert others == {}
            assert file.last_number() == self.number
            for name, waiting in (self.sinks | self.gone).items():
                assert drain(file, name) == [body for _, _, body in waiting.answers], name
            for stream in ("session a", "session b", "spool c"):
                again = [Entry(stream, seq, 1, ((("all",), b"again"),)) for known, seq in self.seen if known == stream]
                assert not again or not file.add(again, self.now)


@pytest.mark.parametrize("seed", range(6))
def test_each_sink_has_its_own_queue_also_after_a_kill_at_any_moment(seed: int, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    compared = Compared(tmp_path / "0" / "queue.db", seed)
    try:
        for step in range(120):
            name = compared.random.choice(list(compared.sinks))
            match compared.random.choice(["commit", "commit", "take", "settle", "settle", "house", "restart"]):
                case "commit":
                    compared.commit()
                case "take":
                    if not compared.sinks[name].taken:
                        compared.take(name)
                case "settle":
                    if compared.sinks[name].taken:
                        compared.settle(name)
                case "house":
                    compared.keep_house()
                case "restart":
                    if compared.random.random() < 0.3:
                        compared.restart(tmp_path / str(step + 1))
            compared.check(tmp_path / "copy")
        for name in compared.sinks:
            drain(compared.file, name)
        keep_house(compared.file, compared.now + 8 * 86_400)
        checkpoint(compared.path)
    finally:
        compared.file.close()


@pytest.mark.parametrize("sync", ["second", "always"])
def test_a_server_killed_in_the_middle_of_commits_and_deliveries_loses_and_repeats_nothing(
    sync: str, tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"queue_bytes": 1 << 40, "rotate_bytes": 1 << 20, "keep": 0}  # however fast it is
    tables = [jsonl(tmp_path, "first", **whole), jsonl(tmp_path, "second", linger_s=0.03, **whole)]
    last = 0
    for seconds in (0.02, 0.05, 0.1, 0.2, 1.2, 2.3):  # housekeeping comes once a second
        process = Committer(tmp_path, *tables, sinks_sync=sync)
        assert process.last_number >= last
        last = process.last_number
        process.begin(f"commit {last + 1} {last + 10_000_000} 3")
        time.sleep(seconds)
        process.kill()
    with outgoing(tmp_path, *tables) as running:
        last = running.last_number()
        assert last > 100
        for first in range(1, last, 1000):  # devices send them all again
            running.commit(answers(first, min(first + 999, last)))
        running.commit(answers(last + 1, last + 5))
        wait_for(lambda: not any(state.queued for state in running.states()))
    for name in ("first", "second"):
        files = sorted(tmp_path.glob(f"{name}*.jsonl"))  # the full ones have a time in their names
        found = [json.loads(line)["number"] for path in files for line in path.read_text().splitlines()]
        assert list(dict.fromkeys(found)) == list(range(1, last + 6))
        newest = 0
        for number in found:  # a repeat goes back; from there on all follows again
            assert number <= newest + 1
            newest = max(number, newest)


# What it costs


def test_a_commit_writes_about_a_page_whatever_the_number_of_sinks(tmp_path: Path) -> None:
    path, frame = tmp_path / "queue.db", 4096 + 24
    names = tuple(f"s{k}" for k in range(10))
    with opened(path, dict.fromkeys(names, WIDE)) as (file, _):
        file.add([entry(1, *names, size=450)], NOW)
        before = log_bytes(path)
        for number in range(2, 202):
            file.add([entry(number, *names, size=450)], NOW)
        assert (log_bytes(path) - before) / frame <= 1.8 * 200  # each seventh begins a page, and names it in three
        before = log_bytes(path)
        batch = file.take("s3", 30, 1 << 20)
        file.settle("s3", batch, [""] * 30, NOW)
        assert log_bytes(path) - before == frame


@pytest.mark.parametrize("attempt", [False, True])
@pytest.mark.parametrize("share", [1, 50])
def test_what_a_dead_sink_may_hold_bounds_the_file_beside_a_fast_one(share: int, attempt: bool, tmp_path: Path) -> None:
    """Ten minutes; the fast one gets maps of 5 kB. The dead one wants all, or few, and perhaps tries for ever."""
    path = tmp_path / "queue.db"
    with opened(path, {"dead": Bounds(60_000, 1e9), "fast": WIDE}) as (file, _):
        for second in range(600):
            now = NOW + second
            for number in range(1 + 20 * second, 21 + 20 * second):
                sinks = ("dead", "fast") if number % share == 0 else ("fast",)
                file.add([entry(number, *sinks, size=200, maps="fast", map_size=5_000)], now)
            if attempt and second == 10:
                assert file.take("dead", 10, 1 << 20)
            assert len(drain(file, "fast")) == 20
            keep_house(file, now)
            if second % 10 == 0:
                checkpoint(path)
        held = file.held["dead"]
        kept = 12_000 // share - held.dropped["bytes"]
        assert held.queued == kept
        assert held.bytes <= 60_000
        file.begin_log_anew()
        used = path.stat().st_size
    assert stored_bytes(path) == held.bytes
    assert used < 3_000_000  # the maps alone of all answers were 60 MB
    with opened(path, {"dead": WIDE, "fast": WIDE}) as (file, _):
        assert (
            numbers(drain(file, "dead"))[-kept + 10 :] == [n for n in range(1, 12_001) if n % share == 0][-kept + 10 :]
        )
        keep_house(file)
    assert stored_bytes(path) == 0


@pytest.mark.parametrize("passed", [{"bare": 4, "maps": 7}, {"bare": 7, "maps": 4}])
def test_the_file_holds_no_document_that_nobody_waits_for(passed: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with opened(path, dict.fromkeys(("bare", "maps"), WIDE)) as (file, _):
        file.add([entry(number, "bare", "maps", size=100, maps="maps", map_size=1000) for number in range(11, 21)], NOW)
        for sink, count in passed.items():
            batch = file.take(sink, count, 1 << 20)
            file.settle(sink, batch, [""] * count, NOW)
        keep_house(file)
        checkpoint(path)
    bare, mapped = len(b"10 ") + 100, len(b"10 map ") + 1000
    assert stored_bytes(path) == (10 - passed["bare"]) * bare + (10 - passed["maps"]) * mapped
    with opened(path, dict.fromkeys(("bare", "maps"), WIDE)) as (file, _):
        assert numbers(drain(file, "bare")) == list(range(11 + passed["bare"], 21))
        found = drain(file, "maps")
        assert numbers(found) == list(range(11 + passed["maps"], 21))
        assert {len(body) for body in found} == {mapped}


def test_what_was_delivered_before_a_kill_is_deleted_after_it(tmp_path: Path) -> None:
    path, bounds = tmp_path / "0" / "queue.db", dict.fromkeys(("a", "b"), WIDE)
    path.parent.mkdir()
    with opened(path, bounds) as (file, _):
        for first in range(1, 1001, 100):
            file.add([entry(number, "a", "b") for number in range(first, first + 100)], NOW)
        drain(file, "a")
        drain(file, "b")
        path = copied(path, tmp_path / "1")
    assert stored_bytes(path) > 0
    with opened(path, bounds) as (file, _):
        keep_house(file)
    assert stored_bytes(path) == 0


def test_a_sink_with_few_answers_among_many_of_another_gets_them_in_parts(tmp_path: Path) -> None:
    """Others may use the queue between the parts."""
    path, bounds = tmp_path / "queue.db", dict.fromkeys(("busy", "seldom"), WIDE)
    with opened(path, bounds) as (file, _):
        file.add([entry(number, "busy") for number in range(10_000, 15_000)], NOW)
        file.add([entry(0, "seldom")], NOW + 1)
        for first in range(1, 6001, 500):
            file.add([entry(number, "busy") for number in range(first, first + 500)], NOW + 2)
        file.add([entry(6001, "seldom")], NOW + 3)
    with opened(path, bounds) as (file, _):
        assert file.held["seldom"].oldest_at == NOW + 1
        for number, calls in ((0, range(1, 2)), (6001, range(3, 6))):
            call = 1
            while not (batch := file.take("seldom", 10, 1 << 20)):
                call += 1
            assert call in calls
            assert numbers([each.body for each in batch]) == [number]
            assert file.held["seldom"].queued == 1 + (number == 0)
            assert file.held["seldom"].oldest_at == (NOW + 3 if number else NOW + 1)
            file.settle("seldom", batch, [""], NOW)
        assert file.take("seldom", 10, 1 << 20) == []
        assert numbers(drain(file, "busy")) == [*range(10_000, 15_000), *range(1, 6001)]


def test_a_sender_looks_for_few_answers_among_many_of_another(tmp_path: Path) -> None:
    with opened(tmp_path / "queue.db", dict.fromkeys(("busy", "few"), WIDE)) as (file, _):
        for number in (1, 30_002):
            file.add([Entry("session s", number, number, ((("few",), b'{"number":%d}' % number),))], NOW)
            for first in range(2, 30_002, 500):
                file.add([entry(number, "busy") for number in range(first, first + 500)], NOW)
    tables = jsonl(tmp_path / "nowhere", "busy", queue_age_s=30_000_000), jsonl(tmp_path, "few", queue_age_s=30_000_000)
    with outgoing(tmp_path, *tables) as running:
        wait_for(lambda: running.states()[1].delivered == 2)
        assert running.states()[0].queued == 30_000


# Repeats, ids


def test_repeats_of_many_sessions_are_known_also_if_a_kill_comes_while_that_is_written(tmp_path: Path) -> None:
    path, streams = tmp_path / "0" / "queue.db", [f"session {k}" for k in range(100)]
    path.parent.mkdir()

    def again(path: Path) -> frozenset[str]:
        with opened(path, {"a": WIDE}) as (file, _):
            return file.add([entry(7, "a", stream=stream) for stream in streams], NOW)

    with opened(path, {"a": WIDE}) as (file, _):
        file.add([entry(7, "a", stream=stream) for stream in streams], NOW)
        assert not again(copied(path, tmp_path / "unsaved"))
        assert file.save(0, NOW)
        assert not again(copied(path, tmp_path / "partly"))
        file.add([entry(8, "a", stream=stream) for stream in streams], NOW)
        drain(file, "a")
        keep_house(file)
        copy = copied(path, tmp_path / "swept")
        assert stored_bytes(copy) > 0  # those of the second commit are not written yet
        assert not again(copy)
        keep_house(file)
        copy = copied(path, tmp_path / "all")
        assert stored_bytes(copy) == 0
        assert not again(copy)


def test_ids_and_numbers_never_come_again(tmp_path: Path) -> None:
    """A webhook's consumer knows batches by the ids of their answers."""
    path, known, number = tmp_path / "0" / "queue.db", set[int](), 0
    path.parent.mkdir()
    for turn in range(1, 6):
        with opened(path, {"a": WIDE}) as (file, _):
            assert file.last_number() == number
            number += 10
            file.add([entry(k, "a") for k in range(number - 9, number - 1)], NOW)
            batch = file.take("a", 100, 1 << 20)
            assert len(batch) == 8
            assert known.isdisjoint(each.id for each in batch)
            known |= {each.id for each in batch}
            file.settle("a", batch, [""] * 8, NOW)
            file.save(number, NOW)
            keep_house(file)
            path = copied(path, tmp_path / str(turn))
            assert stored_bytes(path) == 0


def test_a_sink_far_behind_and_one_at_the_end_get_all_in_order(tmp_path: Path) -> None:
    """The newest rows are read from memory, the others from the file."""
    with opened(tmp_path / "queue.db", dict.fromkeys(("near", "far"), WIDE)) as (file, _):
        found: dict[str, list[bytes]] = {"near": [], "far": []}
        for number in range(1, 12_001, 40):
            file.add([entry(n, "near", "far", size=(n % 7) * 100) for n in range(number, number + 40)], NOW)
            for sink, most in (("near", 100), ("far", 27)):
                batch = file.take(sink, most, 1 << 20)
                found[sink] += [each.body for each in batch]
                file.settle(sink, batch, [""] * len(batch), NOW)
            if number % 1000 == 1:
                keep_house(file)
        found["far"] += drain(file, "far", 27)
        assert numbers(found["near"]) == numbers(found["far"]) == list(range(1, 12_001))
