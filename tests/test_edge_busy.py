"""The edge and a server that has too much to do, or that minds its keepalives. Real servers that refuse on purpose."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import GRPC_CODES, Overloaded
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.remote import Access
from bitneck_testing.http2 import CalmServer
from bitneck_testing.rogue_servers import opened, result, rogue_server

HANG_S = 60.0
BUSY = GRPC_CODES["RESOURCE_EXHAUSTED"]


def link_to(access: Access, retries: int = 3, on_reconnect: Callable[[], None] = lambda: None) -> Link:
    return Link(
        LinkSettings(
            access=access, model="tiny", bundle_id="", client="test", connect_timeout_s=5.0, answer_timeout_s=30.0,
            retries=retries,
        ),
        lambda _point, _reason: None, on_reconnect,
    )  # fmt: skip


def busy(seq: int) -> pb.ServerMessage:
    return pb.ServerMessage(fault=pb.Fault(seq=seq, code=BUSY, message="too much to do"))


async def test_a_busy_server_is_asked_again_ever_more_slowly(tiny_bundle: Bundle) -> None:
    came: list[float] = []

    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            came.append(time.monotonic())
            seq = message.frame.seq
            await context.write(busy(seq) if len(came) <= 5 else result(seq))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(Access(address=address))
        await link.open()
        sent = await link.send("s1-r1", b"x")
        assert (await sent.answer).result.seq == sent.seq
        await link.close()
    pauses = [after - before for before, after in itertools.pairwise(came)]
    assert len(pauses) == 5
    assert all(pause >= 0.05 * 2**k for k, pause in enumerate(pauses))  # half of each pause at least


async def test_a_server_that_stays_busy_fails_the_frame_and_not_the_link(tiny_bundle: Bundle) -> None:
    async def converse(context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            seq = message.frame.seq
            await context.write(busy(seq) if seq == 1 else result(seq))

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(Access(address=address))
        await link.open()
        first, second = await link.send("s1-r1", b"x"), await link.send("s1-r1", b"y")
        assert (await second.answer).result.seq == 2
        with pytest.raises(Overloaded, match="too much to do"):
            await first.answer
        assert link.failure is None
        await link.close()


async def test_a_frame_that_waits_for_its_turn_is_not_sent_twice_over_a_new_connection(tiny_bundle: Bundle) -> None:
    came: list[int] = []
    streams = 0

    async def converse(context: Any) -> None:
        nonlocal streams
        streams += 1
        await opened(context)
        message = await context.read()
        if streams == 1:
            await context.write(busy(message.frame.seq))
            return
        came.append(message.frame.seq)
        while len(came) < 2 and isinstance(message := await asyncio.wait_for(context.read(), 2.0), pb.ClientMessage):
            came.append(message.frame.seq)

    async with rogue_server(tiny_bundle, converse) as (address, _), asyncio.timeout(HANG_S):
        link = link_to(Access(address=address), retries=1)
        await link.open()
        await link.send("s1-r1", b"x")
        await asyncio.sleep(3.0)
        await link.close()
    assert streams >= 2
    assert came == [1]


async def test_keepalives_come_more_slowly_to_a_server_that_minds_them(tiny_bundle: Bundle) -> None:
    calm = CalmServer(pb.ServerMessage(opened=pb.Opened(session_id="s-calm", window=4)), most=1)
    server = await asyncio.start_server(calm.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    reconnected = asyncio.Event()
    link = link_to(Access(address=f"{host}:{port}", keepalive_s=0.5), retries=5, on_reconnect=reconnected.set)
    try:
        async with asyncio.timeout(HANG_S):
            await link.open()
            await reconnected.wait()
            await asyncio.sleep(4.0)  # eight of the old keepalives
        assert calm.pings == [2, 0]
        assert link.failure is None
    finally:
        await link.close()
        server.close()


def test_a_slower_access_is_bounded() -> None:
    access = Access(address="127.0.0.1:1")
    assert access.slower().keepalive_s >= 300.0
    for _ in range(20):
        access = access.slower()
    assert access.keepalive_s == 3600.0
