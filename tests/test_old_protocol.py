"""Devices and servers of different versions: each is told what to do. Real servers, real sockets."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import ProtocolError
from bitneck.v2 import inference_pb2 as pb
from bitneck_edge.client import EdgeClient
from bitneck_testing.photographs import photo
from bitneck_testing.processes import running_server

OLD = "/bitneck.v1.SplitInference/"
MANIFEST_REQUEST = pb.GetManifestRequest(model="tiny").SerializeToString()
"""Its bytes are those of bitneck.v1 too."""


async def test_devices_of_bitneck_v1_are_told_to_update(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root) as server:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            calls: list[Any] = [
                channel.unary_unary(OLD + "GetManifest")(MANIFEST_REQUEST),
                channel.unary_stream(OLD + "FetchFile")(MANIFEST_REQUEST).read(),
                channel.unary_unary(OLD + "Infer")(b"\xff\xff"),
                channel.stream_stream(OLD + "Stream")(iter([MANIFEST_REQUEST])).read(),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                text = caught.value.details() or ""
                assert "speaks bitneck.v2" in text
                assert "install the server's version" in text
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/bitneck.v3.SplitInference/Infer")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        async with EdgeClient(server.grpc, cache_dir=tmp_path) as client:
            assert (await client.infer(photo(0))).labels


async def test_a_server_without_bitneck_v2_is_named(tmp_path: Path) -> None:
    """A server of bitneck.v1 answers a call of bitneck.v2 as any other gRPC server does."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(ProtocolError, match=r"does not speak bitneck\.v2.*install the same version"):
            async with EdgeClient(f"127.0.0.1:{port}", cache_dir=tmp_path):
                pass
    finally:
        await server.stop(None)
