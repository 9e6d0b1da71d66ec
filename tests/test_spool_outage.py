"""A frame that is encoded is on the disk in time, whatever it waits for: its turn, room, others, the link."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, BundleMismatch, ImageError, Unavailable, UnknownPoint
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.sent import Sent
from bitneck_edge.passage import Passage, Ways
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool import outage, segment
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.outage import Flight, Outage
from bitneck_edge.spool.segment import Kept
from bitneck_edge.spool.writer import Writer
from bitneck_testing.devices.streaming import until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server

HANG_S = 60.0
LIMITS = Limits(most_bytes=1_000_000, most_age_s=1e6)


async def captures(count: int) -> AsyncIterator[Capture]:
    for number in range(count):
        yield Capture(photo(number), f"camera#{number}")


async def test_frames_that_wait_for_room_on_a_silent_link_are_on_the_disk(server: Server, tmp_path: Path) -> None:
    """Their link counts as silent only after minutes. Once it speaks again, each is answered live, and only once."""
    live: list[Answer | Failure] = []
    spooled: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        Proxy(server.grpc) as link,
        EdgeClient(
            link.address, model="tiny", threads=1, workers=3, in_flight=1, answer_timeout_s=900,
            cache_dir=tmp_path / "cache", spool=tmp_path / "spool", on_spooled=spooled.append,
        ) as client,
    ):  # fmt: skip
        assert client.spool is not None
        await client.infer(Capture(photo(0), "first"))
        link.silence()

        async def send() -> None:
            live.extend([each async for each in client.stream(captures(4))])

        sending = asyncio.create_task(send())
        await until(lambda: client.spool is not None and client.spool.kept >= 4)
        assert live == spooled == []
        assert client._opened().link.unanswered, "one is out, and the others wait for it"
        link.mend()
        await sending
        assert [each.file for each in live if isinstance(each, Answer)] == [f"camera#{k}" for k in range(4)]
        await client.drain(asyncio.Event())
        assert (client.spool.kept, spooled) == (0, [])


class Bench:
    """A spool and an outage without a link: pictures are encoded and answered by the test."""

    def __init__(self, folder: Path, bundle: Bundle, **limits: Any) -> None:
        self.folder = folder
        self.spool = Spool.open(folder, Limits(**{"most_bytes": 1_000_000, "most_age_s": 1e6} | limits))
        self.handed: list[Answer | Failure] = []
        self.thread = DiskThread("test")
        self.outage = Outage(Writer(self.spool, self.thread), self.handed.append, lambda: None)
        link = SimpleNamespace(up=True, silent_s=0.0)
        self.session = cast(
            "EdgeSession",
            SimpleNamespace(bundle=bundle, link=link, silence_s=1e3, failure=None, answer_of=lambda *it: it[-1]),
        )

    def begin(self, name: str, *, encoded: bool = True, before: Flight | None = None) -> Flight:
        photo: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        encoding = Encoding(capture=Capture(Path(name), name), decision=cast("Any", None), photo=photo, candidate=None)
        flight = self.outage.begin(self.session, encoding, before)
        if encoded:
            self.encode(flight)
        return flight

    def encode(self, flight: Flight, error: Exception | None = None) -> None:
        assert flight.encoding is not None
        photo = cast("asyncio.Future[Any]", flight.encoding.photo)
        if error is not None:
            photo.set_exception(error)
        else:
            photo.set_result(SimpleNamespace(point="s1-r1", encoded=SimpleNamespace(payload=bytes(100))))

    async def settled(self) -> Spool:
        """The spool, once everything that it was asked for is done."""
        for _ in range(3):  # what was done may ask for more
            await self.thread.run(lambda: None)
            await asyncio.sleep(0)
        return self.spool

    async def on_disk(self) -> list[str]:
        """Names of the frames that a device would send if this one's process ended now."""
        await self.settled()
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(self.folder, Path(folder) / "spool")
            spool = Spool.open(copy, Limits(most_bytes=1_000_000, most_age_s=1e6))
            try:
                return [each.name for each in spool.take(99, 1 << 20)]
            finally:
                spool.close()

    async def to_send(self) -> list[str]:
        return [each.name for each in (await self.settled()).take(99, 1 << 20)]


