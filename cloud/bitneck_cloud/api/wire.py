"""Messages to protobuf and back, on the cloud's side: the only module that knows both."""

import itertools

from google.protobuf.message import DecodeError

from bitneck.errors import MalformedFrame
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import check_frame
from bitneck.wire.messages import (
    Ack,
    Acknowledge,
    Answers,
    Classification,
    ClassShare,
    ClientMessage,
    CodedMap,
    Device,
    Fault,
    Frame,
    GoAway,
    Leave,
    NewBundle,
    Open,
    Opened,
    Output,
    Pack,
    Result,
    Results,
    ServerMessage,
    SetPoint,
    Shares,
)
from bitneck.wire.scores import packed_scores

__all__ = ["SERVICE", "frame_from_wire", "from_wire", "parse_frame", "result_to_wire", "to_wire"]

SERVICE = pb.DESCRIPTOR.services_by_name["SplitInference"].full_name
"""The service's name, with its package."""
_MOST_TENTHS = 10_000


def from_wire(message: pb.ClientMessage, most_frames: int = 1 << 10) -> ClientMessage | None:
    """A message of a client; None if it is empty. Nothing of it is checked yet, but for what a pack consists of.

    Args:
        message: as it came.
        most_frames: that a pack may have.

    Raises:
        MalformedFrame: a pack whose parts do not fit together.
    """
    match message.WhichOneof("message"):
        case "frame":
            return frame_from_wire(message.frame)
        case "open":
            opening = message.open
            if opening.answers not in pb.Answers.values():
                raise MalformedFrame(f"answers {opening.answers} are unknown to this server; ask for all or none")
            return Open(
                model=opening.model,
                bundle_id=opening.bundle_id,
                client=opening.client,
                resume_token=opening.resume_token,
                references=opening.references,
                brief=opening.brief,
                answers=Answers[pb.Answers.Name(opening.answers).removeprefix("ANSWERS_")],
                spool=opening.spool,
                follows=opening.follows,
            )
        case "pack":
            return _pack(message.pack, most_frames)
        case "acknowledge":
            return Acknowledge()
        case "leave":
            return Leave()
        case "device":
            return _device(message.device)
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
        acknowledge=frame.acknowledge,
    )


def _device(device: pb.Device) -> Device:
    """How a client's device is. A temperature that nothing survives is left out."""
    known = device.HasField("temperature") and abs(device.temperature) <= _MOST_TENTHS
    return Device(
        pictures=device.pictures,
        answered=device.answered,
        failed=device.failed,
        dropped=device.dropped,
        reconnects=device.reconnects,
        unanswered=device.unanswered,
        head_us=device.head_us,
        encode_us=device.encode_us,
        answer_us=device.answer_us,
        temperature_c=device.temperature / 10 if known else None,
    )


def _pack(pack: pb.Pack, most_frames: int) -> Pack:
    """The frames of a pack."""
    count = len(pack.payload)
    if not 1 <= count <= most_frames or pack.seq == 0 or pack.seq + count > 1 << 64:
        raise MalformedFrame(
            f"a pack of {count} frames from seq {pack.seq}: a pack has 1 to {most_frames} frames, counting from 1"
        )
    lists = len(pack.crc32c), len(pack.position), len(pack.reference), len(pack.captured_unix_us)
    if lists[0] != count or lists[1] not in (1, count) or any(each not in (0, count) for each in lists[2:]):
        raise MalformedFrame(
            f"a pack of {count} payloads has {lists[0]} CRCs, {lists[1]} positions, {lists[2]} references and "
            f"{lists[3]} times"
        )
    positions = list(pack.position) * count if len(pack.position) == 1 else list(pack.position)
    references = list(pack.reference) or [0] * count
    times = [max(0, time) for time in itertools.accumulate(pack.captured_unix_us)] or [0] * count
    frames = (
        Frame(
            seq=pack.seq + place,
            point="",
            payload=payload,
            crc32c=pack.crc32c[place],
            deadline_ms=pack.deadline_ms,
            captured_unix_us=times[place],
            reference=references[place],
            position=positions[place],
            acknowledge=pack.acknowledge and place == count - 1,
        )
        for place, payload in enumerate(pack.payload)
    )
    return Pack(tuple(frames))


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
        case Results(results):
            return pb.ServerMessage(results=pb.Results(result=[result_to_wire(result) for result in results]))
        case Ack(seq, before, cloud_us):
            return pb.ServerMessage(ack=pb.Ack(seq=seq, before=before, cloud_us=cloud_us))
        case Fault(seq, code, text):
            return pb.ServerMessage(fault=pb.Fault(seq=seq, code=code, message=text))
        case SetPoint(point, reason, max_kbps):
            return pb.ServerMessage(set_point=pb.SetPoint(point=point, reason=reason, max_kbps=max_kbps))
        case GoAway(reason):
            return pb.ServerMessage(go_away=pb.GoAway(reason=reason))
        case NewBundle(bundle_id, reason):
            return pb.ServerMessage(new_bundle=pb.NewBundle(bundle_id=bundle_id, reason=reason))
        case Opened():
            return pb.ServerMessage(
                opened=pb.Opened(
                    session_id=message.session_id,
                    resume_token=message.resume_token,
                    window=message.window,
                    point=message.point,
                    references=message.references,
                    max_kbps=message.max_kbps,
                )
            )


def result_to_wire(result: Result) -> pb.Result:
    """The protobuf message of an answer."""
    output = _output(result.output) if result.output is not None else None
    timings = result.timings
    if timings is None:
        return pb.Result(seq=result.seq, output=output, cloud_us=result.cloud_us)
    return pb.Result(
        seq=result.seq,
        output=output,
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
            named = [pb.Label(index=label.index, name=label.name, score=label.score) for label in labels]
            return pb.Output(classification=pb.Classification(labels=named))
        case CodedMap():
            coded = pb.Segmentation(
                height=output.height,
                width=output.width,
                map=output.map,
                classes=_shares(output.classes),
                step=output.step if output.step > 1 else 0,
            )
            return pb.Output(segmentation=coded)
        case Shares(classes) if classes and not any(share.name for share in classes):
            found = pb.Segmentation(
                index=[share.index for share in classes], shares=packed_scores([share.share for share in classes])
            )
            return pb.Output(segmentation=found)
        case Shares(classes):
            return pb.Output(segmentation=pb.Segmentation(classes=_shares(classes)))


def _shares(classes: tuple[ClassShare, ...]) -> list[pb.ClassShare]:
    return [pb.ClassShare(index=share.index, name=share.name, share=share.share) for share in classes]
