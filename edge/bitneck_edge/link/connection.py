"""One connection to the cloud: a gRPC stream whose messages are plain values and whose failures are bitneck's errors.

A `Connection` knows nothing of sessions or frames; `bitneck_edge.link.link.Link` opens one after another.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

import grpc
from google.protobuf.message import Message

from bitneck.errors import BitneckError, Unavailable
from bitneck.wire.link_bytes import LinkMeter
from bitneck.wire.messages import ClientMessage, Frame, Leave, Pack, ServerMessage
from bitneck_edge.link.remote import MAX_ANSWER_BYTES, Access, Call, from_rpc_error, stub_of
from bitneck_edge.link.wire import client_message, server_message

__all__ = ["Connection", "connect"]

_LOG = logging.getLogger(__name__)
_LAST_WRITE_S = 1.0


@contextlib.asynccontextmanager
async def connect(
    access: Access, timeout_s: float, most_bytes: int = MAX_ANSWER_BYTES, *, patient: bool = False
) -> AsyncGenerator["Connection"]:
    """A connection to the server, closed at the end of the block.

    Args:
        access: to the server.
        timeout_s: for connecting.
        most_bytes: of a message of the server.
        patient: see `Access.connected`.

    Raises:
        Unavailable: no server in time.
        InvalidConfig: a certificate or key cannot be used.
    """
    async with access.channel(most_bytes) as channel:
        await access.connected(channel, timeout_s, patient=patient)
        call = stub_of(channel).Stream(metadata=access.metadata)
        try:
            yield Connection(call, access)
        finally:
            call.cancel()


class Connection:
    """One stream, from connecting to its end. One task reads; any task may write, one at a time.

    Attributes:
        meter: counts the messages on the link, from `begin` on.

    Args:
        call: the stream.
        access: to the server.
    """

    def __init__(self, call: Call, access: Access) -> None:
        self._call = call
        self._access = access
        self._address = access.address
        self._abandoned: BitneckError | None = None
        self.meter = LinkMeter()

    def begin(self) -> None:
        """The session is open: count from here on."""
        ipv6 = self._address.startswith("[")  # a host's name counts as IPv4
        self.meter = LinkMeter(tls=self._access.tls, ipv6=ipv6, keepalive_s=self._access.keepalive_s)

    async def write(self, message: ClientMessage) -> None:
        """Send a message. It raises nothing if the stream is over: `read` raises the reason."""
        sent = client_message(message)
        frames = len(message.frames) if isinstance(message, Pack) else int(isinstance(message, Frame))
        self.meter.sent(sent.ByteSize(), time.perf_counter(), frames)
        try:
            await self._call.write(sent)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            _LOG.debug("a message was not written: the stream is over")
        except asyncio.CancelledError:
            if _being_cancelled():
                raise

    async def read(self) -> ServerMessage | None:
        """The next message; None for one of a kind that this version does not know.

        Raises:
            Unavailable: the stream has ended, or the connection is lost.
            BitneckError: the error of `abandon`, or the status that the server ended the stream with.
        """
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as exc:
            raise self._abandoned or from_rpc_error(exc, self._address) from exc
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            # gRPC cancels a whole call if the task of one write is cancelled.
            error = self._abandoned or Unavailable(
                f"{self._address}: the stream was cancelled in the middle of a write"
            )
            raise error from None
        if message is grpc.aio.EOF:
            raise Unavailable(f"{self._address}: the server ended the stream")
        assert isinstance(message, Message)
        self.meter.received(message.ByteSize(), time.perf_counter())
        return server_message(message)

    def abandon(self, error: BitneckError) -> None:
        """End the stream now; `read` raises `error`."""
        self._abandoned = error
        self._call.cancel()

    async def finish(self, *, leave: bool = False) -> None:
        """Tell the server that nothing more will be sent; waits a second at most.

        Args:
            leave: also that nobody comes back to the session.
        """
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_LAST_WRITE_S):
                if leave:
                    await self.write(Leave())
                await self._call.done_writing()


def _being_cancelled() -> bool:
    """Whether the running task is cancelled: gRPC raises `CancelledError` too when another task cancelled the call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
