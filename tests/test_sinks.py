"""Sinks: the queue on disk with its bounds, JSON Lines, a server killed in between."""

import json
import os
import re
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, StateUnusable
from bitneck_cloud.answers.sinks import sender
from bitneck_cloud.answers.sinks.jsonl import JsonlSink
from bitneck_cloud.answers.sinks.queue.access import log_bytes
from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.answers.sinks.state import DROPPED, Bounds, Entry
from bitneck_testing.consumers.committer import Committer, only, outgoing, wait_for
from bitneck_testing.consumers.documents import answer, answers
from bitneck_testing.processes import ProcessFailed, running_server, start_server

NOW = 1_800_000_000.0


def jsonl(folder: Path, **other: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "name": "file", "path": str(folder / "answers.jsonl"), "pause_s": 0.05} | other


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


# The queue


def test_a_repeat_is_not_queued_again_also_after_a_restart(tmp_path: Path) -> None:
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        running.commit(answers(1, 5))
        running.commit([answer(6, seq=3), answer(7, seq=6), answer(8, seq=6)])
        wait_for(lambda: only(running).delivered == 6)
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        assert running.last_number() == 8
        running.commit([answer(9, seq=5), answer(10, seq=7), answer(11, seq=5, session="s-2")])
        running.commit([answer(12, seq=5, spool="p"), answer(13, seq=5, spool="p", session="s-3")])
        wait_for(lambda: only(running).delivered == 3)
    assert numbers(tmp_path / "answers.jsonl") == [1, 2, 3, 4, 5, 7, 10, 11, 12]


def test_filters_apply_before_the_queue(tmp_path: Path) -> None:
    """Each of four answers is for one filter beside the first, which takes all."""
    sky = answer(4, session="s-4", seq=4, client="cam-3", shares=[{"index": 0, "name": "sky", "share": 0.3}])
    del sky["labels"]
    fields: list[dict[str, Any]] = [
        {}, {"client": "cam-2"}, {"session": "s-3"},
        {"class": "sk?", "min_score": 0.3}, {"class": "sky", "min_score": 0.31},
    ]  # fmt: skip
    tables = [jsonl(tmp_path, name=f"n{k}", path=str(tmp_path / f"{k}.jsonl"), **it) for k, it in enumerate(fields)]
    with outgoing(tmp_path, *tables) as running:
        running.commit([answer(1), answer(2, client="cam-2", session="s-2"), answer(3, session="s-3"), sky])
        wait_for(lambda: [state.delivered for state in running.states()] == [4, 1, 1, 1, 0])
    assert [numbers(tmp_path / f"{k}.jsonl") for k in (1, 2, 3)] == [[2], [3], [4]]


def stuck(folder: Path, **other: Any) -> dict[str, Any]:
    """A sink that can deliver nothing."""
    return jsonl(folder, path=str(folder / "nowhere" / "answers.jsonl"), max_answer_bytes=1024, **other)


def test_the_oldest_fall_out_beyond_the_bytes(tmp_path: Path) -> None:
    size = len(json.dumps(answer(10), separators=(",", ":")))
    with outgoing(tmp_path, stuck(tmp_path, queue_bytes=100 * size)) as running:
        for first in range(10, 1000, 30):
            running.commit(answers(first, first + 29))
        state = only(running)
        assert state.queued <= 100
        assert state.queue_bytes <= 100 * size
        assert state.dropped == dict.fromkeys(DROPPED, 0) | {"bytes": 990 - state.queued}
        assert state.queued >= 95
        wait_for(lambda: only(running).failing)
        assert "No such file" in only(running).last_error
        (tmp_path / "nowhere").mkdir()
        wait_for(lambda: not only(running).queued)
    kept = numbers(tmp_path / "nowhere" / "answers.jsonl")
    assert kept == sorted(kept)
    assert kept[-70:] == list(range(930, 1000))


def test_the_oldest_fall_out_of_age(tmp_path: Path) -> None:
    clock = Clock()
    with outgoing(tmp_path, stuck(tmp_path, queue_age_s=100), clock=clock) as running:
        running.commit(answers(1, 600))
        clock.now += 60
        running.commit(answers(601, 610))
        assert only(running).behind_s == 60
        clock.now += 41
        wait_for(lambda: only(running).dropped["age"] == 600)
        assert only(running).queued == 10
        assert only(running).behind_s == 41


