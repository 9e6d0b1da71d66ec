"""A state database on a disk that does not answer: what waits for it, and for how long."""

import asyncio
import time
from pathlib import Path

import pytest

from bitneck.errors import StateUnusable, Unavailable
from bitneck_cloud.fleet import control
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.fleet.state_file import StateFile
from bitneck_cloud.fleet.tables import RateTable
from bitneck_testing.consumers.canaries import Nobody, registry_of
from bitneck_testing.devices.hanging import Disk

GROUPS = Groups()
POINT = RateTable(clients="cam-*", point="s1-r1").rule(GROUPS)
AUTO = RateTable(clients="cam-*", auto=True).rule(GROUPS)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(control, "_DISK_S", 0.2)
    monkeypatch.setattr(control, "_OPEN_S", 0.2)
    found = Disk(monkeypatch)
    for name in ("save_rule", "save_choices", "close"):
        found.slows(StateFile, name)
    return found


async def opened(path: Path) -> Fleet:
    fleet = Fleet(GROUPS, None, path, 10)
    await fleet.open()
    fleet.serve(registry_of([]), Nobody())
    return fleet


async def kept(path: Path) -> tuple[list[object], list[object], list[str]]:
    """Policies of the rules, of the changes, and chosen bundles, as a server finds them that starts."""
    fleet = await opened(path)
    rules = [rule.policy for rule in fleet.registry.rules.rules]
    changes, choices = [change.after for change in fleet.changes], [choice.bundle for choice in fleet.choices]
    await fleet.close()
    return rules, changes, choices


async def ended(fleet: Fleet) -> None:
    """The disk answers again: everything that waits for it is done."""
    await fleet._disk.run(lambda: None)


async def test_a_change_is_refused_after_a_while_and_taken_back(tmp_path: Path, disk: Disk) -> None:
    """It has begun, and the disk may do it at last. Those after it have not begun, and are not done."""
    fleet = await opened(tmp_path / "state.db")
    await fleet.put(POINT, running=True)
    disk.hang()
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"has not answered for 0\.2 s; nothing is changed: try again later"):
            await fleet.put(AUTO, running=True)
    with pytest.raises(Unavailable):
        await fleet.delete(POINT.key, running=True)
    assert [rule.policy for rule in fleet.registry.rules.rules] == [POINT.policy]
    disk.go_on()
    await ended(fleet)
    await fleet.close()
    assert await kept(tmp_path / "state.db") == ([POINT.policy], [{"point": "s1-r1"}], [])


async def test_a_rule_that_was_not_there_is_not_there_after_it(tmp_path: Path, disk: Disk) -> None:
    fleet = await opened(tmp_path / "state.db")
    disk.hang()
    with pytest.raises(Unavailable):
        await fleet.put(POINT, running=True)
    disk.go_on()
    await ended(fleet)
    await fleet.put(AUTO, running=True)
    await fleet.close()
    rules, changes, _ = await kept(tmp_path / "state.db")
    assert (rules, len(changes)) == ([AUTO.policy], 1)


async def test_who_asks_and_goes_away_changes_nothing(tmp_path: Path, disk: Disk) -> None:
    fleet = await opened(tmp_path / "state.db")
    disk.hang()
    asking = asyncio.create_task(fleet.put(POINT, running=True))
    while not disk.waiting:  # noqa: ASYNC110  another thread
        await asyncio.sleep(0.005)
    asking.cancel()
    await asyncio.wait({asking})
    disk.go_on()
    await ended(fleet)
    assert not fleet.registry.rules.rules
    await fleet.close()
    assert await kept(tmp_path / "state.db") == ([], [], [])


async def test_choices_of_bundles_are_taken_back_too(tmp_path: Path, disk: Disk) -> None:
    def choice(bundle: str) -> BundleChoice:
        return BundleChoice(
            model="tiny", kind="promoted", base="sha256:0", bundle=bundle, bundle_id="sha256:1", clients="", since="",
            by="",
        )  # fmt: skip

    fleet = await opened(tmp_path / "state.db")
    await fleet.choose("tiny", [choice("first")])
    disk.hang()
    with pytest.raises(Unavailable):
        await fleet.choose("tiny", [choice("second")])
    assert [each.bundle for each in fleet.choices] == ["first"]
    disk.go_on()
    await ended(fleet)
    await fleet.close()
    assert (await kept(tmp_path / "state.db"))[2] == ["first"]


async def test_a_server_stops_without_it(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    fleet = await opened(tmp_path / "state.db")
    disk.hang()
    begin = time.monotonic()
    await fleet.close()
    assert time.monotonic() - begin < 5
    assert "the server stops without it: state_db" in caplog.text
    disk.go_on()


async def test_a_server_does_not_start_without_it(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.slows(StateFile, "_prepare")
    disk.hang()
    with pytest.raises(StateUnusable, match=r"has not answered for 0\.2 s; is its disk there"):
        await opened(tmp_path / "state.db")
    disk.go_on()