@pytest.fixture
async def bench(tmp_path: Path, tiny_bundle: Bundle) -> AsyncIterator[Bench]:
    one = Bench(tmp_path / "spool", tiny_bundle)
    async with asyncio.timeout(HANG_S):
        yield one
        assert await one.thread.close(10)
    one.spool.close()


async def test_a_frame_whose_turn_does_not_come_is_on_the_disk(bench: Bench, tmp_path: Path) -> None:
    """The picture before it is still being encoded; and one that cannot be read leaves nothing behind."""
    first, second, broken = (bench.begin(name, encoded=False) for name in ("first", "second", "broken"))
    bench.encode(second)
    bench.encode(broken, ImageError("no picture"))
    await until(lambda: bench.spool.counts().kept)
    assert (first.seq, second.seq, broken.seq) == (None, 1, None)
    assert await bench.to_send() == [], "its session may still send it"
    bench.outage.told(second)
    assert (await bench.settled()).counts().kept == 0, "the program was told why it has no answer"
    with pytest.raises(ImageError):
        await bench.outage.keep(broken)


async def test_a_frame_that_is_answered_in_time_is_not_written(bench: Bench) -> None:
    flight = bench.begin("quick")
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    bench.outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    answer.set_result(None)
    assert await bench.outage.watch(flight)
    bench.outage.told(flight)
    slow = bench.begin("slow")
    await until(lambda: slow.seq is not None)
    assert (flight.seq, slow.seq, (await bench.settled()).counts().spooled) == (None, 1, 1)


async def test_a_picture_that_is_coded_again_is_on_the_disk_all_the_time(bench: Bench) -> None:
    """The old frame is crossed out when the new one is written, and not before."""
    old = bench.begin("old")
    await until(lambda: old.seq is not None)
    new = bench.begin("new", encoded=False, before=old)
    assert await bench.on_disk() == ["old"]
    bench.encode(new)
    await asyncio.sleep(0.1)
    assert await bench.on_disk() == ["old"]
    await until(lambda: new.seq is not None)
    assert await bench.on_disk() == ["new"]
    last = bench.begin("last", before=new)
    bench.outage.told(last)  # it was answered at once
    assert await bench.on_disk() == []
    assert (await bench.settled()).counts().kept == 0


async def test_a_picture_is_written_while_it_waits_to_be_coded_again(bench: Bench) -> None:
    """Another bundle may be long in coming."""
    old = bench.begin("old")
    new = bench.begin("new", encoded=False, before=old)
    await until(lambda: old.seq is not None)
    assert await bench.on_disk() == ["old"]
    bench.encode(new, ImageError("the file is gone"))
    await asyncio.sleep(0)
    assert await bench.on_disk() == ["old"], "until the program knows why"
    bench.outage.told(new)
    assert await bench.on_disk() == []


@pytest.mark.parametrize("written", [True, False])
async def test_a_picture_that_nobody_waits_for_while_it_is_coded_again(bench: Bench, written: bool) -> None:
    """What it gave before goes to the spool."""
    old = bench.begin("old")
    if written:
        await until(lambda: old.seq is not None)
    new = bench.begin("new", encoded=False, before=old)
    bench.outage.give_up(new)
    assert await bench.to_send() == ["old"]
    assert await bench.on_disk() == ["old"]


