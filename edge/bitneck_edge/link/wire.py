"""Messages to protobuf and back, on the edge's side."""

from bitneck.messages import Frame
from bitneck.v1 import inference_pb2 as pb

__all__ = ["frame_bytes", "frame_to_wire"]


def frame_to_wire(frame: Frame) -> pb.Frame:
    """The protobuf message of a frame."""
    return pb.Frame(
        seq=frame.seq,
        point=frame.point,
        payload=frame.payload,
        crc32c=frame.crc32c,
        deadline_ms=frame.deadline_ms,
        captured_unix_us=frame.captured_unix_us,
        reference=frame.reference,
    )


def frame_bytes(frame: Frame) -> bytes:
    """A frame as `bitneck-edge encode` writes it to a file: one serialized ``Frame``."""
    return frame_to_wire(frame).SerializeToString()
