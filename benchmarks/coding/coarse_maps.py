"""What --answers map/4 costs in mean IoU, and what it saves in bytes.

    python benchmarks/coding/coarse_maps.py --bundle build/deeplabv3_efficientnet_lite0 --data FOLDER [--every 3]

FOLDER is a test set such as CamVid's `test`. Each photograph is answered by the uncompressed network, and at the
cheapest and the most accurate operating point with real bytes. Each answer is measured as it is, and after every fourth
pixel of it went to the device and was refined there; and with the pixels simply repeated, for comparison.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.coding.class_map import best_classes, encode_map
from bitneck.coding.coarse_map import coarse, refined
from bitneck.runtime import ModulePool
from bitneck_edge.sources.photo import input_of
from bitneck_models.measure.mean_iou import MeanIou, MeanIouMeter

STEP = 4


def repeated(small: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A coarse map with each pixel repeated where it is the nearest."""
    nearest = []
    for size, count in zip((height, width), small.shape, strict=True):
        first = (size - 1) % STEP // 2
        nearest.append(np.clip((np.arange(size) - first + STEP // 2) // STEP, 0, count - 1))
    return small[nearest[0]][:, nearest[1]]


class Row:
    """The maps of one operating point, in full, refined and repeated, and their bytes."""

    def __init__(self, metric: MeanIou) -> None:
        self.meters: dict[str, MeanIouMeter] = {way: metric.meter() for way in ("full", "refined", "repeated")}
        self.bytes: dict[str, list[int]] = {"full": [], "refined": []}

    def add(self, logits: NDArray[np.float32], truth: NDArray[np.integer]) -> None:
        """Count an answer (K, H, W)."""
        classes = best_classes(logits)
        small = coarse(classes, STEP)
        height, width = classes.shape
        self.bytes["full"].append(len(encode_map(classes)))
        self.bytes["refined"].append(len(encode_map(small)))
        self.meters["full"].add(classes, truth)
        self.meters["refined"].add(refined(small, STEP, height=height, width=width), truth)
        self.meters["repeated"].add(repeated(small, height, width), truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th photograph only")
    arguments = parser.parse_args()
    bundle, pool = Bundle.open(arguments.bundle), ModulePool()
    ladder, spec = bundle.manifest.ladder, bundle.manifest.input
    metric = MeanIou(bundle.labels(), ())
    chain = SegmentChain(bundle, pool=pool)
    points = [ladder.measured[0], ladder.best]
    coders = [(PointEncoder(bundle, p, pool=pool), PointDecoder(bundle, p, pool=pool)) for p in points]
    rows = {"uncompressed": Row(metric)} | {point.id: Row(metric) for point in points}
    photos = metric.photos(arguments.data, (), bundle.labels())[:: arguments.every]
    for photo in track(photos, console=Console(stderr=True)):
        truth = metric.truth(photo)
        with input_of(photo[0].read_bytes(), spec, exact=True) as (x, _):
            features = [x.copy()]
        for index in range(len(chain)):
            features.append(chain.run(features[-1], index, index + 1).copy())
        rows["uncompressed"].add(features[-1][0], truth)
        for point, (encoder, decoder) in zip(points, coders, strict=True):
            head = chain.head_length(point.split)
            f_hat = decoder.decode(decoder.dequantize(encoder.encode(features[head]).payload)[None])
            rows[point.id].add(chain.run(f_hat, head, len(chain))[0], truth)
    table = Table("point", "mean IoU", "map/4", "lost", "map/4 repeated", "map bytes", "map/4 bytes")
    for name, row in rows.items():
        full, fine, rough = (row.meters[way].accuracy() for way in ("full", "refined", "repeated"))
        table.add_row(
            name, f"{full:.4f}", f"{fine:.4f}", f"{100 * (full - fine):.2f} points", f"{rough:.4f}",
            f"{np.mean(row.bytes['full']):.0f}", f"{np.mean(row.bytes['refined']):.0f}",
        )  # fmt: skip
    Console().print(table)
    print(f"{len(photos)} photographs of {arguments.data}")


if __name__ == "__main__":
    main()
