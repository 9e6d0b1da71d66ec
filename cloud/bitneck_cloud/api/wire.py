"""Messages to protobuf and back, on the cloud's side: the only module that knows both."""

from google.protobuf.message import DecodeError

from bitneck.errors import MalformedFrame
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import check_frame
from bitneck.wire.messages import (
    Classification,
    ClientMessage,
    CodedMap,
    Fault,
    Frame,
    GoAway,
    Open,
    Opened,
    Output,
    Result,
    ServerMessage,
    SetPoint,
)
from bitneck.wire.scores import packed_scores

__all__ = ["SERVICE", "frame_from_wire", "from_wire", "parse_frame", "result_to_wire", "to_wire"]

SERVICE = pb.DESCRIPTOR.services_by_name["SplitInference"].full_name
"""The service's name, with its package."""


def from_wire(message: pb.ClientMessage) -> ClientMessage | None:
    """A message of a client; None if it is empty. Nothing of it is checked yet."""
    match message.WhichOneof("message"):
        case "frame":
            return frame_from_wire(message.frame)
        case "open":
            opening = message.open
            return Open(
                model=opening.model,
                bundle_id=opening.bundle_id,
                client=opening.client,
                resume_token=opening.resume_token,
                references=opening.references,
                brief=opening.brief,
            )
        case _:
            return None


def frame_from_wire(frame: pb.Frame) -> Frame:
    """A frame of a client. Nothing of it is checked yet."""
    return Frame(
        seq=frame.seq,
        point=frame.point,
        payload=frame.payload,
        crc32c=frame.crc32c,
        deadline_ms=frame.deadline_ms,
        captured_unix_us=frame.captured_unix_us,
        reference=frame.reference,
        position=frame.position if not frame.point else 0,
    )


def parse_frame(data: bytes, where: str) -> Frame:
    """Read a frame from a file that `bitneck-edge encode` wrote: one serialized ``Frame``.

    Args:
        data: the file's bytes.
        where: the file's name, for the error message.

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


def to_wire(message: ServerMessage) -> pb.ServerMessage:
    """The protobuf message of what the cloud says."""
    match message:
        case Result():
            return pb.ServerMessage(result=result_to_wire(message))
        case Fault(seq, code, text):
            return pb.ServerMessage(fault=pb.Fault(seq=seq, code=code, message=text))
        case SetPoint(point, reason):
            return pb.ServerMessage(set_point=pb.SetPoint(point=point, reason=reason))
        case GoAway(reason):
            return pb.ServerMessage(go_away=pb.GoAway(reason=reason))
        case Opened():
            return pb.ServerMessage(
                opened=pb.Opened(
                    session_id=message.session_id,
                    resume_token=message.resume_token,
                    window=message.window,
                    point=message.point,
                    references=message.references,
                )
            )


def result_to_wire(result: Result) -> pb.Result:
    """The protobuf message of an answer."""
    timings = result.timings
    return pb.Result(
        seq=result.seq,
        output=_output(result.output) if result.output is not None else None,
        timings=pb.Timings(
            received_unix_us=timings.received_unix_us,
            queued_us=timings.queued_us,
            decode_us=timings.decode_us,
            compute_us=timings.compute_us,
            batch=timings.batch,
        ),
    )


def _output(output: Output) -> pb.Output:
    match output:
        case Classification(labels) if labels and not any(label.name for label in labels):
            scores = packed_scores([label.score for label in labels])
            indices = [label.index for label in labels]
            return pb.Output(classification=pb.Classification(index=indices, scores=scores))
        case Classification(labels):
            found = [pb.Label(index=label.index, name=label.name, score=label.score) for label in labels]
            return pb.Output(classification=pb.Classification(labels=found))
        case CodedMap():
            shares = [pb.ClassShare(index=c.index, name=c.name, share=c.share) for c in output.classes]
            return pb.Output(
                segmentation=pb.Segmentation(height=output.height, width=output.width, map=output.map, classes=shares)
            )
