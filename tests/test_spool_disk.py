"""A spool on a disk that fails, fills up or is slow, and files that are begun ahead of time."""

import asyncio
import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import Overloaded, Unavailable
from bitneck.wire.frames import MAX_MESSAGE_BYTES
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.link import Link
from bitneck_edge.link.sent import Sent
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool import files as spool_files
from bitneck_edge.spool import sender, spooling
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.format import Done, FrameEntry, Header, Table
from bitneck_edge.spool.outage import Outage
from bitneck_edge.spool.segment import Kept, Segment
from bitneck_edge.spool.writer import Writer

BUNDLE, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
LIMITS = Limits(most_bytes=10_000_000, most_age_s=86_400 * 7)
NOW_US = round(time.time() * 1e6)
PAYLOAD = 70

seqs = st.integers(0, (1 << 64) - 1)
entries = st.one_of(
    st.builds(Header, seqs, st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,40}\Z")),
    st.builds(Table, st.integers(0, 65534), st.just(BUNDLE), st.from_regex(r"\A[a-z0-9.-]{1,20}\Z"), st.text("abc/#é")),
    st.builds(FrameEntry, seqs, seqs, st.integers(0, 65535), st.text("abcé#/", max_size=60), st.binary(max_size=200)),
    st.builds(Done, st.lists(seqs, max_size=20).map(tuple)),
)


def frame(number: int, *, bundle: str = BUNDLE, captured_us: int = NOW_US, payload: bytes | None = None) -> Kept:
    data = payload if payload is not None else random.Random(number).randbytes(PAYLOAD)
    return Kept(
        seq=0, bundle_id=bundle, point="s1-r3", payload=data, captured_unix_us=captured_us, name=f"cam#{number}"
    )


def names(spool: Spool) -> list[str]:
    """All that is to be sent, of one bundle; it stays in the spool."""
    return [each.name for each in spool.take(1 << 20, 1 << 30)]


def files(folder: Path, suffix: str = "frames") -> list[Path]:
    return sorted(folder.glob(f"*.{suffix}"))


def test_a_sync_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that was written since the last sync that worked is brought to the disk, closed ones too."""
    synced: list[str] = []

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def works(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    spool = Spool.open(tmp_path, Limits(most_bytes=1_000_000, most_age_s=1e6))
    for number in range(600):
        spool.put(frame(number))
    monkeypatch.setattr(spool_files, "_SYNC", fails)
    assert not spool.sync()
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "open", refuse_to_open)
    assert not spool.sync()
    monkeypatch.undo()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    monkeypatch.setattr(spool_files, "_SYNC", works)
    for segment in spool._segments:
        segment.forget_read()
    assert spool.sync()
    assert sorted(synced) == [path.name for path in files(tmp_path)]
    assert not spool.dirty
    spool.close()


def refuse_to_open(*_arguments: object) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


class FailingOnce:
    """The first call of a method raises EIO, the others do what it did; `worked` is set then."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.worked = threading.Event()
        self._call = call
        self._failed = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._failed:
            self._failed = True
            raise OSError(errno.EIO, "Input/output error")
        self.worked.set()
        return self._call(*arguments)


class UpLink:
    """A link as far as `Sender` looks at it before it opens its own session."""

    up, reconnects = True, 0


async def test_a_disk_that_fails_for_a_moment_stops_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(spooling, "_SYNC_S", 0.01)
    monkeypatch.setattr(spooling, "_TIDY_EVERY", 1)
    settings = EdgeSettings.load({"spool": tmp_path / "spool"})
    live = cast("Link", UpLink())
    opened = await spooling.Spooling.open(settings, lambda: live, lambda _result: None)
    assert opened is not None
    take, tidy = FailingOnce(opened._spool.take), FailingOnce(opened._spool.tidy)
    monkeypatch.setattr(opened._spool, "take", take)
    monkeypatch.setattr(opened._spool, "tidy", tidy)
    opened._spool.put(frame(0))
    opened.start(asyncio.sleep(0))
    assert await asyncio.to_thread(take.worked.wait, 10)
    assert await asyncio.to_thread(tidy.worked.wait, 10)
    assert opened._sender.refused == {BUNDLE}, "its manifest is not there, so the frame stays"
    await opened.stop()
    await opened.close()


class LateSession:
    """A session as far as putting it in the place of another goes."""

    failure = None

    def __init__(self) -> None:
        self.closed = False

    async def close(self) -> None:
        self.closed = True


async def test_a_session_that_is_opened_while_the_client_is_closed_is_closed_too() -> None:
    client = EdgeClient("127.0.0.1:9")
    old, late, opening = LateSession(), LateSession(), asyncio.Event()

    async def open_late(**_values: Any) -> LateSession:
        await opening.wait()
        return late

    client._session = cast("EdgeSession", old)
    client._open = cast("Any", open_late)  # type: ignore[method-assign]
    reopening = [asyncio.create_task(client._reopen(client._session)) for _ in range(2)]
    await asyncio.sleep(0)
    await client.close()
    opening.set()
    results = await asyncio.gather(*reopening, return_exceptions=True)
    assert [str(each) for each in results] == ["the client is closed"] * 2
    assert (old.closed, late.closed) == (True, True)
    assert client._opened() is client._session is cast("Any", old)


