"""Requests that are no protobuf get INVALID_ARGUMENT, or a fault in a stream. gRPC would end them as UNKNOWN.

gRPC parses a message before any handler sees it. An exception there ends the call, with a traceback in the log. So the
parser here returns a mark instead of raising, and the handler gets a `MalformedFrame`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError

from bitneck.errors import MalformedFrame
from bitneck_cloud.aborting import abort

__all__ = ["TolerantParsing"]

_UNPARSED = object()
_OURS = "/bitneck."


def _malformed() -> MalformedFrame:
    return MalformedFrame("the message is no protobuf of this call; see proto/bitneck/v2")


class _Messages(AsyncIterator[Any]):
    """A stream's messages. A message that cannot be parsed raises; the next one can still be taken."""

    def __init__(self, source: AsyncIterator[Any]) -> None:
        self._source = aiter(source)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        message = await anext(self._source)
        if message is _UNPARSED:
            raise _malformed()
        return message


class TolerantParsing(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own service."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler, with a parser that does not raise."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OURS):
            return handler
        parse = _tolerant(handler.request_deserializer)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(handler.stream_stream), parse, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _unary(handler.unary_stream), parse, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), parse, handler.response_serializer)


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _UNPARSED

    return parsed


async def _refuse(context: Any) -> None:
    await abort(context, _malformed())


def _unary(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        if request is _UNPARSED:
            await _refuse(context)
        return await behaviour(request, context)

    return checked


def _streaming(behaviour: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
    async def checked(requests: AsyncIterator[Any], context: Any) -> None:
        await behaviour(_Messages(requests), context)

    return checked
