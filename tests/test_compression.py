"""Manifests and files are compressed on their way, and a small message never becomes a large one."""

import asyncio
import contextlib
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, ProtocolError
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.compression import deflated, inflated
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.link.remote import Access, fetch_file, fetch_manifest, stub_of
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.http2 import InflatingServer
from bitneck_testing.processes import running_server

MOST = 1 << 20


@given(data=st.binary(max_size=5000))
@settings(max_examples=100, deadline=None)
def test_back_and_forth(data: bytes) -> None:
    for original in (data, data * 50):
        sent, size = deflated(original)
        assert len(sent) <= len(original)
        assert inflated(sent, size, MOST) == original


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (zlib.compress(bytes(1000)), 999),
        (zlib.compress(bytes(1000)), 1001),
        (zlib.compress(bytes(1000)) + b"x", 1000),
        (zlib.compress(bytes(1000))[:-3], 1000),
        (b"no stream", 9),
        (b"", 1),
        (zlib.compress(bytes(1000)), MOST + 1),
        (bytes(MOST + 1), 0),
    ],
)
def test_what_is_refused(data: bytes, size: int) -> None:
    with pytest.raises(ProtocolError):
        inflated(data, size, MOST)


def test_a_bomb_takes_no_memory() -> None:
    bomb = zlib.compress(bytes(200 << 20))
    with pytest.raises(ProtocolError, match="another size"):
        inflated(bomb, 1000, MOST)


async def test_a_real_server_compresses_what_it_sends(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Parts of files too; and a client that does not ask gets everything as it is."""
    with running_server(tiny_bundle.root) as server:
        access = Access(address=server.grpc)
        async with access.channel() as channel:
            stub = stub_of(channel)
            offer = await fetch_manifest(stub, "", access, 5.0)
            assert offer.manifest_json == tiny_bundle.manifest_json
            reply = await stub.GetManifest(pb.GetManifestRequest(deflate=True))
            assert len(reply.manifest_json) < 0.5 * len(tiny_bundle.manifest_json)
            assert reply.size == len(tiny_bundle.manifest_json)
            plain = await stub.GetManifest(pb.GetManifestRequest())
            assert (plain.manifest_json, plain.size) == (tiny_bundle.manifest_json, 0)
            for path in tiny_bundle.manifest.files_for("edge"):
                data = tiny_bundle.path(path).read_bytes()
                for offset, length in ((0, 0), (7, 0), (5, 100), (len(data), 0)):
                    chunks = fetch_file(
                        stub, offer.model, offer.bundle_id, path, access, 5.0, offset=offset, length=length
                    )
                    async with contextlib.aclosing(chunks):
                        got = b"".join([chunk async for chunk in chunks])
                    assert got == data[offset : offset + length if length else None], path
        await fetch_bundle(EdgeSettings.load({"server": server.grpc, "cache_dir": tmp_path}))


async def test_a_message_that_grpc_would_inflate_is_refused() -> None:
    gigantic = pb.GetManifestResponse(model="tiny", bundle_id="x", manifest_json=bytes(8 << 20))
    server = await asyncio.start_server(InflatingServer(gigantic).serve, "127.0.0.1", 0)
    access = Access(address=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with server, access.channel(64 << 20) as channel:
        with pytest.raises(BitneckError):
            await fetch_manifest(stub_of(channel), "", access, 10.0)
