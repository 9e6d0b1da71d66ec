"""Calls of devices that speak an older protocol: each is refused in one sentence that says what to do."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from bitneck.errors import ProtocolError
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud.aborting import abort

__all__ = ["OldProtocol"]

_OLD = "/bitneck.v1.SplitInference/"


class OldProtocol(grpc.GenericRpcHandler):
    """Takes every method of the service `bitneck.v1.SplitInference`, whether its calls stream or not."""

    def service(self, handler_call_details: Any) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler that refuses; None for other services."""
        if not handler_call_details.method.startswith(_OLD):
            return None
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_requests: AsyncIterator[bytes], context: Any) -> None:
    """No message is read: on the wire, calls that stream and calls that do not begin alike."""
    await abort(
        context,
        ProtocolError(
            f"this server speaks {pb.DESCRIPTOR.package} and the device speaks bitneck.v1: "
            "install the server's version of bitneck on the device"
        ),
    )
