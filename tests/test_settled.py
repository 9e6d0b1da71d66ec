"""A frame that was never answered may be sent again at any time: after a fault, or to a smaller window."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.errors import MalformedFrame
from bitneck_cloud.sessions.session import Session, Verdict
from bitneck_cloud.sessions.settled import Settled
from bitneck_edge.answers.results import Answer, Failure
from bitneck_testing.devices.streaming import until
from bitneck_testing.links import Proxy
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, free_port, start_server
from bitneck_testing.streams import Frames, edge_client, empty_result, open_stream, stub

HANG_S = 60.0


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=200))
def test_what_was_never_answered_is_never_refused(steps: list[tuple[int, bool]]) -> None:
    """And what was answered is either kept, or refused."""
    it, answered, failed = Settled(2), set[int](), set[int]()
    for seq, good in steps:
        if seq in it:
            assert seq in answered
            continue
        try:
            it.check(seq)
        except MalformedFrame:
            assert seq not in failed
            continue
        assert seq not in answered
        (answered if good else failed).add(seq)
        failed -= answered
        if good:
            it.answered(empty_result(seq))
        else:
            it.failed(seq)


def test_what_failed_is_bounded_and_a_refusal_opens_no_door() -> None:
    it = Settled(2)
    for seq in range(1, 5000):
        it.failed(seq)
    for seq in range(5000, 5010):
        it.answered(empty_result(seq))
    it.check(4999)
    it.failed(5001, accepted=False)
    for seq in (1, 5001):
        with pytest.raises(MalformedFrame, match="count upwards"):
            it.check(seq)


def test_refusals_push_out_no_frame_that_was_accepted_and_failed() -> None:
    it = Settled(2)
    it.failed(1)
    for seq in range(2, 5000):
        it.failed(seq, accepted=False)
    for seq in range(5000, 5010):
        it.answered(empty_result(seq))
    it.check(1)
    with pytest.raises(MalformedFrame, match="count upwards"):
        it.check(2)


def test_a_frame_that_fails_after_many_others_were_answered_may_come_again(tiny_bundle: Bundle) -> None:
    """Also one that was in flight all the time."""
    model = {"session_id": "s", "model": "m", "client": "c", "assumed_fps": 10.0, "now": 0.0}
    session = Session(ladder=tiny_bundle.manifest.ladder, window=2, **model)  # type: ignore[arg-type]
    assert session.accept(1, "p", 1, 0.0) is Verdict.NEW
    for seq in range(2, 20):
        session.accept(seq, "p", 1, 0.0)
        session.complete(empty_result(seq))
    session.fail(1, 14)
    assert session.accept(1, "p", 1, 0.0) is Verdict.NEW
    session.complete(empty_result(1))
    session.fail(1, 14)  # of an earlier attempt
    for seq in range(20, 40):
        session.accept(seq, "p", 1, 0.0)
        session.complete(empty_result(seq))
    with pytest.raises(MalformedFrame):
        session.accept(1, "p", 1, 0.0)


async def test_a_frame_that_was_damaged_may_come_again_after_many_others(server: Server, tiny_bundle: Bundle) -> None:
    frames = Frames(tiny_bundle)
    async with asyncio.timeout(HANG_S), stub(server.grpc) as cloud:
        stream = await open_stream(cloud, tiny_bundle.bundle_id, model="tiny")
        damaged = frames.frame(1)
        damaged.crc32c ^= 1
        assert (await stream.ask(damaged)).HasField("fault")
        for seq in range(2, 3 * stream.opened.window):
            assert (await stream.ask(frames.frame(seq))).HasField("result")
        again = await stream.ask(frames.frame(1))
        assert again.HasField("result"), again
        assert again.result.seq == 1
        late = await stream.ask(frames.frame(2))
        assert "answered long ago" in late.fault.message


async def test_a_device_comes_back_to_a_server_with_a_smaller_window(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """All that was out is sent at once, most of it is refused for now, and each frame is answered in the end."""
    config, address = tmp_path / "cloud.toml", f"127.0.0.1:{free_port()}"
    config.write_text('token_key = "the same key for both of them"\n')
    options = ("--config", str(config))
    first = await asyncio.to_thread(start_server, tiny_bundle.root, options=options, grpc=address)
    second: Server | None = None
    found: list[Answer | Failure] = []
    try:
        async with (
            asyncio.timeout(HANG_S),
            Proxy(first.grpc) as link,
            edge_client(link.address, tmp_path) as client,
        ):
            await client.infer(photo(0))
            link.silence()

            async def send() -> None:
                found.extend([each async for each in client.stream([photo(k) for k in range(40)])])

            sending = asyncio.create_task(send())
            await until(lambda: len(client._opened().link.unanswered) == client.window == 16)
            session = client.session_id
            link.cut()
            first.kill()
            second = await asyncio.to_thread(
                start_server, tiny_bundle.root, options=(*options, "--window", "1"), grpc=address
            )
            link.mend()
            await sending
            assert client.window == 1
            assert client.session_id == session
            assert [type(each) for each in found] == [Answer] * 40, found
    finally:
        for each in (first, second):
            if each is not None:
                each.kill()
                each.close()
