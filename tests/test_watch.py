"""A watched folder: photographs that are complete, each once, whatever happens to the folder."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.errors import ImageError, InvalidConfig
from bitneck_edge.sources.arrivals import Arrivals, Stamp
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.parse import parse_sources
from bitneck_edge.sources.watch import Watch, is_network_folder, list_photos, watched
from bitneck_testing.photographs import photo_bytes
from bitneck_testing.processes import Server, edge, edge_run, heeding_interrupts

HANG_S = 60.0
WAYS = [Watch(), Watch(poll=True)]
PNG = photo_bytes(1)


class Eyes:
    """Takes what a watched folder gives."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._source: AsyncGenerator[Capture] = watched(folder, watch)
        self.names: list[str] = []
        self._task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        async for capture in self._source:
            self.names.append(Path(capture.name).name)

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(HANG_S):
            while len(self.names) < count and not self._task.done():  # noqa: ASYNC110  the task adds names
                await asyncio.sleep(0.02)
        return self.names

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._source.aclose()


@pytest.mark.parametrize("watch", WAYS)
async def test_each_photograph_comes_once_and_only_when_it_is_complete(tmp_path: Path, watch: Watch) -> None:
    (tmp_path / "before.png").write_bytes(PNG)
    eyes = Eyes(tmp_path, watch)
    await asyncio.sleep(0.5)
    with (tmp_path / "slow.png").open("wb") as file:
        for part in range(4):
            file.write(PNG[part::4])
            file.flush()
            await asyncio.sleep(0.5)
            assert eyes.names == []
    assert await eyes.until(1) == ["slow.png"]
    (tmp_path / "a.part").write_bytes(PNG)
    (tmp_path / "a.part").rename(tmp_path / "a.PNG")
    for name in (".hidden.png", "notes.txt", "empty.png"):
        (tmp_path / name).write_bytes(b"" if name == "empty.png" else PNG)
    assert await eyes.until(2) == ["slow.png", "a.PNG"]
    os.utime(tmp_path / "a.PNG", (1, 1)) if not watch.poll else None  # what an archiver does after it has closed a file
    (tmp_path / "slow.png").write_bytes(PNG + b"again")
    assert await eyes.until(3) == ["slow.png", "a.PNG", "slow.png"]
    (tmp_path / "last.png").write_bytes(PNG)
    assert await eyes.until(4) == ["slow.png", "a.PNG", "slow.png", "last.png"]
    await eyes.close()


@pytest.mark.parametrize("watch", WAYS)
async def test_folders_below_it_and_a_folder_that_goes_and_comes_back(tmp_path: Path, watch: Watch) -> None:
    folder, elsewhere = tmp_path / "watched", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    eyes = Eyes(folder, watch)
    await asyncio.sleep(0.5)
    (folder / "day").mkdir()
    (folder / "day" / "at-once.png").write_bytes(PNG)  # perhaps before the kernel watches the new folder
    await asyncio.sleep(0.5)
    (folder / "day" / "later.png").write_bytes(PNG)
    (elsewhere / "moved.png").write_bytes(PNG)
    elsewhere.rename(folder / "moved")
    assert set(await eyes.until(3)) == {"at-once.png", "later.png", "moved.png"}
    await asyncio.sleep(0.5)
    (folder / "moved" / "in-moved.png").write_bytes(PNG)
    assert (await eyes.until(4))[3:] == ["in-moved.png"]
    shutil.rmtree(folder)
    await asyncio.sleep(1.5)
    folder.mkdir()
    await asyncio.sleep(1.5)
    (folder / "back.png").write_bytes(PNG)
    assert (await eyes.until(5))[4:] == ["back.png"]
    await eyes.close()


async def test_what_is_there_comes_first_and_the_oldest_before_all(tmp_path: Path) -> None:
    for age, name in enumerate(("new.png", "old.png", "oldest.png")):
        (tmp_path / name).write_bytes(PNG)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    eyes = Eyes(tmp_path, Watch(existing=True))
    assert await eyes.until(3) == ["oldest.png", "old.png", "new.png"]
    await eyes.close()


