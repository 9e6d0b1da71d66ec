"""A frame that is encoded is on the disk in time, whatever it waits for: its turn, room, others, the link."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import ImageError, Unavailable, UnknownPoint
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.link.sent import Sent
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool import segment
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.outage import Flight, Outage
from bitneck_edge.spool.segment import Kept
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
        assert (client.spool.kept, spooled) == (0, [])


class Bench:
    """A spool and an outage without a link: pictures are encoded and answered by the test."""

    def __init__(self, folder: Path, bundle: Bundle, **limits: Any) -> None:
        self.spool = Spool.open(folder, Limits(**{"most_bytes": 1_000_000, "most_age_s": 1e6} | limits))
        self.handed: list[Answer | Failure] = []
        self.outage = Outage(self.spool, self.handed.append, lambda: None)
        link = SimpleNamespace(up=True, silent_s=0.0)
        self.session = cast(
            "EdgeSession",
            SimpleNamespace(bundle=bundle, link=link, silence_s=1e3, failure=None, answer_of=lambda *it: it[-1]),
        )

    def begin(self, name: str, *, encoded: bool = True) -> Flight:
        photo: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        encoding = Encoding(capture=Capture(Path(name), name), decision=cast("Any", None), photo=photo, candidate=None)
        flight = self.outage.begin(self.session, encoding)
        if encoded:
            self.encode(flight)
        return flight

    def encode(self, flight: Flight) -> None:
        cast("asyncio.Future[Any]", flight.encoding.photo).set_result(
            SimpleNamespace(point="s1-r1", encoded=SimpleNamespace(payload=bytes(100)))
        )

    def to_send(self) -> list[str]:
        return [each.name for each in self.spool.take(99, 1 << 20)]


@pytest.fixture
async def bench(tmp_path: Path, tiny_bundle: Bundle) -> AsyncIterator[Bench]:
    one = Bench(tmp_path / "spool", tiny_bundle)
    async with asyncio.timeout(HANG_S):
        yield one
    one.spool.close()


async def test_a_frame_whose_turn_does_not_come_is_on_the_disk(bench: Bench, tmp_path: Path) -> None:
    """The picture before it is still being encoded; and one that cannot be read leaves nothing behind."""
    first, second, broken = (bench.begin(name, encoded=False) for name in ("first", "second", "broken"))
    bench.encode(second)
    cast("asyncio.Future[Any]", broken.encoding.photo).set_exception(ImageError("no picture"))
    await until(lambda: bench.spool.counts.kept)
    assert (first.seq, second.seq, broken.seq) == (None, 1, None)
    assert bench.to_send() == [], "its session may still send it"
    bench.outage.failed(second)
    assert bench.spool.counts.kept == 0, "the program was told why it has no answer"
    with pytest.raises(ImageError):
        await bench.outage.keep(broken)


async def test_a_frame_that_is_answered_in_time_is_not_written(bench: Bench) -> None:
    flight = bench.begin("quick")
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    bench.outage.sent(flight, Sent(1, b"", 0, 0.0, answer))
    answer.set_result(None)
    assert await bench.outage.watch(flight)
    slow = bench.begin("slow")
    await until(lambda: slow.seq is not None)
    assert (flight.seq, slow.seq, bench.spool.counts.spooled) == (None, 1, 1)


async def test_frames_that_nobody_waits_for_any_more(bench: Bench) -> None:
    """What is encoded goes to the spool; what is not is dropped."""
    held, encoded, unencoded = bench.begin("held"), bench.begin("encoded"), bench.begin("unencoded", encoded=False)
    await until(lambda: held.seq is not None)
    for flight in (held, encoded, unencoded):
        bench.outage.give_up(flight)
    bench.encode(unencoded)
    await asyncio.sleep(0.6)
    assert sorted(bench.to_send()) == ["encoded", "held"]
    assert bench.spool.counts.kept == 2


async def test_a_client_that_ends_leaves_what_is_encoded_to_the_spool(bench: Bench) -> None:
    """Also what was not sent yet. Who sends it then does not write it a second time."""
    unsent, sent = bench.begin("unsent"), bench.begin("sent")
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    bench.outage.sent(sent, Sent(1, b"", 0, 0.0, answer))
    answer.set_exception(Unavailable("the link was closed"))
    await bench.outage.close()
    await bench.outage.keep(unsent)
    assert sorted(bench.to_send()) == ["sent", "unsent"]
    await asyncio.sleep(0.6)
    assert bench.spool.counts.spooled == 2


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
    assert spool.counts.bytes < 200
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
    await asyncio.sleep(0.1)
    assert bench.handed == [], "a second time"
    assert bench.spool.counts.kept == 0


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
    assert bench.spool.counts.kept == 0