def test_an_answer_that_is_too_large_falls_out_alone(tmp_path: Path) -> None:
    with outgoing(tmp_path, jsonl(tmp_path, max_answer_bytes=1024)) as running:
        running.commit([answer(1), answer(2, client="x" * 1024), answer(3)])
        wait_for(lambda: only(running).delivered == 2)
        wait_for(lambda: only(running).dropped["size"] == 1)
    assert numbers(tmp_path / "answers.jsonl") == [1, 3]


def test_one_sinks_trouble_does_not_delay_another(tmp_path: Path) -> None:
    with outgoing(tmp_path, stuck(tmp_path, name="stuck"), jsonl(tmp_path)) as running:
        running.commit(answers(1, 50))
        wait_for(lambda: running.states()[1].delivered == 50)
        wait_for(lambda: running.states()[0].failing)
        assert running.states()[0].queued == 50
        assert running.states()[0].failed >= 1


def test_what_waits_survives_a_restart_and_a_new_name_is_a_new_sink(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with outgoing(tmp_path, stuck(tmp_path)) as running:
        running.commit(answers(1, 20))
    with outgoing(tmp_path, jsonl(tmp_path, name="other")) as running:
        assert only(running).queued == 0
        running.commit(answers(21, 21))
        wait_for(lambda: only(running).delivered == 1)
    assert "20 answers wait for a sink file, which is not set up any more" in caplog.text
    with outgoing(tmp_path, jsonl(tmp_path, path=str(tmp_path / "again.jsonl"))) as running:
        wait_for(lambda: only(running).delivered == 20)
    assert numbers(tmp_path / "again.jsonl") == list(range(1, 21))


def test_the_file_gives_back_what_a_long_queue_took(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with outgoing(tmp_path, jsonl(tmp_path, path=str(tmp_path / "nowhere" / "a.jsonl"))) as running:
        for first in range(1, 400, 20):
            running.commit(answers(first, first + 19, point="x" * 60_000))
        wait_for(lambda: path.stat().st_size > 20_000_000)  # it comes from the log once a second
        (tmp_path / "nowhere").mkdir()
        wait_for(lambda: not only(running).queued)
        wait_for(lambda: path.stat().st_size < 10_000_000)
        assert log_bytes(path) < 64 << 20


def test_the_log_begins_anew(tmp_path: Path) -> None:
    file = QueueFile(tmp_path / "queue.db", {"a": Bounds(1 << 20, 100)}, sync=False)
    file.open(NOW)
    file.add([Entry("session s", 1, 1, ((("a",), b"{}"),))], NOW)
    assert log_bytes(tmp_path / "queue.db") > 0
    file.begin_log_anew()
    assert log_bytes(tmp_path / "queue.db") == 0
    assert [each.body for each in file.take("a", 10, 1000)] == [b"{}"]
    file.close()


@pytest.mark.parametrize("damage", ["text", "pages", "foreign", "newer", "folder", "locked"])
def test_a_queue_that_cannot_be_used_stops_the_start(damage: str, tmp_path: Path) -> None:
    path, holder = tmp_path / "queue.db", None
    if damage == "text":
        path.write_text("this is no database, and long enough to be one" * 100)
    elif damage == "foreign":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE cats(name)")
        db.close()
    elif damage == "folder":
        path.mkdir()
    else:
        with outgoing(tmp_path, stuck(tmp_path)) as running:
            for first in range(1, 2000, 500):
                running.commit(answers(first, first + 499))
        if damage == "pages":
            data = bytearray(path.read_bytes())
            data[8192 : len(data) // 2] = os.urandom(len(data) // 2 - 8192)
            path.write_bytes(data)
        elif damage == "newer":
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version = 3")
            db.close()
        else:
            holder = sqlite3.connect(path)
            holder.execute("BEGIN IMMEDIATE")
    expected = {
        "text": "not a database; move it away", "pages": "malformed.*; move it away",
        "foreign": "another program's database", "newer": "has version 3, this server reads 2",
        "folder": "on a local disk", "locked": "another server uses it",
    }  # fmt: skip
    with pytest.raises(StateUnusable, match=expected[damage]):
        with outgoing(tmp_path, stuck(tmp_path)):
            pass
    if holder is not None:
        holder.close()


HOLDER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=0.2, isolation_level=None)
try:
    db.execute(sys.argv[2]).fetchall()
    print("done", flush=True)
    sys.stdin.read()
except sqlite3.OperationalError as exc:
    print(exc, flush=True)
"""


@contextmanager
def stranger(path: Path, statement: str) -> Iterator[str]:
    """Another program that does something with a database, and stays; what it says."""
    command = [sys.executable, "-c", HOLDER, str(path), statement]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="locks of Linux")
@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "SELECT count(*) FROM answers"])
def test_another_program_cannot_open_the_queue_and_hold_commits_up(statement: str, tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        running.commit(answers(1, 5))
        with stranger(path, statement) as said:
            assert said == "database is locked"
            running.commit(answers(6, 10))
            wait_for(lambda: only(running).delivered == 10)
            wait_for(lambda: log_bytes(path) == 0 or path.stat().st_size > 4096)  # housekeeping checkpoints beside it
    with stranger(path, statement) as said:  # the server has ended
        assert said == "done"
    assert not (tmp_path / "queue.db-wal").exists()


def test_a_queue_that_another_program_has_open_stops_the_start(tmp_path: Path) -> None:
    with outgoing(tmp_path, jsonl(tmp_path)):
        pass
    with stranger(tmp_path / "queue.db", "SELECT count(*) FROM answers") as said:
        assert said == "done"
        with pytest.raises(StateUnusable, match="another program has it open"):
            with outgoing(tmp_path, jsonl(tmp_path)):
                pass


def test_a_secret_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    sink = {"kind": "webhook", "name": "w", "url": "http://localhost:1/", "secret_file": str(tmp_path / "secret")}
    for content, message in ((None, "cannot read the secret"), ("short\n", "secret_file is too short")):
        if content is not None:
            (tmp_path / "secret").write_text(content)
        with pytest.raises(InvalidConfig, match=message):
            with outgoing(tmp_path, sink):
                pass


# A process


@pytest.mark.parametrize("sync", ["second", "always"])
def test_a_killed_server_loses_nothing_that_was_committed(sync: str, tmp_path: Path) -> None:
    first = Committer(tmp_path, stuck(tmp_path), sinks_sync=sync)
    assert first.ask("commit 1 400 8") == 400
    first.kill()
    second = Committer(tmp_path, jsonl(tmp_path), sinks_sync=sync)
    assert second.last_number == 400
    second.ask("commit 381 420 8")  # frames that were sent again, and new ones
    wait_for(lambda: second.state()["queued"] == 0)
    assert second.close() == 0
    assert numbers(tmp_path / "answers.jsonl") == list(range(1, 421))


def test_what_a_full_batch_leaves_does_not_wait_for_further_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_IDLE_S", 3600.0)
    with outgoing(tmp_path, jsonl(tmp_path, linger_s=0)) as running:
        running.commit(answers(1, JsonlSink.most + 5))
        wait_for(lambda: only(running).delivered == JsonlSink.most + 5)


def test_a_server_killed_while_it_delivers_repeats_under_old_numbers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    committed = 0
    for _ in range(3):
        process = Committer(tmp_path, jsonl(tmp_path))
        assert process.last_number >= committed
        committed = process.ask(f"commit {process.last_number + 1} {process.last_number + 300} 4")
        process.kill()
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        wait_for(lambda: only(running).queued == 0)
    found = numbers(path)
    assert list(dict.fromkeys(found)) == list(range(1, committed + 1))
    newest = 0
    for number in found:  # a repeat goes back; from there on all follows again
        assert number <= newest + 1
        newest = number if number > newest else newest


# JSON Lines


def test_lines_rotate_by_size_and_the_oldest_files_go(tmp_path: Path) -> None:
    with outgoing(tmp_path, jsonl(tmp_path, rotate_bytes=2000, keep=3)) as running:
        for number in range(1, 31):
            running.commit([answer(number)])
            wait_for(lambda number=number: only(running).delivered == number)
    full = sorted(tmp_path.glob("answers.*Z.jsonl"))
    assert len(full) == 3
    found = [number for path in [*full, tmp_path / "answers.jsonl"] for number in numbers(path)]
    assert found == list(range(found[0], 31))
    assert all(path.stat().st_size >= 2000 for path in full)
    assert (tmp_path / "answers.jsonl").stat().st_mode & 0o777 == 0o640


def test_lines_rotate_by_age_without_answers(tmp_path: Path) -> None:
    with outgoing(tmp_path, jsonl(tmp_path, rotate_s=0.2)) as running:
        running.commit([answer(1)])
        wait_for(lambda: list(tmp_path.glob("answers.*Z.jsonl")))
    assert (tmp_path / "answers.jsonl").stat().st_size == 0


def test_lines_follow_a_file_that_is_moved_and_mend_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    now = datetime.now(UTC).isoformat()
    path.write_text(json.dumps(answer(1, received=now)) + "\n" + json.dumps(answer(2))[:77])
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        running.commit(answers(2, 3))
        wait_for(lambda: only(running).delivered == 2)
        assert numbers(path) == [1, 2, 3]
        path.rename(tmp_path / "moved.jsonl")
        running.commit(answers(4, 4))
        wait_for(lambda: only(running).delivered == 3)
    assert (numbers(tmp_path / "moved.jsonl"), numbers(path)) == ([1, 2, 3], [4])


def test_lines_go_into_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.jsonl")
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).failing)
        assert "it is no file" in only(running).last_error


def test_a_full_disk_is_seen_and_survived(tmp_path: Path) -> None:
    """A limit of the process stands in for a full disk: the system refuses the rest of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = tmp_path / "full.jsonl"
    whole = json.dumps(answer(0)) + "\n"
    full.write_text(whole * (8_000_000 // len(whole)))
    before = full.stat().st_size
    with outgoing(tmp_path, jsonl(tmp_path, path=str(full))) as running:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + 100, limits[1]))
            running.commit(answers(1, 10))
            wait_for(lambda: only(running).failed >= 2)
            state = only(running)
            assert (state.queued, state.delivered, state.failing) == (10, 0, True)
            assert "File too large" in state.last_error
            assert full.stat().st_size == before
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        wait_for(lambda: only(running).delivered == 10)
        assert not only(running).failing
    assert numbers(full)[-10:] == list(range(1, 11))


def test_a_full_disk_under_the_queue_is_counted_and_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with outgoing(tmp_path, stuck(tmp_path)) as running:
        running.commit(answers(1, 10))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            for first in range(11, 1011, 100):
                running.commit(answers(first, first + 99))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        wait_for(lambda: sum(only(running).dropped.values()) + only(running).queued == 1010)
        lost = only(running).dropped["disk"]
        assert 0 < lost < 1010
        running.commit(answers(2001, 2010))
        assert only(running).queued == 1020 - lost
    assert "could not be queued for their sinks" in caplog.text
    with outgoing(tmp_path, jsonl(tmp_path)) as running:
        wait_for(lambda: not only(running).queued)
    found = numbers(tmp_path / "answers.jsonl")
    assert found == sorted(set(found))
    assert (len(found), found[:10], found[-10:]) == (1020 - lost, list(range(1, 11)), list(range(2001, 2011)))


@contextmanager
def no_writes_beyond(size: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail, in this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_queue_on_a_full_disk_goes_on_in_the_room_that_it_has(tmp_path: Path) -> None:
    """What is delivered makes room."""
    with outgoing(tmp_path, jsonl(tmp_path, rotate_bytes=10_000, keep=1, linger_s=0)) as running:
        first, phases = 1, [False, True, False, True]  # full, and again room
        with no_writes_beyond(300_000):
            end = time.monotonic() + 60
            while phases:
                assert time.monotonic() < end, phases
                lost = only(running).dropped["disk"]
                running.commit(answers(first, first + 9))
                first += 10
                wait_for(lambda: only(running).failing or not only(running).queued)
                time.sleep(0.005)
                if (only(running).dropped["disk"] == lost and not only(running).failing) == phases[0]:
                    phases.pop(0)


def test_what_is_delivered_counts_once_also_if_the_queue_cannot_forget_it(tmp_path: Path) -> None:
    with outgoing(tmp_path, stuck(tmp_path)) as running:
        running.commit(answers(1, 1))
        wait_for(lambda: only(running).failing)
        with no_writes_beyond(4000):  # a page of the queue's log is longer, the sink's lines are not
            (tmp_path / "nowhere").mkdir()
            wait_for(lambda: "they come again" in only(running).last_error)
            before = only(running).failed
            wait_for(lambda: only(running).failed >= before + 2)
            assert only(running).delivered == 0
        wait_for(lambda: not only(running).queued)
        wait_for(lambda: not only(running).failing)
        assert only(running).delivered == 1
    assert set(numbers(tmp_path / "nowhere" / "answers.jsonl")) == {1}


def test_an_answer_at_which_the_connection_ends_counts_once(tmp_path: Path) -> None:
    file = QueueFile(tmp_path / "queue.db", {"file": Bounds(1 << 20, 100.0)}, sync=False)
    file.open(NOW)
    try:
        file.add([Entry("s", 1, 1, ((("file",), b"{}"),))], NOW)
        batch = file.take("file", 10, 1 << 20)
        with no_writes_beyond(4000), pytest.raises(sqlite3.Error):
            file.settle("file", batch, ["it ends"], NOW, cut=True)
        assert file.held["file"].dropped["connection"] == 0
        file.settle("file", batch, ["it ends"], NOW, cut=True)
        assert file.held["file"].dropped == dict.fromkeys(DROPPED, 0) | {"connection": 1}
        assert file.held["file"].queued == 0
    finally:
        file.close()


# A server


def test_a_server_does_not_start_with_a_filter_that_nothing_fits(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for line, message in (
        ('class = "clas 1"', "sink file: no served model has a class 'clas 1'; the nearest names are 'class 1'"),
        ('model = "tinny"', "sink file: no model 'tinny' is served; there are: tiny"),
    ):
        config.write_text(
            f'sinks_queue = "{tmp_path}/queue.db"\n[groups]\nnight = ["n-*"]\n'
            f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{tmp_path}/a.jsonl"\nclient = "@night"\n{line}\n'
        )
        with pytest.raises(ProcessFailed, match=re.escape(message)):
            start_server(tiny_bundle.root, options=["--config", str(config)])


def test_a_server_shows_its_sinks(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with outgoing(tmp_path, stuck(tmp_path)) as running:
        running.commit(answers(1, 3))
    config = tmp_path / "config.toml"
    config.write_text(
        f'http_tokens = "{tmp_path}/tokens"\nsinks_queue = "{tmp_path}/queue.db"\n'
        f'[[sinks]]\nkind = "jsonl"\nname = "file"\npath = "{tmp_path}/answers.jsonl"\n'
    )
    (tmp_path / "tokens").write_text("read ann 0123456789abcdef0\nmetrics prom 0123456789abcdef1\n")
    reader = {"Authorization": "Bearer 0123456789abcdef0"}
    with running_server(tiny_bundle.root, options=["--config", str(config)]) as server:
        path = tmp_path / "answers.jsonl"
        wait_for(lambda: path.exists() and numbers(path) == [1, 2, 3])
        wait_for(lambda: httpx.get(f"{server.http}/v1/sinks", headers=reader).json()[0]["delivered"] == 3)
        (shown,) = httpx.get(f"{server.http}/v1/sinks", headers=reader).json()
        assert (shown["name"], shown["kind"], shown["queued"], shown["failing"]) == ("file", "jsonl", 0, False)
        refused = httpx.get(f"{server.http}/v1/sinks", headers={"Authorization": "Bearer 0123456789abcdef1"})
        assert refused.status_code == 403
        metrics = httpx.get(f"{server.http}/metrics", headers=reader).text
        assert 'bitneck_sink_delivered_answers_total{sink="file"} 3.0' in metrics
        assert 'bitneck_sink_dropped_answers_total{reason="age",sink="file"} 0.0' in metrics
        with pytest.raises(ProcessFailed, match="another server uses it"):
            start_server(tiny_bundle.root, options=["--config", str(config)])


def test_a_server_without_sinks_has_none(server: Any) -> None:
    assert httpx.get(f"{server.http}/v1/sinks").json() == []