async def test_the_time_of_a_photograph_is_when_it_was_written(tmp_path: Path) -> None:
    source = watched(tmp_path, Watch())
    first = asyncio.ensure_future(anext(source))
    await asyncio.sleep(0.5)
    (tmp_path / "a.png").write_bytes(PNG)
    capture = await asyncio.wait_for(first, HANG_S)
    assert abs(capture.unix_us / 1e6 - time.time()) < 10
    await source.aclose()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.sampled_from(["closed", "look", "gone"])), max_size=30
    ),
    st.booleans(),
)
def test_no_photograph_is_sent_twice_as_it_is_and_none_stays_behind(
    events: list[tuple[str, int, str]], by_events: bool
) -> None:
    arrivals = Arrivals(settle_s=1.0, by_events=by_events)
    here: dict[Path, Stamp] = {}
    sent: list[tuple[Path, Stamp]] = []
    now = 0.0
    for inode, (name, size, what) in enumerate(events):
        path = Path(name)
        if what == "gone":
            here.pop(path, None)
            continue
        here[path] = Stamp(inode, size, inode)  # another file of this name
        if what == "closed" and arrivals.closed(path, here[path]):
            sent.append((path, here[path]))
        now += 0.6
        sent += [(each, here[each]) for each in arrivals.looked(here, now, 100)]
    for later in (now + 2, now + 4):
        sent += [(each, here[each]) for each in arrivals.looked(here, later, 100)]
    assert len(sent) == len(set(sent))
    assert set(here.items()) <= set(sent)


def test_what_does_not_fit_waits_for_another_look() -> None:
    arrivals = Arrivals(settle_s=1.0, by_events=False)
    here = {Path(f"{k}.png"): Stamp(k, 1, 10 - k) for k in range(5)}
    assert arrivals.looked(here, 0.0, 3) == []
    assert arrivals.looked(here, 1.0, 3) == [Path("4.png"), Path("3.png"), Path("2.png")]
    assert arrivals.looked(here, 2.0, 3) == [Path("1.png"), Path("0.png")]
    assert not arrivals.settling


def test_network_folders_are_known_by_their_filesystem(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    line = "36 35 98:0 / {} rw,noatime master:1 - {} server:/export rw\n"
    share = str(tmp_path).replace(" ", "\\040")
    mounts.write_text(line.format("/", "ext4") + line.format(f"{share}/a\\040share", "nfs4"))
    (tmp_path / "a share" / "below").mkdir(parents=True)
    assert is_network_folder(tmp_path / "a share" / "below", mounts)
    assert not is_network_folder(tmp_path, mounts)
    assert not is_network_folder(tmp_path, tmp_path / "nothing")


def test_links_pipes_and_hidden_folders_are_no_photographs(tmp_path: Path) -> None:
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "good.png").write_bytes(PNG)
    assert list(list_photos(tmp_path)) == [tmp_path / "good.png"]
    assert list_photos(tmp_path / "nowhere") == {}


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        parse_sources([], [tmp_path / "nowhere"])
    with pytest.raises(InvalidConfig, match="one folder"):
        parse_sources([], [tmp_path, tmp_path])
    with pytest.raises(InvalidConfig, match="--watch"):
        parse_sources([])
    done = edge("run", "--watch", str(tmp_path), "--json")
    assert (done.returncode, "--json-lines" in done.stderr) == (2, True)


def test_a_burst_of_a_thousand_files_some_unreadable_and_an_interrupt(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "before.png").write_bytes(PNG)
    command = edge_run(
        server.grpc, tmp_path / "cache", "--model", "tiny", "--watch", folder, "--json-lines", "--verbose"
    )
    with (
        (tmp_path / "log").open("wb") as errors,
        subprocess.Popen(heeding_interrupts(command), stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        try:
            limit = time.monotonic() + HANG_S
            while "watching it" not in (tmp_path / "log").read_text():
                assert time.monotonic() < limit
                time.sleep(0.05)
            for k in range(1000):
                (folder / f"{k:04}.png").write_bytes(b"no picture" if k % 100 == 7 else photo_bytes(k % 3))
            assert child.stdout is not None
            lines = [json.loads(child.stdout.readline()) for _ in range(1000)]
            shutil.rmtree(folder)
            child.send_signal(signal.SIGINT)
            summary = json.loads(child.stdout.readline())["summary"]
            assert child.wait(HANG_S) == 130
        finally:
            child.kill()
    assert sorted(Path(line["file"]).name for line in lines) == [f"{k:04}.png" for k in range(1000)]
    assert sum("error" in line for line in lines) == 10
    assert (summary["frames"], summary["failed"]) == (990, 10)
    log = (tmp_path / "log").read_text()
    assert "1000 frames: 990 answered, 10 failed, 0 dropped" in log.splitlines()[-1]
    assert "Traceback" not in log
