"""A queue's file of version 1: what waits in it goes on, and ids never come again."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from bitneck.errors import StateUnusable
from bitneck_cloud.answers.sinks.queue.access import checkpoint
from bitneck_cloud.answers.sinks.state import Entry
from bitneck_testing.consumers.queues import (
    NOW,
    WIDE,
    drain,
    entry,
    keep_house,
    opened,
)

GOLDEN = Path(__file__).parent / "golden"


def version_1(folder: Path) -> Path:
    """A file of a server that was killed, with its log."""
    for end in ("", "-wal"):
        (folder / f"queue.db{end}").write_bytes(gzip.decompress((GOLDEN / f"queue_v1.db{end}.gz").read_bytes()))
    return folder / "queue.db"


def ids_of_version_1(folder: Path) -> dict[str, list[int]]:
    folder.mkdir()
    with sqlite3.connect(version_1(folder)) as db:
        ids: dict[str, list[int]] = {}
        for sink, identity in db.execute("SELECT sink, id FROM answers ORDER BY id"):
            ids.setdefault(sink, []).append(identity)
        ids["last"] = [db.execute("SELECT seq FROM sqlite_sequence").fetchone()[0]]
    db.close()
    return ids


def test_a_file_of_version_1_goes_on(tmp_path: Path) -> None:
    ids = ids_of_version_1(tmp_path / "old")
    path, bounds = version_1(tmp_path), dict.fromkeys(("file", "maps", "new"), WIDE)
    for _ in range(2):  # at the second time it is of version 2
        with opened(path, bounds) as (file, others):
            assert others == {"gone": 9}
            assert {name: (held.queued, held.bytes) for name, held in file.held.items()} == {
                "file": (23, 10541), "maps": (15, 7437), "new": (0, 0),
            }  # fmt: skip
            assert file.held["file"].oldest_at == NOW + 5
            assert file.last_number() == 34
            assert {json.loads(text)["client"] for text in file.clients()} == {"cam-1", "cam-2"}
            again = [
                Entry("session s-1", 5, 5, ((("file",), b""),)),
                Entry("spool device-1 p", 34, 34, ((("file",), b""),)),
            ]
            assert not file.add(again, NOW)
            for sink in ("file", "maps"):
                assert [each.id for each in file.take(sink, 100, 1 << 20)] == ids[sink]
    with opened(path, bounds | {"gone": WIDE}) as (file, _):
        file.add([Entry("session s-1", 35, 35, ((("file", "maps"), b'{"number":35}'),))], NOW + 50)
        (newest,) = file.take("file", 100, 1 << 20)[-1:]
        assert newest.id > ids["last"][0]
        found = {sink: [json.loads(body) for body in drain(file, sink, 4)] for sink in ("file", "maps", "gone")}
        keep_house(file)
        checkpoint(path)
    every = [*range(1, 25), *range(31, 36)]
    assert [it["number"] for it in found["file"]] == every[5:]
    assert [it["number"] for it in found["maps"]] == every[13:]
    assert [it["number"] for it in found["gone"]] == [n for n in every if n % 3 == 0]
    assert [it["number"] for it in found["maps"] if it.get("map")] == [n for n in every[13:-1] if n % 2]
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (0,)
        (refused,) = db.execute("SELECT sink, reason, body FROM refused").fetchall()
        assert refused[:2] == ("file", "the broker refuses: Not authorized")
        assert json.loads(refused[2])["number"] == 3
    db.close()


def test_ids_of_version_1_never_come_again(tmp_path: Path) -> None:
    last = ids_of_version_1(tmp_path / "old")["last"][0]
    path = version_1(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM answers WHERE id > 20")  # the newest are delivered already
    db.close()
    for number in (35, 36):
        with opened(path, {"file": WIDE}) as (file, _):
            file.add([entry(number, "file")], NOW)
            assert file.take("file", 1000, 1 << 20)[-1].id == last + number - 34


def test_a_file_of_version_1_stays_one_if_it_cannot_be_brought_to_version_2(tmp_path: Path) -> None:
    path = version_1(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE sinks(in_the_way)")
    db.close()
    with pytest.raises(StateUnusable, match="sinks already exists"):
        with opened(path, {"file": WIDE}):
            pass
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM answers WHERE sink = 'file'").fetchone() == (23,)
        assert db.execute("SELECT count(*) FROM refused").fetchone() == (1,)
        db.execute("DROP TABLE sinks")
    db.close()
    with opened(path, {"file": WIDE}) as (file, _):
        assert len(drain(file, "file")) == 23
