"""What the engine takes for a frame, and what the client gets for it."""

import time

from bitneck.coding.conditional_codec import Reference
from bitneck.wire.messages import Frame, Result, Timings
from bitneck_cloud.answers.answered import Origin
from bitneck_cloud.engine.job import Computed, Job
from bitneck_cloud.engine.served_model import ServedModel

__all__ = ["job_of", "origin_of", "result_of"]


def job_of(
    model: ServedModel,
    frame: Frame,
    turn: tuple[str, str],
    origin: Origin,
    *,
    reference: Reference | None = None,
    keep: bool = False,
    map_step: int = 1,
) -> Job:
    """A frame as the engine takes it; its deadline begins now. For the other arguments see `Job`."""
    deadline = time.monotonic() + frame.deadline_ms / 1e3 if frame.deadline_ms else None
    return Job(
        model, frame.point, frame.payload, deadline, reference=reference, keep=keep, turn=turn, map_step=map_step,
        origin=origin,
    )  # fmt: skip


def origin_of(
    frame: Frame, client: str, session: str, received: float, link_bytes: int | None, spool: str = "", caller: str = ""
) -> Origin:
    """Where a frame came from; `received` is in seconds since 1970. For the others see `Origin`."""
    return Origin(
        client=client,
        session=session,
        seq=frame.seq,
        received_us=round(received * 1e6),
        captured_us=frame.captured_unix_us,
        payload_bytes=len(frame.payload),
        link_bytes=link_bytes,
        spool=spool,
        caller=caller,
    )


def result_of(computed: Computed, seq: int, received: float) -> Result:
    """The answer to a frame; `received` is in seconds since 1970."""
    timings = Timings(
        received_unix_us=round(received * 1e6),
        queued_us=computed.queued_us,
        decode_us=computed.decode_us,
        compute_us=computed.compute_us,
        batch=computed.batch,
    )
    return Result(seq, computed.output, timings)
