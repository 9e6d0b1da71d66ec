"""The cloud's time for a lone frame, on one thread: decoding, the unit's decoder, and the tail, at each split point.

    python benchmarks/coding/cloud.py build/efficientnet_lite0 [MORE ...] [--seconds 2]

At each split point it takes the most accurate point. The least of many times counts, for a machine may be busy. Several
bundles take turns. It also runs with the code of older commits, for bundles of older formats:

    git worktree add build/old COMMIT    # then export its bundle with its own code
    PYTHONPATH=build/old/shared:build/old/models python benchmarks/coding/cloud.py build/old/BUNDLE
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import load_photo, preprocess
from bitneck_testing.photographs import sample_photo

PARTS = ("decoding", "decoder", "tail", "together")


class Cloud:
    """The cloud's work for one frame at the most accurate point of each split point of a bundle."""

    def __init__(self, root: Path, photo: Path) -> None:
        bundle = Bundle.open(root)
        self.chain = SegmentChain(bundle, threads=1)
        x = preprocess(load_photo(photo), bundle.manifest.input)
        self.work: dict[str, tuple[str, int, dict[str, Callable[[], object]]]] = {}
        for split in bundle.manifest.split_points:
            own = [point for point in bundle.manifest.ladder if point.split == split.name]
            point = max(own, key=lambda point: point.accuracy)
            head = split.after_segment + 1
            payload = PointEncoder(bundle, point).encode(self.chain.run(x, 0, head)).payload
            parts = self._parts(PointDecoder(bundle, point), payload, head)
            self.work[split.name] = point.id, len(payload), parts

    def _parts(self, decoder: PointDecoder, payload: bytes, head: int) -> dict[str, Callable[[], object]]:
        end = len(self.chain)
        y_hat = decoder.dequantize(payload)[None]
        f_hat = decoder.decode(y_hat)
        works: tuple[Callable[[], object], ...] = (
            lambda: decoder.dequantize(payload),
            lambda: decoder.decode(y_hat),
            lambda: self.chain.run(f_hat, head, end),
            lambda: self.chain.run(decoder.decode(decoder.dequantize(payload)[None]), head, end),
        )
        return dict(zip(PARTS, works, strict=True))


def least_ms(work: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each part")
    arguments = parser.parse_args()
    clouds = {root: Cloud(root, sample_photo()) for root in arguments.bundles}
    print(f"split  point          payload  {'  '.join(f'{part:>9}' for part in PARTS)}  ms")
    for split in next(iter(clouds.values())).work:
        for root, cloud in clouds.items():
            if split not in cloud.work:
                continue
            point, size, parts = cloud.work[split]
            times = "  ".join(f"{least_ms(work, arguments.seconds):9.2f}" for work in parts.values())
            print(f"{split:5}  {point:13}  {size:7}  {times}  {root}", flush=True)


if __name__ == "__main__":
    main()
