"""The client at the other end of a gRPC stream: messages as plain values, counted as they go by."""

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator
from typing import Any, Self
from urllib.parse import unquote

import grpc

from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.link_bytes import LinkMeter
from bitneck.wire.messages import ClientMessage, Leave, ServerMessage
from bitneck_cloud.api.wire import from_wire, to_wire

__all__ = ["Context", "GrpcPeer"]

Context = grpc.aio.ServicerContext[Any, Any]


class _Messages(AsyncIterator[ClientMessage | None]):
    """A stream's messages as values. An error of one message does not end the iterator."""

    def __init__(self, source: AsyncIterator[pb.ClientMessage]) -> None:
        self._source = aiter(source)
        self.meter: LinkMeter | None = None
        self.most_frames = 1 << 10
        self.left = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ClientMessage | None:
        try:
            message = await anext(self._source)
        except grpc.aio.UsageError as exc:
            raise ConnectionResetError("the stream is over") from exc
        if self.meter is not None:
            kind = message.WhichOneof("message")
            frames = len(message.pack.payload) if kind == "pack" else int(kind == "frame")
            self.meter.sent(message.ByteSize(), time.monotonic(), frames)
        said = from_wire(message, self.most_frames)
        if isinstance(said, Leave):
            self.left = True
            raise StopAsyncIteration
        return said


class GrpcPeer:
    """The client at the other end of a gRPC stream."""

    def __init__(self, requests: AsyncIterator[pb.ClientMessage], context: Context) -> None:
        self._messages = _Messages(requests)
        self._context = context

    def serve(self, window: int, *, tls: bool) -> LinkMeter:
        """The session is open: frames come from here on.

        Args:
            window: frames that may be unanswered, and that a pack may have.
            tls: whether the connection is encrypted.

        Returns:
            What counts the messages on the client's link from now on.
        """
        meter = LinkMeter(tls=tls, ipv6=_is_ipv6(self._context.peer()))
        self._messages.meter = meter
        self._messages.most_frames = window
        return meter

    @property
    def left(self) -> bool:
        """Whether the client has said that it never comes back to its session."""
        return self._messages.left

    def messages(self) -> AsyncIterator[ClientMessage | None]:
        """See `bitneck_cloud.sessions.conversation.Peer`."""
        return self._messages

    async def write(self, message: ServerMessage) -> None:
        """See `bitneck_cloud.sessions.conversation.Peer`."""
        try:
            sent = to_wire(message)
            if self._messages.meter is not None:
                self._messages.meter.received(sent.ByteSize(), time.monotonic())
            await self._context.write(sent)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError) as exc:
            raise ConnectionResetError("the stream is over") from exc


def _is_ipv6(peer: str) -> bool:
    """Whether packets go over IPv6, by gRPC's name of a peer. A mapped address is one of IPv4."""
    kind, _, rest = unquote(peer).partition(":")
    try:
        address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return False
    return kind == "ipv6" and isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None
