"""Messages of the server, and what a client may read of an error."""

from bitneck.errors import BitneckError
from bitneck.v1 import inference_pb2 as pb

__all__ = ["fault", "go_away", "public_text", "set_point"]


def set_point(point: str, reason: str) -> pb.ServerMessage:
    """Ask for another operating point."""
    return pb.ServerMessage(set_point=pb.SetPoint(point=point, reason=reason))


def go_away(reason: str) -> pb.ServerMessage:
    """Announce the stream's end."""
    return pb.ServerMessage(go_away=pb.GoAway(reason=reason))


def fault(seq: int, exc: BitneckError) -> pb.ServerMessage:
    """Answer one frame with an error; seq 0 where it was no frame."""
    return pb.ServerMessage(fault=pb.Fault(seq=seq, code=exc.grpc_code, message=public_text(exc)))


def public_text(exc: BitneckError) -> str:
    """The text that a client may read: what it did wrong in full, what went wrong here in general."""
    if exc.grpc_status == "INTERNAL":
        return "an internal error; the server's log says why"
    return str(exc)
