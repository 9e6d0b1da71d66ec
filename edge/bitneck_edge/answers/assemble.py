"""One photograph's answer: what the cloud found, what was sent, and how long each stage took."""

from collections.abc import Sequence

from bitneck.manifest import Manifest
from bitneck.wire.frames import crc32c_hex
from bitneck.wire.messages import Answers
from bitneck_edge.answers.results import Answer, StageTimes
from bitneck_edge.answers.verify import labels_of, segmentation_of
from bitneck_edge.encoder import EncodedPhoto
from bitneck_edge.link.sent import Received, Sent
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool.known import KnownBundle
from bitneck_edge.spool.segment import Kept

__all__ = ["answer_of", "spooled_answer_of"]


def answer_of(
    capture: Capture,
    encoded: EncodedPhoto,
    sent: Sent,
    received: Received,
    manifest: Manifest,
    names: Sequence[str],
    answers: Answers = Answers.ALL,
) -> Answer:
    """Put together one photograph's answer.

    Args:
        capture: the photograph, and when it was taken.
        encoded: what the encoder made of it.
        sent: the frame.
        received: the cloud's result, and when it came.
        manifest: of the bundle in use.
        names: of the classes, by index.
        answers: what the cloud was asked for.

    Raises:
        ProtocolError: see `labels_of` and `segmentation_of`.
    """
    answered = answers is not Answers.NONE
    segmented = manifest.task == "segmentation"
    queued, decode, compute = received.result.stages_ms if answered else (0.0, 0.0, 0.0)
    round_trip = (received.at - received.sent_at) * 1e3
    edge = encoded.load_ms + encoded.preprocess_ms + encoded.head_ms + encoded.encode_ms
    wait = max(0.0, (received.sent_at - capture.at) * 1e3 - edge)
    payload = sent.payload
    pixels = manifest.input.pixels
    return Answer(
        file=capture.name,
        seq=sent.seq,
        point=encoded.point,
        split=encoded.split,
        payload_bytes=len(payload),
        reference=sent.reference,
        message_bytes=received.message_bytes,
        link_bytes_up=received.link.up,
        link_bytes_down=received.link.down,
        bpp_payload=len(payload) * 8 / pixels,
        bpp_wire=received.message_bytes * 8 / pixels,
        payload_crc32c=crc32c_hex(payload),
        symbols_crc32c=crc32c_hex(encoded.encoded.symbols.astype("<i4", copy=False).tobytes()),
        task=manifest.task,
        labels=labels_of(received.result, names) if answered and not segmented else (),
        segmentation=segmentation_of(received.result, manifest, names, answers) if answered and segmented else None,
        ms=StageTimes(
            wait=wait,
            load=encoded.load_ms,
            preprocess=encoded.preprocess_ms,
            head=encoded.head_ms,
            encode=encoded.encode_ms,
            link=max(0.0, round_trip - queued - decode - compute),
            queued=queued,
            decode=decode,
            compute=compute,
            total=wait + edge + round_trip,
        ),
    )


def spooled_answer_of(
    frame: Kept, spool: str, sent: Sent, received: Received, known: KnownBundle, answers: Answers = Answers.ALL
) -> Answer:
    """Put together the answer to a frame of a spool.

    Args:
        frame: as it was kept.
        spool: id of the spool.
        sent: the frame.
        received: the cloud's result, and when it came.
        known: manifest and labels of the bundle that coded it.
        answers: what the cloud was asked for.

    Raises:
        ProtocolError: see `labels_of` and `segmentation_of`.
    """
    manifest, answered = known.manifest, answers is not Answers.NONE
    segmented = manifest.task == "segmentation"
    queued, decode, compute = received.result.stages_ms if answered else (0.0, 0.0, 0.0)
    round_trip = (received.at - received.sent_at) * 1e3
    split = manifest.ladder[frame.point].split if frame.point in manifest.ladder else ""
    return Answer(
        file=frame.name,
        seq=frame.seq,
        point=frame.point,
        split=split,
        payload_bytes=len(frame.payload),
        reference=sent.reference,
        message_bytes=received.message_bytes,
        link_bytes_up=received.link.up,
        link_bytes_down=received.link.down,
        bpp_payload=len(frame.payload) * 8 / manifest.input.pixels,
        bpp_wire=received.message_bytes * 8 / manifest.input.pixels,
        payload_crc32c=crc32c_hex(frame.payload),
        symbols_crc32c="",
        task=manifest.task,
        labels=labels_of(received.result, known.labels) if answered and not segmented else (),
        segmentation=segmentation_of(received.result, manifest, known.labels, answers)
        if answered and segmented
        else None,
        ms=StageTimes(
            wait=0.0,
            load=0.0,
            preprocess=0.0,
            head=0.0,
            encode=0.0,
            link=max(0.0, round_trip - queued - decode - compute),
            queued=queued,
            decode=decode,
            compute=compute,
            total=round_trip,
        ),
        spool=spool,
        captured_unix_us=frame.captured_unix_us,
    )
