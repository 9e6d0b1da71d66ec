"""A server that has another bundle: the client's session is replaced as a whole, or not at all."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import BundleCorrupt, BundleMismatch, Unavailable, UnknownPoint
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_testing.photographs import photo
from bitneck_testing.rogue_servers import Rogue, answer_all, opened, result, rogue_server
from bitneck_testing.tiny_bundles import make_tiny_bundle

HANG_S = 60.0


def settings(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache", "retries": 1, "connect_timeout_s": 2.0, "threads": 1} | values


class Changing:
    """A server whose bundle is replaced after a number of frames; it refuses sessions that were opened with the old."""

    def __init__(self, new: Bundle, after: int) -> None:
        self.new, self.after = new, after
        self.rogue: Rogue
        self.changed = False

    async def converse(self, context: Any) -> None:
        if not self.changed:
            await self._until_it_changes(context)
        elif self.rogue.streams == 2:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this server has another bundle")
        else:
            await answer_all(context)

    async def _until_it_changes(self, context: Any) -> None:
        await opened(context)
        while isinstance(message := await context.read(), pb.ClientMessage):
            if not self.after:
                self.rogue.bundle, self.changed = self.new, True
                raise RuntimeError("cut")
            self.after -= 1
            await context.write(result(message.frame.seq))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("other") / "bundle", seed=7)


async def test_a_session_is_replaced_as_a_whole(tiny_bundle: Bundle, other: Bundle, tmp_path: Path) -> None:
    server = Changing(other, after=10)
    async with rogue_server(tiny_bundle, server.converse) as (address, server.rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **settings(tmp_path, point="s1-r1")) as client:
            client.point = "s2-r1"
            results = [r async for r in client.stream([photo(k % 4) for k in range(30)])]
            assert client.bundle.bundle_id == other.bundle_id
            assert client.encoder.bundle is client.bundle
            assert (client.point, client.auto, client.failure) == ("s2-r1", False, None)
            assert client.reconnects == 2  # one in vain, which told of the other bundle, and the new session
    assert all(isinstance(r, Answer) and r.point == "s2-r1" for r in results)
    assert len(results) == 30


async def test_a_renewal_that_fails_leaves_the_old_session(tiny_bundle: Bundle, other: Bundle, tmp_path: Path) -> None:
    """The new bundle arrives damaged: that is the error of this photograph and at once of all that follow."""
    server = Changing(other, after=1)

    def spoil(path: str, data: bytes) -> bytes:
        return data[:-1] if server.changed and path.endswith(".onnx") else data

    async with rogue_server(tiny_bundle, server.converse, spoil) as (address, server.rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            session = client.session_id
            await client.infer(photo())
            with pytest.raises(BundleCorrupt):
                await client.infer(photo())
            assert isinstance(client.failure, BundleCorrupt)
            assert (client.bundle.bundle_id, client.session_id) == (tiny_bundle.bundle_id, session)
            assert client.reconnects == 1
            fetched = len(server.rogue.fetched)
            rest = [r async for r in client.stream([photo()] * 20)]
            assert {type(r.error) for r in rest if isinstance(r, Failure)} == {BundleCorrupt}
            assert (len(rest), len(server.rogue.fetched), client.reconnects) == (20, fetched, 1)


async def test_a_renewal_is_tried_again_while_the_server_changes(
    tiny_bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    server, manifests = Changing(other, after=1), 0

    def spoil(path: str, data: bytes) -> bytes:
        nonlocal manifests
        manifests += server.changed and path == "manifest.json"
        return data + b" " if manifests == 1 and path == "manifest.json" else data  # of a bundle in the middle

    async with rogue_server(tiny_bundle, server.converse, spoil) as (address, server.rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **settings(tmp_path)) as client:
            await client.infer(photo())
            with pytest.raises(BundleMismatch, match="hashes to"):
                await client.infer(photo())
            assert client.failure is None
            assert (await client.infer(photo())).labels
            assert client.bundle.bundle_id == other.bundle_id
            assert client.reconnects == 2


async def test_a_pinned_bundle_is_not_replaced(tiny_bundle: Bundle, other: Bundle, tmp_path: Path) -> None:
    server = Changing(other, after=1)
    values = settings(tmp_path, bundle_id=tiny_bundle.bundle_id)
    async with rogue_server(tiny_bundle, server.converse) as (address, server.rogue), asyncio.timeout(HANG_S):
        async with EdgeClient(address, **values) as client:
            await client.infer(photo())
            with pytest.raises(BundleMismatch, match="another bundle"):
                await client.infer(photo())
            assert isinstance(client.failure, BundleMismatch)
            assert client.bundle.bundle_id == tiny_bundle.bundle_id


async def test_closing_while_the_session_is_replaced_leaves_nothing_open(
    tiny_bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    server, fetching, go_on = Changing(other, after=1), asyncio.Event(), asyncio.Event()

    async def slowly(_path: str) -> None:
        if server.changed:
            fetching.set()
            await go_on.wait()

    async with (
        rogue_server(tiny_bundle, server.converse, before_fetch=slowly) as (address, server.rogue),
        asyncio.timeout(HANG_S),
    ):
        async with EdgeClient(address, **settings(tmp_path, point="s1-r1")) as client:  # nothing in the background
            await client.infer(photo())
            second = asyncio.create_task(client.infer(photo()))
            await fetching.wait()
            await client.close()
            go_on.set()
            with pytest.raises(Unavailable, match="takes no more calls"):
                await second
            assert isinstance(client.failure, Unavailable)
            names = {task.get_name() for task in asyncio.all_tasks()}
            assert "bitneck-link" not in names


async def test_a_point_that_the_bundle_lacks(tiny_bundle: Bundle, tmp_path: Path) -> None:
    async with rogue_server(tiny_bundle) as (address, rogue):
        with pytest.raises(UnknownPoint, match="s1-r1, s2-r1, s1-r2"):
            async with EdgeClient(address, **settings(tmp_path, point="s9-r9")):
                pass
        assert rogue.streams == 0  # refused before a session was opened
        async with EdgeClient(address, **settings(tmp_path)) as client:
            before = client.point
            with pytest.raises(UnknownPoint):
                client.point = "s9-r9"
            assert client.point == before


def test_before_it_is_open(tmp_path: Path) -> None:
    client = EdgeClient("127.0.0.1:9", **settings(tmp_path, point="auto"))
    assert (client.point, client.auto, client.dropped, len(client.switches)) == ("", True, 0, 0)
    for name in ("encoder", "bundle", "session_id", "reconnects", "failure", "window"):
        with pytest.raises(Unavailable, match="inside `async with`"):
            getattr(client, name)
