"""Quantizing and coding a latent on the device, right after ONNX Runtime, when the caches hold its weights.

    python benchmarks/coding/cold.py build/efficientnet_lite0 [POINT ...]

Prints the processor time for a frame at each operating point, without the networks: the median, and what the fastest
fifth took at most. It also runs with the code of older commits; see `benchmarks/coding/cloud.py`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.image import load_photo, preprocess
from bitneck_edge.encoder import EdgeEncoder
from bitneck_testing.measuring import COMPUTING, TimeInside
from bitneck_testing.photographs import sample_photo

FRAMES = 150


def coding_us(encoder: EdgeEncoder, x: NDArray[np.float32], point: str) -> list[float]:
    """Microseconds of processor time from a latent to its payload, for each frame."""
    half = encoder.point_encoder(point)
    head = encoder.chain.head_length(half.point.split)
    spent = []
    for _ in range(FRAMES):
        f = encoder.chain.run(x, 0, head)
        with TimeInside(COMPUTING, clock=time.thread_time) as inside:
            begin = time.thread_time()
            half.encode(f)
            spent.append((time.thread_time() - begin - inside.seconds[0]) * 1e6)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("points", nargs="*", help="operating points; the best one without any")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    encoder = EdgeEncoder(bundle, threads=1)
    x = preprocess(load_photo(sample_photo()), bundle.manifest.input)
    for point in arguments.points or [bundle.manifest.ladder.best.id]:
        spent = coding_us(encoder, x, point)
        print(f"{point}: {np.median(spent):.0f} us, the fastest fifth {np.percentile(spent, 20):.0f} us")


if __name__ == "__main__":
    main()
