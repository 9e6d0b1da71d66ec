"""Messages to protobuf and back, on the cloud's side, and what a client may read of an error."""

from google.protobuf.message import DecodeError

from bitneck.errors import BitneckError, MalformedFrame
from bitneck.frames import check_frame
from bitneck.messages import Frame
from bitneck.v1 import inference_pb2 as pb

__all__ = ["fault", "frame_from_wire", "go_away", "parse_frame", "public_text", "set_point"]


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


def frame_from_wire(frame: pb.Frame) -> Frame:
    """A frame that a client sent; nothing of it is checked yet."""
    return Frame(
        seq=frame.seq,
        point=frame.point,
        payload=frame.payload,
        crc32c=frame.crc32c,
        deadline_ms=frame.deadline_ms,
        captured_unix_us=frame.captured_unix_us,
        reference=frame.reference,
    )


def parse_frame(data: bytes, where: str) -> Frame:
    """A frame from a file that `bitneck-edge encode` wrote: one serialized ``Frame``.

    Args:
        data: the file's bytes.
        where: for the message.

    Raises:
        MalformedFrame: not a frame.
        ReferenceUnknown: it is coded against another frame.
        CorruptPayload: the CRC does not match.
    """
    message = pb.Frame()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise MalformedFrame(f"{where}: not a frame; `bitneck-edge encode` writes frames") from exc
    frame = frame_from_wire(message)
    check_frame(frame)
    return frame
