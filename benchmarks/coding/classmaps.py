"""Compare lossless codings of class maps: PNG, WebP, zlib, bz2, LZMA and bitneck's own.

    python benchmarks/coding/classmaps.py LABELS [--soften 4] [--every 5]

LABELS is a folder of label maps (PNG files of class indices), such as CamVid's `test/labels`. `--soften 4` measures
maps like those of a network: reduced to a fourth of the size and enlarged bilinearly. Prints for each coding the mean
bytes of a map, and the milliseconds of processor time to encode and to decode it.
"""

import argparse
import bz2
import io
import lzma
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.coding.class_map import count_classes, decode_map, encode_map

Map = NDArray[np.uint8]
Coder = tuple[Callable[[Map], bytes], Callable[[bytes, Map], Map]]


def png(classes: Map) -> bytes:
    image, buffer = Image.fromarray(classes), io.BytesIO()
    image.putpalette([value for k in range(16) for value in (k, k, k)])
    image.save(buffer, "PNG", bits=4 if classes.max() < 16 else 8, optimize=True)
    return buffer.getvalue()


def webp(method: int, quality: int) -> Callable[[Map], bytes]:
    def encode(classes: Map) -> bytes:
        zero, buffer = np.zeros_like(classes), io.BytesIO()
        picture = Image.fromarray(np.stack([zero, classes, zero], axis=-1))
        picture.save(buffer, "WEBP", lossless=True, method=method, quality=quality)
        return buffer.getvalue()

    return encode


def picture(data: bytes, _like: Map) -> Map:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else pixels[..., 1]


def raw(unpack: Callable[[bytes], bytes]) -> Callable[[bytes, Map], Map]:
    return lambda data, like: np.frombuffer(unpack(data), dtype=np.uint8).reshape(like.shape)


CODERS: dict[str, Coder] = {
    "PNG, palette, optimized": (png, picture),
    "WebP lossless, method 0": (webp(0, 0), picture),
    "WebP lossless, method 4": (webp(4, 75), picture),
    "WebP lossless, method 6": (webp(6, 100), picture),
    "zlib 9": (lambda m: zlib.compress(m.tobytes(), 9), raw(zlib.decompress)),
    "bz2 9": (lambda m: bz2.compress(m.tobytes()), raw(bz2.decompress)),
    "LZMA 1": (lambda m: lzma.compress(m.tobytes(), preset=1), raw(lzma.decompress)),
    "LZMA 9e": (lambda m: lzma.compress(m.tobytes(), preset=9 | lzma.PRESET_EXTREME), raw(lzma.decompress)),
    "bitneck.coding.class_map": (
        encode_map,
        lambda data, like: decode_map(data, height=like.shape[0], width=like.shape[1], number=256),
    ),
}


def softened(classes: Map, factor: int) -> Map:
    """Each class averaged over squares and enlarged bilinearly; then the class with the highest value at each pixel."""
    height, width = (side // factor * factor for side in classes.shape)
    number = int(classes.max()) + 1
    planes = []
    for k in range(number):
        small = (classes[:height, :width] == k).reshape(height // factor, factor, width // factor, factor).mean((1, 3))
        large = Image.fromarray(small.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        planes.append(np.asarray(large))
    return np.argmax(planes, axis=0).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="folder of label maps")
    parser.add_argument("--soften", type=int, default=1, metavar="N", help="average squares of NxN pixels first")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th map only")
    given = parser.parse_args()
    maps = []
    for path in sorted(given.labels.glob("*.png"))[:: given.every]:
        with Image.open(path) as image:
            maps.append(np.asarray(image))
    if given.soften > 1:
        maps = [softened(m, given.soften) for m in maps]
    kinds = np.mean([(count_classes(m, 256) > 0).sum() for m in maps])
    print(f"{len(maps)} maps of {maps[0].shape[1]}x{maps[0].shape[0]} pixels, {kinds:.1f} classes each")
    print(f"{'coding':<26}{'bytes':>8}{'encode ms':>12}{'decode ms':>12}")
    for name, (encode, decode) in CODERS.items():
        begin = time.process_time()
        coded = [encode(m) for m in maps]
        between = time.process_time()
        back = [decode(data, m) for data, m in zip(coded, maps, strict=True)]
        end = time.process_time()
        assert all((a == b).all() for a, b in zip(maps, back, strict=True)), name
        size = np.mean([len(data) for data in coded])
        times = [seconds / len(maps) * 1e3 for seconds in (between - begin, end - between)]
        print(f"{name:<26}{size:>8.0f}{times[0]:>12.2f}{times[1]:>12.2f}")


if __name__ == "__main__":
    main()
