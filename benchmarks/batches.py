"""What batches gain: milliseconds a frame takes in `ServedModel.compute`, by operating point and batch size.

    python benchmarks/batches.py [--bundle build/efficientnet_lite0] [--points P ...] [--sizes 1 2 4 8 16] [--repeat 5]

A batch has frames of one point. Their latents are random: what the decoders and the tail cost does not depend on the
values. Without `--points`, it is the first point of each split. Each figure is the least of `--repeat` batches, divided
by the frames in one; `batch` is the largest one as a whole.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError
from bitneck_cloud.engine.served_model import ServedModel


def seconds(model: ServedModel, point: str, size: int, repeat: int) -> float:
    """Of one batch, the least of several."""
    shape = model.manifest.unit(model.manifest.point(point).unit).latent_shape
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal(shape, dtype=np.float32) for _ in range(size)]  # (Cr, h, w)
    taken = []
    for _ in range(repeat + 1):  # the first one warms up
        begin = time.perf_counter()
        outputs = model.compute([point] * size, latents)
        taken.append(time.perf_counter() - begin)
        if failed := [each for each in outputs if isinstance(each, BitneckError)]:
            raise failed[0]
    return min(taken[1:])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/efficientnet_lite0"))
    parser.add_argument("--points", nargs="+", default=[])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 for all cores")
    chosen = parser.parse_args()
    model = ServedModel(Bundle.open(chosen.bundle), threads=chosen.threads)
    firsts: dict[str, str] = {}
    for each in model.ladder:
        firsts.setdefault(each.split, each.id)
    sizes = [size for size in chosen.sizes if size <= model.max_frames]
    print("ms a frame")
    print(f"{'point':<8}" + "".join(f"{size:>8}" for size in sizes) + f"{'batch':>8}")
    for point in chosen.points or firsts.values():
        found = [1000 * seconds(model, point, size, chosen.repeat) for size in sizes]
        cells = "".join(f"{ms / size:>8.1f}" for ms, size in zip(found, sizes, strict=True))
        print(f"{point:<8}{cells}{found[-1]:>8.0f}")


if __name__ == "__main__":
    main()
