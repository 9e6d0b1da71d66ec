"""Errors as clients see them: their own errors in full, and no details of the server's."""

from bitneck.errors import BitneckError
from bitneck.wire.messages import Fault

__all__ = ["fault_of", "public_text"]


def public_text(exc: BitneckError) -> str:
    """The text that a client may read. Details of internal errors are only in the log."""
    if exc.grpc_status == "INTERNAL":
        return "an internal error; the server's log says why"
    return str(exc)


def fault_of(seq: int, exc: BitneckError) -> Fault:
    """The answer to a frame that failed; `seq` is 0 if the message was no frame."""
    return Fault(seq, exc.grpc_code, public_text(exc))
