"""The end of a gRPC call with one of bitneck's errors."""

from typing import Any, NoReturn

import grpc

from bitneck.errors import BitneckError
from bitneck_cloud.faults import public_text

__all__ = ["abort"]


async def abort(context: Any, exc: BitneckError) -> NoReturn:
    """End a call. If its client reads nothing, this waits until it does, or is gone.

    Args:
        context: of the call.
        exc: what went wrong; the client gets its status and its public text.

    Raises:
        grpc.aio.AbortError: always, unless the client is gone.
        grpc.aio.InternalError: the client is gone.
    """
    await context.abort(grpc.StatusCode[exc.grpc_status], public_text(exc))
    raise AssertionError("abort raises")
