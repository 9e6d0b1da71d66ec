"""What moving symbols towards zero gives, where their tables charge much: rate-distortion optimized symbols.

    python benchmarks/coding/symbols.py --bundle build/efficientnet_lite0 --data PHOTOGRAPHS [--split s3] [--photos 200]

A symbol s becomes its neighbour towards zero where ``(y / Q - s)^2 + w * bits(s)`` is smaller for that one, with the
bits of the point's own tables; w = 0 rounds. For each point and w: ideal bytes under the tables, how often the answer
is the uncompressed network's, and the divergence of its probabilities. Moved symbols pay if they beat the curve of
w = 0.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.coding.factorized_model import TOTAL_BITS, FactorizedModel
from bitneck.coding.symbols import dequantize, quantize
from bitneck.image import load_photo, preprocess
from bitneck_models.data.photos import unlabelled_photos
from bitneck_testing.measuring import log_softmax

WEIGHTS = (0.0, 0.03, 0.06, 0.1)


def moved(y: NDArray[np.float32], step: float, tables: FactorizedModel, weight: float) -> NDArray[np.int32]:
    """Symbols of a latent (Cr, h, w), each one or its neighbour towards zero."""
    s = quantize(y, step, tables.lo, tables.hi)
    near = np.clip(s - np.sign(s), tables.lo[:, None, None], tables.hi[:, None, None]).astype(np.int32)
    costs = []
    for each in (s, near):
        bits = np.stack([TOTAL_BITS - np.log2(row[each[c] - tables.lo[c]]) for c, row in enumerate(tables.counts)])
        costs.append((y / np.float32(step) - each) ** 2 + weight * bits)
    return np.where(costs[1] < costs[0], near, s).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of a classifier")
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs, in folders of any depth")
    parser.add_argument("--split", default="s3", help="split point")
    parser.add_argument("--photos", type=int, default=200)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    chain, spec = SegmentChain(bundle), bundle.manifest.input
    points = [point for point in bundle.manifest.ladder if point.split == arguments.split]
    head = chain.head_length(arguments.split)
    features = [chain.run(preprocess(load_photo(path), spec), 0, head)
                for path in unlabelled_photos([arguments.data])[: arguments.photos]]  # fmt: skip
    teacher = [log_softmax(chain.run(f, head, len(chain))[0]) for f in features]
    print("point              w    bytes  agreement  divergence")
    for point in points:
        encoder, decoder, tables = PointEncoder(bundle, point), PointDecoder(bundle, point), bundle.tables(point.id)
        latents = [encoder.latent(f)[0] for f in features]
        for weight in WEIGHTS:
            size, same, apart = [], [], []
            for y, known in zip(latents, teacher, strict=True):
                s = moved(y, point.step, tables, weight)
                output = chain.run(decoder.decode(dequantize(s, point.step)[None]), head, len(chain))[0]
                answer = log_softmax(output)
                size.append(tables.ideal_bits(s) / 8)
                same.append(answer.argmax() == known.argmax())
                apart.append(float((np.exp(known) * (known - answer)).sum()))
            print(f"{point.id:14} {weight:5.2f} {np.mean(size):8.1f} {np.mean(same):10.3f} {np.mean(apart):11.3f}")


if __name__ == "__main__":
    main()
