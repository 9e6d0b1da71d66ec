"""What int8 and reduced decoding cost in top-1 together, paired, photograph by photograph.

    python benchmarks/coding/lean_accuracy.py --bundle build/efficientnet_lite0 --data FOLDER [--data FOLDER ...]
                                       [--enlarge 2048] [--limit N] [--json]

Each photograph goes through real bytes twice. Once as in training: the whole picture is decoded, turned, resized and
cropped, and heads and encoders compute in float32. Once as on a device: a JPEG is decoded at a reduced scale, only the
seen part is resized, and heads and encoders compute in int8. With --enlarge, its long side is first enlarged to so many
pixels and saved as JPEG of quality 90, so that reduced decoding has work to do.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import load_photo
from bitneck.manifest import Precision
from bitneck.runtime import ModulePool
from bitneck_edge.sources.photo import input_of
from bitneck_models.data.photos import labelled_photos
from bitneck_models.networks.vision import imagenet_wnids


class Way:
    """A bundle at one precision, with exact or fast pictures."""

    def __init__(self, bundle: Bundle, precision: Precision, *, exact: bool, pool: ModulePool) -> None:
        self.bundle, self.exact = bundle, exact
        self.heads = SegmentChain(bundle, pool=pool, precision=precision)
        self.tail = SegmentChain(bundle, pool=pool)
        ladder = bundle.manifest.ladder
        self.encoders = {p.id: PointEncoder(bundle, p, pool=pool, precision=precision) for p in ladder}
        self.decoders = {p.id: PointDecoder(bundle, p, pool=pool) for p in ladder}

    def classes(self, photo: bytes) -> dict[str, int]:
        """The class at each operating point."""
        with input_of(photo, self.bundle.manifest.input, exact=self.exact) as (x, _):
            features = [x]
        for index in range(self.bundle.manifest.split_points[-1].after_segment + 1):
            features.append(self.heads.run(features[-1], index, index + 1))
        found = {}
        for name, encoder in self.encoders.items():
            head, decoder = self.heads.head_length(encoder.point.split), self.decoders[name]
            f_hat = decoder.decode(decoder.dequantize(encoder.encode(features[head]).payload)[None])
            found[name] = int(self.tail.run(f_hat, head, len(self.tail)).argmax())
        return found


def enlarged(path: Path, side: int) -> bytes:
    """The photograph with a long side of so many pixels, as JPEG."""
    image = load_photo(path)
    scale = side / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--enlarge", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle, pool = Bundle.open(arguments.bundle), ModulePool()
    labels = bundle.labels()
    photos = [p for folder in arguments.data for p in labelled_photos(folder, imagenet_wnids(labels), labels)]
    photos = photos[:: max(1, len(photos) // arguments.limit)] if arguments.limit else photos
    ways = Way(bundle, "float32", exact=True, pool=pool), Way(bundle, "int8", exact=False, pool=pool)
    right: list[dict[str, list[bool]]] = [{p.id: [] for p in bundle.manifest.ladder} for _ in ways]
    for photo in track(photos, console=Console(stderr=True)):
        data = enlarged(photo.path, arguments.enlarge) if arguments.enlarge else photo.path.read_bytes()
        for way, rows in zip(ways, right, strict=True):
            for name, answer in way.classes(data).items():
                rows[name].append(answer == photo.label)
    points = []
    for point in bundle.manifest.ladder:
        before, after = (np.array(rows[point.id], dtype=float) for rows in right)
        lost = before - after
        spread = 1.96 * float(lost.std()) / math.sqrt(len(lost))
        points.append(
            {
                "id": point.id, "top1": before.mean(), "top1_lean": after.mean(), "lost": lost.mean(),
                "interval": [lost.mean() - spread, lost.mean() + spread],
            }
        )  # fmt: skip
    mean = float(np.mean([p["lost"] for p in points]))
    if arguments.json:
        print(json.dumps({"photographs": len(photos), "mean_lost": mean, "points": points}, indent=1))
        return
    table = Table("point", "top-1", "int8, reduced", "lost (points)", "95 % interval")
    for p in points:
        low, high = p["interval"]
        table.add_row(
            p["id"], f"{p['top1']:.4f}", f"{p['top1_lean']:.4f}", f"{100 * p['lost']:.2f}",
            f"{100 * low:.2f} to {100 * high:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(f"{len(photos)} photographs: {100 * mean:.2f} points lost in the mean of the operating points")


if __name__ == "__main__":
    main()
