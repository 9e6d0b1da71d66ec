"""What a frame costs this device: time of each stage, processor time and memory, for every split point."""

import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck.ladder import most_accurate
from bitneck.wire.link_bytes import USUAL_ANSWER, LinkBytes, LinkMeter, beside_payload
from bitneck_edge.encoder import EdgeEncoder, Photo
from bitneck_edge.measure.memory import peak_mib

__all__ = ["STAGES", "bench", "ways_to_send"]

STAGES = ("load", "preprocess", "head", "encode")
_WARM = 3
_FPS = 5.0
_ACK_BYTES, _ACKNOWLEDGED = 9, 8
"""Bytes of an acknowledgement, and its frames."""


def bench(
    bundle: Bundle, photos: Sequence[Photo], *, frames: int = 50, threads: int = 0, exact: bool = False
) -> dict[str, Any]:
    """Encode photographs one after another, at the best point of every split point; nothing is sent.

    Processor time counts all threads. It is the best measure of the battery's share that a program has.

    Args:
        bundle: the edge's half.
        photos: at least one; used in turn.
        frames: for each split point, after three to warm up.
        threads: of ONNX Runtime inside one operator of the head; 0 for every core.
        exact: see `EdgeSettings`.

    Returns:
        ``splits``: for each, its point, median milliseconds of each stage and of all together, the 95th percentile of
        all together, milliseconds of processor time for each frame, mean payload bytes, frames a second; and ``link``,
        link bytes of such a frame by `ways_to_send`. ``precision``, what heads and encoders compute in. ``peak_mb``:
        peak of resident memory.

    Raises:
        InvalidConfig: there are no photographs, or less than one frame is asked for.
        ImageError, ModelFailure, BundleError: see `EdgeEncoder`.
    """
    if not photos or frames < 1:
        raise InvalidConfig("a bench needs at least one photograph and one frame")
    encoder = EdgeEncoder(bundle, threads=threads, exact=exact)
    splits: list[dict[str, Any]] = []
    for split in [s.name for s in bundle.manifest.split_points]:
        points = [point for point in encoder.ladder if point.split == split]
        if not points:
            continue
        point = most_accurate(points)
        for k in range(_WARM):
            encoder.encode(photos[k % len(photos)], point.id)
        begin, cpu = time.perf_counter(), time.process_time()
        measured = [_measure(encoder, photos[k % len(photos)], point.id) for k in range(frames)]
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        totals = sorted(sum(times) for times, _ in measured)
        payload_bytes = fmean(size for _, size in measured)
        splits.append(
            {
                "split": split,
                "point": point.id,
                "ms": {stage: median(times[k] for times, _ in measured) for k, stage in enumerate(STAGES)}
                | {"total": median(totals), "total_p95": totals[int(0.95 * (len(totals) - 1))]},
                "cpu_ms": cpu / frames * 1e3,
                "payload_bytes_mean": payload_bytes,
                "frames_per_s": frames / seconds,
                "link": ways_to_send(round(payload_bytes), labels=bundle.manifest.task == "classification"),
            }
        )
    return {
        "model": bundle.manifest.name,
        "bundle_id": bundle.bundle_id,
        "frames": frames,
        "threads": threads,
        "exact": exact,
        "precision": bundle.precision,
        "splits": splits,
        "peak_mb": peak_mib(),
    }


def _measure(encoder: EdgeEncoder, photo: Photo, point: str) -> tuple[tuple[float, ...], int]:
    """Milliseconds of each stage, and payload bytes; the arrays are not kept."""
    one = encoder.encode(photo, point)
    return (one.load_ms, one.preprocess_ms, one.head_ms, one.encode_ms), len(one.encoded.payload)


def ways_to_send(payload_bytes: int, *, labels: bool) -> dict[str, dict[str, float]]:
    """Link bytes of a frame, five a second, by `bitneck.wire.link_bytes`.

    Args:
        payload_bytes: of each frame.
        labels: whether answers are labels. Else they are class maps of any size, and only ways without them are given.

    Returns:
        ``up`` and ``down`` by the flags of ``bitneck-edge run``.
    """
    ways = {"--answers none": _link_bytes(payload_bytes, every=_ACKNOWLEDGED, answer_bytes=_ACK_BYTES)}
    if labels:
        ways = {"--answers all": _link_bytes(payload_bytes), "--pack 10": _link_bytes(payload_bytes, pack=10)} | ways
    return {name: {"up": found.up, "down": found.down} for name, found in ways.items()}


def _link_bytes(payload_bytes: int, *, pack: int = 1, every: int = 1, answer_bytes: int = USUAL_ANSWER) -> LinkBytes:
    """Of a frame: `pack` of them in a message, and an answer or acknowledgement to each `every`-th message."""
    meter, messages, gap_s = LinkMeter(), 10 * every, pack / _FPS
    for number in range(messages):
        meter.sent((payload_bytes + beside_payload(pack)) * pack, number * gap_s, pack)
        if (number + 1) % every == 0:
            meter.received(answer_bytes * pack, number * gap_s + 0.005)
    return meter.total(messages * gap_s) / (messages * pack)