async def test_an_answer_is_on_the_disk_until_the_program_takes_it(bench: Bench) -> None:
    """It waits behind others, or for a program that has no time."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    flight = bench.begin("ready")
    bench.outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    answer.set_exception(UnknownPoint("a fault that does not pass"))
    assert await bench.outage.watch(flight)
    await until(lambda: flight.seq is not None)
    assert await bench.on_disk() == ["ready"]
    bench.outage.give_up(flight)  # the program leaves its stream
    assert [type(each) for each in bench.handed] == [Failure]
    assert await bench.on_disk() == []


async def test_a_stream_whose_reader_has_no_time(server: Server, tmp_path: Path) -> None:
    """Frames are on the disk until their answers were taken, and then no more; each is answered once."""
    spooled: list[Answer | Failure] = []
    async with (
        asyncio.timeout(HANG_S),
        EdgeClient(
            server.grpc, model="tiny", threads=1, cache_dir=tmp_path / "cache", spool=tmp_path / "spool",
            on_spooled=spooled.append,
        ) as client,
    ):  # fmt: skip
        results = client.stream(captures(3))
        found = [await anext(results)]
        await until(lambda: client.spool is not None and client.spool.kept == 3)
        found += [each async for each in results]
        assert [each.file for each in found if isinstance(each, Answer)] == [f"camera#{k}" for k in range(3)]
        await until(lambda: client.spool is not None and client.spool.kept == 0)
        assert spooled == []


class Moving:
    """Sessions of a client that finds another bundle: what a passage needs of them."""

    def __init__(self, bundle: Bundle) -> None:
        self.link = SimpleNamespace(up=True, silent_s=0.0)
        self.bundle, self.silence_s = bundle, 1e3
        self.failure: BitneckError | None = None
        self.photos: list[asyncio.Future[Any]] = []

    def begin(self, capture: Capture, _interval_s: float) -> Encoding:
        self.photos.append(asyncio.get_running_loop().create_future())
        return Encoding(capture=capture, decision=cast("Any", None), photo=self.photos[-1], candidate=None)

    async def takes_frames(self) -> bool:
        while self.failure is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return False


async def test_a_passage_keeps_its_frame_until_the_other_bundles_is_written(bench: Bench, tiny_bundle: Bundle) -> None:
    """From the moment in which its session fails, over the fetching of the other bundle, to its own answer."""
    sessions = [Moving(tiny_bundle), Moving(tiny_bundle)]
    usable, renewed = [sessions[0]], asyncio.Event()

    async def renew(_session: Any) -> None:
        await renewed.wait()
        usable[0] = sessions[1]

    ways = Ways(
        usable=lambda: cast("EdgeSession", usable[0]), interval_s=lambda: 0.0,
        renews=lambda session: isinstance(session.failure, BundleMismatch), renew=renew,
        finished=cast("Any", None), failed=lambda _error: None, outage=lambda: bench.outage,
    )  # fmt: skip
    passage = Passage(ways, Capture(Path("picture"), "picture"))
    passage.encode()
    encoded = SimpleNamespace(point="s1-r1", encoded=SimpleNamespace(payload=bytes(100)))
    sessions[0].photos[0].set_result(encoded)
    sending = asyncio.create_task(passage.send())
    await until(lambda: bench.spool.counts().kept == 1)
    usable[0] = sessions[1]  # somebody else was faster
    sessions[0].failure = BundleMismatch("another bundle")
    renewed.set()
    await until(lambda: sessions[1].photos)
    assert await bench.on_disk() == ["picture"]
    sessions[1].photos[0].set_result(encoded)
    await until(lambda: bench.spool.counts().spooled == 2)
    assert await bench.on_disk() == ["picture"], "once"
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert await bench.to_send() == await bench.on_disk() == ["picture"]


async def test_frames_that_nobody_waits_for_any_more(bench: Bench) -> None:
    """What is encoded goes to the spool; what is not is dropped."""
    held, encoded, unencoded = bench.begin("held"), bench.begin("encoded"), bench.begin("unencoded", encoded=False)
    await until(lambda: held.seq is not None)
    for flight in (held, encoded, unencoded):
        bench.outage.give_up(flight)
    bench.encode(unencoded)
    await asyncio.sleep(0.6)
    assert sorted(await bench.to_send()) == ["encoded", "held"]
    assert (await bench.settled()).counts().kept == 2


async def test_a_client_that_ends_leaves_what_is_encoded_to_the_spool(bench: Bench) -> None:
    """Also what was not sent yet. Who sends it then does not write it a second time."""
    unsent, sent = bench.begin("unsent"), bench.begin("sent")
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    bench.outage.sent(sent, Sent(1, b"", 0, 0.0, answer))
    answer.set_exception(Unavailable("the link was closed"))
    await bench.outage.close()
    await bench.outage.keep(unsent)
    assert sorted(await bench.to_send()) == ["sent", "unsent"]
    await asyncio.sleep(0.6)
    assert (await bench.settled()).counts().spooled == 2


async def test_a_picture_that_is_being_encoded_when_the_client_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for a moment; if that is not enough, the program is not told that it is in the spool."""
    monkeypatch.setattr(outage, "_CLOSE_S", 0.3)
    quick, old = bench.begin("quick", encoded=False), bench.begin("old")
    slow, again = bench.begin("slow", encoded=False), bench.begin("again", encoded=False, before=old)
    keeping = [asyncio.create_task(bench.outage.keep(each)) for each in (quick, slow, again)]
    closing = asyncio.create_task(bench.outage.close())
    await asyncio.sleep(0.1)
    bench.encode(quick)
    await closing
    for each in (slow, again):
        bench.encode(each)
    found = await asyncio.gather(*keeping, return_exceptions=True)
    assert (found[0], found[2]) == (None, None)
    assert isinstance(found[1], Unavailable)
    assert sorted(await bench.to_send()) == ["old", "quick"]


