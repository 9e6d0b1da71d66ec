"""Counts the calls that each caller has open, of every service, and refuses those beyond its limit."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from bitneck.errors import BitneckError
from bitneck_cloud.aborting import abort
from bitneck_cloud.access.bearers import BearerTokens
from bitneck_cloud.access.callers import caller_of
from bitneck_cloud.access.limits import CallerLimits
from bitneck_cloud.access.security import SUBSCRIBE
from bitneck_cloud.observe.audit import RefusalLog
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["CallLimits"]

_OURS = "/bitneck."
_FETCHES = "/FetchFile"
_SUBSCRIPTIONS = "subscriptions"
_MOST_FETCHES = 8
"""Downloads of one caller at a time."""
_MOST_SUBSCRIPTIONS = 64
"""Subscriptions of one caller; HTTP has as many connections of one address."""
_MOST_OTHERS = 16
"""Health watches and reflection calls of one caller. They need no token."""


class CallLimits(grpc.aio.ServerInterceptor):
    """Wraps every handler. A call whose client is gone ends like a cancelled one, without a traceback in the log.

    Args:
        limits: of the callers.
        tokens: of the devices, to know callers by name.
        operators: tokens of the control API, to know subscribers by name.
        metrics: counts refusals.
        refusals: logs them.
    """

    def __init__(
        self,
        limits: CallerLimits,
        tokens: BearerTokens,
        operators: BearerTokens,
        metrics: Metrics,
        refusals: RefusalLog,
    ) -> None:
        self._limits = limits
        self._tokens = tokens
        self._operators = operators
        self._metrics = metrics
        self._refusals = refusals

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """The handler, counted."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind, most = "calls", None
        if not method.startswith(_OURS):
            kind, most = "others", _MOST_OTHERS
        elif method.endswith(_FETCHES):
            kind, most = "fetches", _MOST_FETCHES
        elif method.endswith(SUBSCRIBE):
            kind, most = _SUBSCRIPTIONS, _MOST_SUBSCRIPTIONS
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming:
            # Reflection's handler is a generator; ours is a coroutine that writes.
            counted = self._coroutine if method.startswith(_OURS) else self._generator
            return grpc.stream_stream_rpc_method_handler(counted(handler.stream_stream, kind, most), parse, serialize)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._coroutine(handler.unary_stream, kind, most), parse, serialize
            )
        return grpc.unary_unary_rpc_method_handler(self._coroutine(handler.unary_unary, kind, most), parse, serialize)

    def _coroutine(self, behaviour: Callable[[Any, Any], Awaitable[Any]], kind: str, most: int | None) -> Any:
        async def counted(request: Any, context: Any) -> Any:
            caller = await self._begin(context, kind, most)
            try:
                return await behaviour(request, context)
            except grpc.aio.InternalError:  # a message or status could not be written: the client is gone
                raise asyncio.CancelledError from None
            finally:
                self._limits.end(caller, kind)

        return counted

    def _generator(self, behaviour: Callable[[Any, Any], AsyncIterator[Any]], kind: str, most: int | None) -> Any:
        async def counted(request: Any, context: Any) -> AsyncIterator[Any]:
            caller = await self._begin(context, kind, most)
            try:
                async for message in behaviour(request, context):
                    yield message
            except grpc.aio.InternalError:
                raise asyncio.CancelledError from None
            finally:
                self._limits.end(caller, kind)

        return counted

    async def _begin(self, context: Any, kind: str, most: int | None) -> str:
        caller = caller_of(context, self._operators if kind == _SUBSCRIPTIONS else self._tokens).name
        try:
            self._limits.begin(caller, kind, most)
        except BitneckError as exc:
            self._metrics.refused(exc.grpc_status)
            self._refusals.refused(caller, f"{exc.grpc_status}: too many {kind}")
            await abort(context, exc)
        return caller
