"""What a fleet keeps: config files and state databases that are refused, and what is read from them."""

import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig, StateUnusable
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.fleet import state_file
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.records import ClientRecord, RateChange
from bitneck_cloud.fleet.rules import RateRule
from bitneck_cloud.fleet.state_file import StateFile
from bitneck_cloud.fleet.tables import RateTable
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.consumers.canaries import Nobody
from bitneck_testing.processes import BIN

GROUPS = {"doors": ("door-*", "gate"), "night": ("cam-1?",)}
CONFIG = '[groups]\ndoors = ["door-*", "gate"]\nnight = ["cam-1?"]\n'


def known(client: str, last_seen: float, **values: Any) -> ClientRecord:
    return ClientRecord(client=client, model="tiny", caller="address 10.0.0.7", last_seen=last_seen, **values)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('[[rates]]\nclients = "cam-*"\n', "rates, number 1: give exactly one of"),
        ('[[rates]]\nclients = "@doors"\nauto = true\n', "rates, number 1: there is no group 'doors'"),
        (
            '[[rates]]\nclient = "cam-*"\nauto = true\n',
            "rates, number 1 ({file}: rates): unknown key client; known: clients, ",
        ),
        ('[[rates]]\nauto = true\n[[rates]]\npoint = "x"\n', "two rules have"),
        ("[groups]\ndoors = []\n", "group doors: 1 to 1024 patterns, got 0"),
    ],
)
def test_config_files_that_are_refused(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text(content)
    with pytest.raises(InvalidConfig) as caught:
        CloudSettings.load({}, file)
    assert text.replace("{file}", str(file)) in str(caught.value)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()


def newer(path: Path) -> None:
    StateFile.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
        connection.execute("UPDATE meta SET value = '7' WHERE key = 'oldest_program'")
    connection.close()


def damaged(path: Path) -> None:
    state = StateFile.open(path)
    state.save_clients([known(f"client {k}", 1.0) for k in range(1000)], [])
    state.close()
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(b ^ 0x5A for b in data[4096:])
    path.write_bytes(data)


def bad_row(path: Path) -> None:
    StateFile.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO rate_rules VALUES ('*', '*', '{\"auto\": 7}', '', '', 1)")
    connection.close()


def bad_choice(path: Path) -> None:
    StateFile.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO bundle_choices VALUES ('m', 'canary', '', 'b', '', x'ff', '', '')")
    connection.close()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes(b"not a database at all" * 50), "is damaged, or no state database"),
        (damaged, "is damaged, or no state database"),
        (foreign, "is a database of another program"),
        (newer, "was written by a newer version of bitneck (schema 7, this one has 2)"),
        (bad_row, "a rule cannot be read"),
        (bad_choice, "a choice of a bundle cannot be read"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
    ids=["text", "damaged", "foreign", "newer", "bad row", "bad choice", "folder"],
)
def test_state_databases_that_are_refused(tmp_path: Path, make: Any, text: str) -> None:
    path = tmp_path / "state.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StateUnusable) as caught:
        state = StateFile.open(path)
        state.rules(Groups())
        state.choices()
    assert text in str(caught.value)
    if make is foreign:
        assert path.read_bytes() == before


