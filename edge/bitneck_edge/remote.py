"""The cloud as the edge sees it: a channel, and calls whose failures are bitneck's own errors."""

import asyncio
from collections.abc import AsyncGenerator

import grpc

from bitneck.errors import GRPC_CODES, BitneckError, DeadlineExceeded, Unavailable, error_from_status
from bitneck.frames import MAX_MESSAGE_BYTES
from bitneck.v1 import inference_pb2 as pb
from bitneck.v1 import inference_pb2_grpc as pb_grpc

__all__ = ["connect", "fetch_file", "fetch_manifest", "from_rpc_error", "stub_of"]

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 16 << 20),  # a manifest of a thousand points fits
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),  # a stream gets none anyway; the link reconnects by itself
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_LOST = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
)
"""How gRPC reports a connection that broke; another try may find a server."""


def stub_of(channel: grpc.aio.Channel) -> "pb_grpc.SplitInferenceAsyncStub":
    """The service's methods on a channel."""
    return pb_grpc.SplitInferenceStub(channel)


def connect(address: str) -> grpc.aio.Channel:
    """A channel to a server; it connects when it is first used."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def from_rpc_error(exc: grpc.aio.AioRpcError, address: str) -> BitneckError:
    """Our error for a failed call."""
    code, text = exc.code(), exc.details() or "no details"
    if code in _LOST:
        return Unavailable(f"{address}: {text}")
    return error_from_status(GRPC_CODES[code.name], text)


async def fetch_manifest(
    stub: "pb_grpc.SplitInferenceAsyncStub", model: str, address: str, timeout_s: float
) -> pb.GetManifestResponse:
    """The manifest that a server offers.

    Args:
        stub: of the server.
        model: a served model; empty for the only one.
        address: for messages.
        timeout_s: for the whole call.

    Raises:
        UnknownModel, Unavailable, BitneckError: the server's answer, or its absence.
    """
    try:
        return await stub.GetManifest(pb.GetManifestRequest(model=model), timeout=timeout_s)
    except grpc.aio.AioRpcError as exc:
        raise from_rpc_error(exc, address) from exc


async def fetch_file(
    stub: "pb_grpc.SplitInferenceAsyncStub", model: str, bundle_id: str, path: str, address: str, pause_s: float
) -> AsyncGenerator[bytes]:
    """One file of a bundle, in chunks.

    Args:
        stub: of the server.
        model: a served model.
        bundle_id: of its bundle.
        path: as the manifest lists it.
        address: for messages.
        pause_s: the longest wait for a chunk; the file as a whole may take any time, a link may be thin.

    Raises:
        DeadlineExceeded: no chunk came for so long.
        BitneckError: the server's answer, or its absence.
    """
    call = stub.FetchFile(pb.FetchFileRequest(model=model, bundle_id=bundle_id, path=path))
    try:
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    chunk = await call.read()
            except TimeoutError as exc:
                raise DeadlineExceeded(f"{address}: {path} stopped coming; waited {pause_s:.1f} s for more") from exc
            except grpc.aio.AioRpcError as exc:
                raise from_rpc_error(exc, address) from exc
            if not isinstance(chunk, pb.FileChunk):
                return
            yield chunk.data
    finally:
        call.cancel()
