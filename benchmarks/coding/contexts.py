"""What contexts save in bytes, and what they cost in time: every point that has some, with and without.

    python benchmarks/coding/contexts.py --bundle build/efficientnet_lite0 --data PHOTOGRAPHS [--photos 100]

Both codecs code the same symbols in turn, in one process with one thread; the median of three turns counts.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.image import load_photo, preprocess
from bitneck_models.data.photos import unlabelled_photos

TURNS = 3


def milliseconds(function: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    """Mean of a call, in the median turn."""
    turns = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        for argument in arguments:
            function(argument)
        turns.append(1e3 * (time.perf_counter() - begun) / len(arguments))
    return median(turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs, in folders of any depth")
    parser.add_argument("--photos", type=int, default=100)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    chain, ladder = SegmentChain(bundle, threads=1), bundle.manifest.ladder
    encoders = {p.id: PointEncoder(bundle, p) for p in ladder}
    encoders = {name: encoder for name, encoder in encoders.items() if isinstance(encoder.codec, ContextCodec)}
    found = unlabelled_photos([arguments.data])[: arguments.photos]
    photos = [preprocess(load_photo(path), bundle.manifest.input) for path in found]
    print("point        bytes  contexts  saved | ms to encode  contexts  times | ms to decode  contexts  times")
    worst = {"encode": 0.0, "decode": 0.0}
    for name, encoder in encoders.items():
        head = chain.head_length(ladder[name].split)
        symbols = [encoder.symbols(chain.run(x, 0, head)) for x in photos]
        plain, contexts = FactorizedCodec(encoder.codec.tables, ladder[name].latent_shape), encoder.codec
        payloads = {codec: [codec.encode(s) for s in symbols] for codec in (plain, contexts)}
        size = {codec: float(np.mean([len(p) for p in payloads[codec]])) for codec in payloads}
        encode = {codec: milliseconds(codec.encode, symbols) for codec in payloads}
        decode = {codec: milliseconds(codec.decode, payloads[codec]) for codec in payloads}
        print(
            f"{name:12} {size[plain]:6.0f} {size[contexts]:9.0f} {1 - size[contexts] / size[plain]:6.1%} |"
            f" {encode[plain]:12.2f} {encode[contexts]:9.2f} {encode[contexts] / encode[plain]:6.1f} |"
            f" {decode[plain]:12.2f} {decode[contexts]:9.2f} {decode[contexts] / decode[plain]:6.1f}"
        )
        for what, times in (("encode", encode), ("decode", decode)):
            worst[what] = max(worst[what], times[contexts] - times[plain])
    print(f"at most {worst['encode']:.2f} ms more to encode and {worst['decode']:.2f} to decode")


if __name__ == "__main__":
    main()