def refused_start(bundle: Bundle, path: Path) -> str:
    """The one sentence with which a server ends that cannot use its state database."""
    command = [BIN / "bitneck-cloud", "serve", "--bundle", bundle.root, "--state-db", path]
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    done = subprocess.run([*command, *addresses], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    return done.stderr


def test_a_damaged_database_ends_the_start(tiny_bundle: Bundle, tmp_path: Path) -> None:
    damaged(tmp_path / "state.db")
    assert "is damaged, or no state database" in refused_start(tiny_bundle, tmp_path / "state.db")


def a_rule(client: str) -> tuple[RateRule, RateChange]:
    rule = RateTable(clients=client, point="s1-r1").rule(Groups(), since="now", by="me", number=3)
    change = RateChange(
        at="now", who="me", model="*", clients=client, before=None, after={"point": "s1-r1"}, running=True
    )
    return rule, change


def test_the_state_file_reads_what_it_wrote_and_what_a_compatible_newer_program_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_file, "MAX_CHANGES", 4)
    path = tmp_path / "state.db"
    state = StateFile.open(path)
    rule, change = a_rule("cam-*")
    for _ in range(7):
        state.save_rule(rule.key, rule, change)
    assert (state.rules(Groups()), state.changes()) == ([rule], [change] * 4)
    state.save_clients([known("a", 1.0, frames=3), known("b", 2.0)], [])
    state.save_clients([known("a", 5.0, frames=4)], [("b", "tiny")])
    state.close()
    with sqlite3.connect(path) as connection:  # a newer program that adds what this one need not know
        connection.execute("ALTER TABLE clients ADD COLUMN place TEXT NOT NULL DEFAULT ''")
        connection.execute("CREATE TABLE more (x)")
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    state = StateFile.open(path)
    assert state.clients() == [known("a", 5.0, frames=4)]
    state.save_clients([known("c", 6.0)], [])
    state.save_rule(rule.key, None, change)
    assert (state.rules(Groups()), len(state.clients())) == ([], 2)
    state.close()
    assert path.stat().st_mode & 0o077 == 0


async def test_a_rule_that_cannot_be_kept_is_not_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="bitneck_cloud")
    registry = Registry(
        [], window=1, max_sessions=1, resume_s=1, assumed_fps=1, max_bytes_per_s=0, adopt=False,
        signer=TokenSigner(b"a key of the test", max_age_s=1),
    )  # fmt: skip
    fleet = Fleet(Groups(), None, tmp_path / "state.db", 10)
    await fleet.open()
    fleet.serve(registry, Nobody())
    first = RateTable(clients="cam-*", point="s1-r1").rule(Groups())
    await fleet.put(first, running=True)
    assert fleet._state is not None
    await fleet._on_disk(fleet._state._connection.execute, "PRAGMA query_only = ON")
    with pytest.raises(StateUnusable, match="readonly"):
        await fleet.put(RateTable(clients="cam-*", auto=True).rule(Groups()), running=True)
    with pytest.raises(StateUnusable, match="readonly"):
        await fleet.delete(first.key, running=False)
    assert [rule.policy for rule in registry.rules.rules] == [first.policy]
    assert len(fleet.changes) == 1
    assert "could not be kept, so nothing is changed" in caplog.text
    assert '"failed: StateUnusable"' in caplog.text
    await fleet.close()


def test_a_kept_rule_whose_group_is_gone_is_for_nobody(tmp_path: Path) -> None:
    state = StateFile.open(tmp_path / "state.db")
    rule = RateTable(clients="@night", auto=True).rule(Groups(GROUPS))
    state.save_rule(rule.key, rule, a_rule("*")[1])
    assert [kept.matches("tiny", "cam-11") for kept in state.rules(Groups(GROUPS))] == [True]
    assert [kept.matches("tiny", "cam-11") for kept in state.rules(Groups())] == [False]
    state.close()


def test_what_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    state = StateFile.open(tmp_path / "state.db")
    rule, change = a_rule("cam-*")
    state.save_rule(rule.key, rule, change)
    (pages,) = state._connection.execute("PRAGMA page_count").fetchone()
    state._connection.execute(f"PRAGMA max_page_count = {pages}")  # as if the disk were full
    with pytest.raises(StateUnusable, match="is the disk full"):
        state.save_clients([known(f"client {k}", 1.0) for k in range(1000)], [])
    assert (state.clients(), state.rules(Groups())) == ([], [rule])
    state._connection.execute("PRAGMA max_page_count = 100000")
    state.save_clients([known("a", 1.0)], [])
    assert len(state.clients()) == 1
    state.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StateUnusable, match="its folder must be there"):
        StateFile.open(tmp_path / "nowhere" / "state.db")