def test_a_put_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is brought to the disk by the next sync, with its name; also one that `tidy` begins."""
    spool = Spool.open(tmp_path, LIMITS)
    named: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: pytest.fail("it waits for the disk"))
    monkeypatch.setattr(segment, "sync_folder", named.append)

    def put() -> int:
        frame = Kept(seq=0, bundle_id="sha256:" + "ab" * 32, point="p", payload=bytes(70), captured_unix_us=1, name="c")
        return spool.put(frame) or 0

    seqs = [put() for _ in range(400)]
    assert len(spool._segments) > 1
    assert spool.sync()
    assert named == [tmp_path]
    assert spool.sync()
    assert named == [tmp_path], "once"
    spool.done(seqs)
    seqs = [put() for _ in range(60)]
    spool.done(seqs)
    spool.tidy()
    assert named == [tmp_path] * 2
    assert spool.counts().bytes < 200
    assert put() == seqs[-1] + 1
    monkeypatch.undo()
    spool.close()
    again = Spool.open(tmp_path, LIMITS)
    assert [each.seq for each in again.take(9, 1 << 20)] == [seqs[-1] + 1]
    again.close()


async def test_a_held_frame_whose_answer_is_there_at_once_is_answered_once(bench: Bench) -> None:
    """Its answer comes while it is still being sent: whoever watches it has it before the session tells of it."""
    flight = bench.begin("slow")
    await until(lambda: flight.seq is not None)
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    answer.set_exception(UnknownPoint("a fault that does not pass"))
    bench.outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    assert await bench.outage.watch(flight), "the program gets it"
    assert await bench.on_disk() == ["slow"], "until it has it"
    bench.outage.told(flight)
    await asyncio.sleep(0.1)
    assert bench.handed == [], "a second time"
    assert (await bench.settled()).counts().kept == 0


@pytest.mark.parametrize("answered_first", [True, False])
async def test_a_held_frame_that_nobody_watches_any_more_is_answered_once(bench: Bench, answered_first: bool) -> None:
    flight = bench.begin("slow")
    await until(lambda: flight.seq is not None)
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    bench.outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    watching = asyncio.create_task(bench.outage.watch(flight))
    await asyncio.sleep(0.1)
    steps: list[Callable[[], Any]] = [
        lambda: answer.set_exception(UnknownPoint("a fault that does not pass")),
        watching.cancel,
    ]
    for step in steps if answered_first else reversed(steps):
        step()
    await asyncio.gather(watching, return_exceptions=True)
    await asyncio.sleep(0.1)
    assert [type(each) for each in bench.handed] == [Failure]
    assert (await bench.settled()).counts().kept == 0