def test_a_frame_that_no_server_would_take_is_refused(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    with pytest.raises(Overloaded, match="choose an operating point of a lower rate"):
        spool.put(frame(0, payload=bytes(MAX_MESSAGE_BYTES + 1)))
    assert spool.counts().dropped == 1
    assert spool.put(frame(1, payload=bytes(MAX_MESSAGE_BYTES))) == 1
    assert names(spool) == ["cam#1"]
    spool.close()


async def test_a_frame_that_a_full_spool_does_not_take_is_told(tmp_path: Path, tiny_bundle: Bundle) -> None:
    """Both one that the link did not take, and one that was sent and has no answer when the link goes."""
    spool = Spool.open(tmp_path, Limits(most_bytes=20_000, most_age_s=1e6, first="newest"))
    while spool.put(frame(0)) is not None:
        pass
    before, handed = spool.counts().dropped, list[Answer | Failure]()
    thread = DiskThread("test")
    outage = Outage(Writer(spool, thread), handed.append, lambda: None)
    photo: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    photo.set_result(SimpleNamespace(point="s1-r1", encoded=SimpleNamespace(payload=bytes(100))))
    encoding = Encoding(
        capture=Capture("photo.jpg", "photo.jpg"), decision=cast("Any", None), photo=photo, candidate=None
    )
    link = SimpleNamespace(up=True, silent_s=0.0)
    session = cast("EdgeSession", SimpleNamespace(bundle=tiny_bundle, link=link, silence_s=1.0, failure=None))
    with pytest.raises(Overloaded, match="the spool has no room, the frame is lost"):
        await outage.keep(outage.begin(session, encoding))
    assert spool.counts().dropped == before + 1
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    flight = outage.begin(session, encoding)
    outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    watching = asyncio.create_task(outage.watch(flight))
    await asyncio.sleep(1.1)  # it is tried again and again, and counts once
    assert spool.counts().dropped == before + 1, "its answer may still come"
    link.up = False
    with pytest.raises(Overloaded, match="the spool has no room, the frame is lost"):
        await watching
    assert spool.counts().dropped == before + 2
    answer.set_exception(Unavailable("the link was closed"))
    await outage.close()
    assert await thread.close(10)
    assert (spool.counts().dropped, handed) == (before + 2, [])
    spool.close()


def test_the_next_file_is_begun_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then `put` does not wait for the disk, and numbers count up all the same, also after a kill."""
    limits = Limits(most_bytes=1_000_000, most_age_s=1e6)
    spool = Spool.open(tmp_path, limits)
    given = list[int | None]()
    with monkeypatch.context() as patched:
        while len(spool._segments) < 3:
            given.append(spool.put(frame(len(given))))
            if len(given) % 10 == 0:
                patched.undo()
                spool.prepare()
                patched.setattr(Segment, "create", refuse_to_open)
    assert None not in given
    assert given == sorted(set(given), key=lambda seq: seq or 0)
    while spool._ready is None:
        given.append(spool.put(frame(len(given))))
        spool.prepare()
    left = tmp_path / "left"
    shutil.copytree(tmp_path, left, ignore=shutil.ignore_patterns("left"))
    last = spool.put(frame(len(given)))
    spool.close()
    assert last is not None
    for folder, count in ((tmp_path, len(given) + 1), (left, len(given))):
        again = Spool.open(folder, limits)
        assert names(again) == [f"cam#{number}" for number in range(count)]
        more = again.put(frame(0))
        assert more is not None
        assert more > last or (more == last and folder == left)
        again.done(seq for seq in [*given, last, more] if seq)
        assert not again.has_waiting()
        again.close()


def test_files_that_are_begun_while_frames_are_put(tmp_path: Path) -> None:
    limits = Limits(most_bytes=1_000_000, most_age_s=1e6)
    spool, ended = Spool.open(tmp_path, limits), threading.Event()

    def keep_house() -> None:
        while not ended.is_set():
            spool.sync()
            spool.prepare()

    house = threading.Thread(target=keep_house)
    house.start()
    given = [spool.put(frame(number)) or 0 for number in range(3000)]
    ended.set()
    house.join()
    spool.close()
    assert given == sorted(set(given))
    again = Spool.open(tmp_path, limits)
    assert [each.seq for each in again.take(1 << 20, 1 << 30)] == given
    again.close()


def test_a_file_that_was_begun_too_early(tmp_path: Path) -> None:
    """The device was killed before it was used, and others have numbers above its first one: none comes twice."""
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(9):
        spool.put(frame(number))
    Segment.create(tmp_path, 7, spool.spool_id, 4).close()
    spool.close()
    again = Spool.open(tmp_path, LIMITS)
    assert again.put(frame(9)) == 10
    again.done([3, 4, 5])
    assert [each.seq for each in again.take(99, 1 << 20)] == [1, 2, 6, 7, 8, 9, 10]
    again.close()
