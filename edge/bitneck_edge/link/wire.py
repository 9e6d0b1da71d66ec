"""Messages of a stream to protobuf and back: the one module of the edge that knows how they look on the wire."""

import math

from bitneck.text import clean_text
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import pack_positions, pack_references, pack_times
from bitneck.wire.messages import (
    Ack,
    Acknowledge,
    Classification,
    ClassShare,
    ClientMessage,
    CodedMap,
    Device,
    Fault,
    Frame,
    GoAway,
    Label,
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
    Timings,
)
from bitneck.wire.scores import unpacked_scores

__all__ = ["MAX_LABELS", "client_message", "frame_bytes", "frame_to_wire", "server_message"]

MAX_LABELS = 1024
"""Labels or classes of an answer; a server has no reason to send more, and a class map cannot name as many."""
_MAX_RESULTS = 1024
"""Answers in one message; a server has no reason to send more."""
_MAX_ID, _MAX_NAME = 80, 200
_MAX_US = (1 << 32) - 1
_MAX_TOKEN = 4096
"""A longer resume token is not kept: the message that resumes with it could not be sent."""


def client_message(message: ClientMessage) -> pb.ClientMessage:
    """The protobuf message of what a client sends."""
    match message:
        case Frame():
            return pb.ClientMessage(frame=frame_to_wire(message))
        case Pack():
            return pb.ClientMessage(pack=_pack_to_wire(message))
        case Open():
            return pb.ClientMessage(open=_open_to_wire(message))
        case Acknowledge():
            return pb.ClientMessage(acknowledge=pb.Acknowledge())
        case Leave():
            return pb.ClientMessage(leave=pb.Leave())
        case Device():
            return pb.ClientMessage(device=_device_to_wire(message))


def frame_to_wire(frame: Frame) -> pb.Frame:
    """The protobuf message of a frame."""
    return pb.Frame(
        seq=frame.seq,
        point="" if frame.position else frame.point,
        payload=frame.payload,
        crc32c=frame.crc32c,
        deadline_ms=frame.deadline_ms,
        captured_unix_us=frame.captured_unix_us,
        reference=frame.reference,
        position=frame.position,
        acknowledge=frame.acknowledge,
    )


def _pack_to_wire(pack: Pack) -> pb.Pack:
    return pb.Pack(
        seq=pack.frames[0].seq,
        payload=[frame.payload for frame in pack.frames],
        crc32c=[frame.crc32c for frame in pack.frames],
        position=pack_positions(pack),
        reference=pack_references(pack),
        captured_unix_us=pack_times(pack),
        deadline_ms=pack.frames[0].deadline_ms,
        acknowledge=any(frame.acknowledge for frame in pack.frames),
    )


def frame_bytes(frame: Frame) -> bytes:
    """A frame as `bitneck-edge encode` writes it to a file: one serialized ``Frame``."""
    return frame_to_wire(frame).SerializeToString()


def server_message(message: object) -> ServerMessage | None:
    """What the cloud sent. Its texts are cleaned and its lists cut; nothing else of it is checked yet.

    Args:
        message: what the stream gave: a ``pb.ServerMessage``.

    Returns:
        The message; None if it is of a kind that this version does not know.
    """
    assert isinstance(message, pb.ServerMessage)
    match message.WhichOneof("message"):
        case "result":
            return _result(message.result)
        case "results":
            return Results(tuple(_result(result) for result in message.results.result[:_MAX_RESULTS]))
        case "ack":
            return Ack(message.ack.seq, message.ack.before, message.ack.cloud_us)
        case "fault":
            return Fault(message.fault.seq, message.fault.code, clean_text(message.fault.message))
        case "set_point":
            asked = message.set_point
            return SetPoint(clean_text(asked.point, _MAX_ID), clean_text(asked.reason), _rate(asked.max_kbps))
        case "opened":
            return _opened(message.opened)
        case "go_away":
            return GoAway(clean_text(message.go_away.reason))
        case "new_bundle":
            return NewBundle(clean_text(message.new_bundle.bundle_id, _MAX_ID), clean_text(message.new_bundle.reason))
    return None


def _open_to_wire(message: Open) -> pb.Open:
    return pb.Open(
        model=message.model,
        bundle_id=message.bundle_id,
        client=message.client,
        resume_token=message.resume_token,
        references=message.references,
        brief=message.brief,
        answers=f"ANSWERS_{message.answers.name}",
        spool=message.spool,
        follows=message.follows,
    )


def _device_to_wire(device: Device) -> pb.Device:
    return pb.Device(
        pictures=device.pictures,
        answered=device.answered,
        failed=device.failed,
        dropped=device.dropped,
        reconnects=device.reconnects,
        unanswered=device.unanswered,
        head_us=min(device.head_us, _MAX_US),
        encode_us=min(device.encode_us, _MAX_US),
        answer_us=min(device.answer_us, _MAX_US),
        temperature=None if device.temperature_c is None else round(device.temperature_c * 10),
    )


def _opened(message: pb.Opened) -> Opened:
    return Opened(
        session_id=clean_text(message.session_id, _MAX_ID),
        resume_token=message.resume_token if len(message.resume_token) <= _MAX_TOKEN else "",
        window=message.window,
        point=clean_text(message.point, _MAX_ID),
        references=message.references,
        max_kbps=_rate(message.max_kbps),
    )


def _rate(kbps: float) -> float:
    """A rate that a server asks for; 0, which is no limit, for one that is none."""
    return kbps if math.isfinite(kbps) and kbps > 0 else 0.0


def _result(message: pb.Result) -> Result:
    if not message.HasField("timings"):
        return Result(message.seq, _output(message.output), None, message.cloud_us)
    timings = Timings(
        received_unix_us=message.timings.received_unix_us,
        queued_us=message.timings.queued_us,
        decode_us=message.timings.decode_us,
        compute_us=message.timings.compute_us,
        batch=message.timings.batch,
    )
    return Result(message.seq, _output(message.output), timings)


def _output(message: pb.Output) -> Output | None:
    match message.WhichOneof("output"):
        case "classification":
            if message.classification.index:
                return _brief(message.classification)
            labels = message.classification.labels[:MAX_LABELS]
            return Classification(tuple(Label(x.index, clean_text(x.name, _MAX_NAME), x.score) for x in labels))
        case "segmentation":
            coded = message.segmentation
            if not coded.map and not coded.height:
                return Shares(_shares(coded))
            return CodedMap(
                height=coded.height,
                width=coded.width,
                map=coded.map,
                classes=_shares(coded),
                step=coded.step or 1,
            )
    return None


def _shares(message: pb.Segmentation) -> tuple[ClassShare, ...]:
    """Classes with their shares; none if there are not as many shares as indices."""
    if not message.index:
        return tuple(ClassShare(x.index, clean_text(x.name, _MAX_NAME), x.share) for x in message.classes[:MAX_LABELS])
    indices, shares = message.index[:MAX_LABELS], unpacked_scores(message.shares[: 2 * MAX_LABELS])
    if len(indices) != len(shares):
        return ()
    return tuple(ClassShare(index, "", share) for index, share in zip(indices, shares, strict=True))


def _brief(message: pb.Classification) -> Classification:
    """Labels without names; none if there are not as many scores as indices."""
    indices, scores = message.index[:MAX_LABELS], unpacked_scores(message.scores[: 2 * MAX_LABELS])
    if len(indices) != len(scores):
        return Classification(())
    return Classification(tuple(Label(index, "", score) for index, score in zip(indices, scores, strict=True)))
