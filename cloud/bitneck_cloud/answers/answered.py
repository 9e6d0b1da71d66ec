"""What the server knows of one answered frame, as plain values. Pure."""

from dataclasses import dataclass

from bitneck.wire.messages import Output

__all__ = ["Answered", "Origin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a frame came from, as its session knows it when the frame comes.

    Attributes:
        client: the client's own name, as it sent it; empty if it gave none.
        session: id of the session; that of the call for a frame without one (``Infer``).
        seq: of the frame in its session, or in its spool.
        received_us: when it came, microseconds since 1970.
        captured_us: when the picture was taken, as the client says, microseconds since 1970; 0 if unknown.
        payload_bytes: coded size.
        link_bytes: share of what crossed the device's link since its message before, both directions, up to the
            receipt of this frame; None if that is not counted.
        spool: id of the device's spool that the frame was kept in; empty for none.
        caller: who sent it, as far as that is proven: name of its certificate or token; empty for an address.
    """

    client: str
    session: str
    seq: int
    received_us: int
    captured_us: int = 0
    payload_bytes: int = 0
    link_bytes: int | None = None
    spool: str = ""
    caller: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answered frame.

    Attributes:
        origin: of the frame.
        model: id of the model.
        bundle: id of the model's bundle.
        point: operating point of the frame.
        output: the whole answer, whatever part of it the device asked for.
        queued_us: microseconds in the engine's queue.
        decode_us: of decoding.
        compute_us: of the pass.
    """

    origin: Origin
    model: str
    bundle: str
    point: str
    output: Output
    queued_us: int
    decode_us: int
    compute_us: int
