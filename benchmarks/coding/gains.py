"""What gains for each channel give at steps coarser than a unit's own: its step times g for channel c, instead of one.

    python benchmarks/coding/gains.py --bundle build/efficientnet_lite0 --data PHOTOGRAPHS [--unit s2-b3] [--photos 400]

The gains are ``g = (spread of the channel / mean spread) ** a``, divided by their geometric mean: with a above 0,
channels of a large spread have larger steps. Half of the photographs give spreads and tables, a histogram for each
channel; the other half is measured. For each multiple of the unit's step and a: ideal bytes under these tables, how
often the answer is the uncompressed network's, and the divergence of its probabilities. Then, for each a: bytes against
the curve of a = 0 at equal divergence, mean over the multiples whose divergence that curve has. At the edge gains would
be a scale of the encoder's last layer.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import load_photo, preprocess
from bitneck_models.data.photos import unlabelled_photos
from bitneck_testing.measuring import log_softmax

EXPONENTS = (-0.45, -0.3, -0.15, 0.0, 0.15)
MULTIPLES = (1.0, 1.19, 1.41, 1.68, 2.0, 2.38, 2.83, 3.36, 4.0)


def bits_of(fitted: NDArray[np.int64], measured: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ideal bits of symbols (N, Cr, h, w), one sum for each of N, under histograms of other symbols."""
    bits = np.zeros(len(measured))
    for c in range(fitted.shape[1]):
        low = min(fitted[:, c].min(), measured[:, c].min())
        width = max(fitted[:, c].max(), measured[:, c].max()) - low + 1
        counts = np.bincount((fitted[:, c] - low).ravel(), minlength=width) + 0.1  # none is impossible
        bits += -np.log2(counts / counts.sum())[measured[:, c] - low].sum(axis=(1, 2))
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of a classifier")
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs, in folders of any depth")
    parser.add_argument("--unit", default="s2-b3", help="unit; its point of its own step must be in the ladder")
    parser.add_argument("--photos", type=int, default=400)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    chain, spec, point = SegmentChain(bundle), bundle.manifest.input, bundle.manifest.ladder[arguments.unit]
    head, encoder, decoder = chain.head_length(point.split), PointEncoder(bundle, point), PointDecoder(bundle, point)
    latents, teacher = [], []
    for path in unlabelled_photos([arguments.data])[: arguments.photos]:
        feature = chain.run(preprocess(load_photo(path), spec), 0, head)
        latents.append(encoder.latent(feature)[0])
        teacher.append(log_softmax(chain.run(feature, head, len(chain))[0]))
    y, half = np.stack(latents), len(latents) // 2
    spread = y[:half].std(axis=(0, 2, 3))
    found: dict[float, list[tuple[float, float]]] = {exponent: [] for exponent in EXPONENTS}
    print("multiple       a    bytes  agreement  divergence")
    for multiple in MULTIPLES:
        for exponent in EXPONENTS:
            gains = (spread / spread.mean()) ** exponent
            gains /= np.exp(np.log(gains).mean())
            steps = (point.step * multiple * gains).astype(np.float32)[:, None, None]
            s = np.rint(y / steps).astype(np.int64)
            same, apart = [], []
            for each, known in zip(s[half:], teacher[half:], strict=True):
                latent = (each * steps).astype(np.float32)
                answer = log_softmax(chain.run(decoder.decode(latent[None]), head, len(chain))[0])
                same.append(answer.argmax() == known.argmax())
                apart.append(float((np.exp(known) * (known - answer)).sum()))
            size = bits_of(s[:half], s[half:]).mean() / 8
            found[exponent].append((float(np.log(np.mean(apart))), float(np.log(size))))
            print(
                f"{multiple:8.2f} {exponent:7.2f} {size:8.1f} {np.mean(same):10.3f} {np.mean(apart):11.3f}", flush=True
            )
    apart_alone, size_alone = np.array(sorted(found[0.0])).T
    for exponent, curve in found.items():
        within = [(d, b) for d, b in curve if apart_alone[0] <= d <= apart_alone[-1]]
        ratios = [np.exp(b - np.interp(d, apart_alone, size_alone)) for d, b in within]
        print(f"a = {exponent:5.2f}: {100 * np.mean(ratios) - 100:+.1f} % of the bytes, "
              f"{100 * min(ratios) - 100:+.1f} to {100 * max(ratios) - 100:+.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
