"""What a frame costs this device: time of each stage, processor time and memory, for every split point."""

import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck_edge.encoder import EdgeEncoder, Photo
from bitneck_edge.measure.memory import peak_mib

__all__ = ["STAGES", "bench"]

STAGES = ("load", "preprocess", "head", "encode")
_WARM = 3


def bench(bundle: Bundle, photos: Sequence[Photo], *, frames: int = 50, threads: int = 0) -> dict[str, Any]:
    """Encode photographs one after another, at the best point of every split point; nothing is sent.

    Processor time counts all threads. It is the best measure of the battery's share that a program has.

    Args:
        bundle: the edge's half.
        photos: at least one; used in turn.
        frames: for each split point, after three to warm up.
        threads: of ONNX Runtime inside one operator of the head; 0 for every core.

    Returns:
        ``splits``: for each, its point, median milliseconds of each stage and of all together, the 95th percentile of
        all together, milliseconds of processor time for each frame, mean payload bytes, frames a second. ``peak_mb``:
        peak of resident memory.

    Raises:
        InvalidConfig: there are no photographs, or less than one frame is asked for.
        ImageError, ModelFailure, BundleError: see `EdgeEncoder`.
    """
    if not photos or frames < 1:
        raise InvalidConfig("a bench needs at least one photograph and one frame")
    encoder = EdgeEncoder(bundle, threads=threads)
    splits: list[dict[str, Any]] = []
    for split in [s.name for s in bundle.manifest.split_points]:
        points = [point for point in encoder.ladder if point.split == split]
        if not points:
            continue
        point = max(points, key=lambda p: (p.accuracy, -p.payload_bytes))
        for k in range(_WARM):
            encoder.encode(photos[k % len(photos)], point.id)
        begin, cpu = time.perf_counter(), time.process_time()
        measured = [_measure(encoder, photos[k % len(photos)], point.id) for k in range(frames)]
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        totals = sorted(sum(times) for times, _ in measured)
        splits.append(
            {
                "split": split,
                "point": point.id,
                "ms": {stage: median(times[k] for times, _ in measured) for k, stage in enumerate(STAGES)}
                | {"total": median(totals), "total_p95": totals[int(0.95 * (len(totals) - 1))]},
                "cpu_ms": cpu / frames * 1e3,
                "payload_bytes_mean": fmean(size for _, size in measured),
                "frames_per_s": frames / seconds,
            }
        )
    return {
        "model": bundle.manifest.name,
        "bundle_id": bundle.bundle_id,
        "frames": frames,
        "threads": threads,
        "splits": splits,
        "peak_mb": peak_mib(),
    }


def _measure(encoder: EdgeEncoder, photo: Photo, point: str) -> tuple[tuple[float, ...], int]:
    """Milliseconds of each stage, and payload bytes; the arrays are not kept."""
    one = encoder.encode(photo, point)
    return (one.load_ms, one.preprocess_ms, one.head_ms, one.encode_ms), len(one.encoded.payload)
