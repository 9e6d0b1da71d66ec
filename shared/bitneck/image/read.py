"""Photographs from files and bytes, as RGB, within limits.

Whatever Pillow raises becomes an `ImageError` that names the photograph.
"""

import contextlib
import io
import logging
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bitneck.errors import ImageError
from bitneck.image.exact import MAX_PIXELS, resized_size
from bitneck.image.sharing import MAX_DECODED_BYTES, MEMORY, QUIET
from bitneck.manifest import InputSpec

__all__ = [
    "MAX_ASPECT",
    "MAX_SCANS",
    "PHOTO_FORMATS",
    "PHOTO_SUFFIXES",
    "TURNED",
    "find_photos",
    "load_photo",
    "opened_photo",
    "opened_reduced",
]

_LOG = logging.getLogger(__name__)

MAX_ASPECT = 1000
"""Longer and narrower pictures are refused: scaled until the short side fills the input, they would be gigantic."""

MAX_SCANS = 100
"""Scans of a JPEG. Encoders write about ten; 3,000 scans in a small file take half a minute to decode."""

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""What Pillow may decode here, and HEIF where `pillow-heif` is installed. Other formats, such as EPS, start programs or
read further files. JPEG includes MPO."""

_ENDINGS = "jpg jpeg jpe jfif mpo png webp bmp gif tif tiff ppm pgm avif heic heif"
PHOTO_SUFFIXES = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""What `find_photos` takes from a folder."""

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_STRIP_BYTES = 16 << 20
_RGB_BYTES = 4
"""Bytes of a pixel in Pillow's RGB."""

_ORIENTATION = 0x0112
"""EXIF's tag."""
TURNED = (5, 6, 7, 8)
"""EXIF orientations in which width and height change places."""


def find_photos(source: Path) -> list[Path]:
    """The photographs of a path: the file itself, or those in the folder and below it, sorted.

    Files in a folder whose names have another ending are skipped, and the log says how many. Links to folders are not
    followed.

    Raises:
        ImageError: no such path, a folder without photographs, or one that cannot be read.
    """
    try:
        if not source.is_dir():
            if not source.exists():
                raise ImageError(f"{source}: no such file or folder")
            return [source]
        files = sorted(p for p in source.rglob("*") if not p.is_dir())
    except OSError as exc:
        raise ImageError(f"{source}: cannot be read ({exc.strerror})") from exc
    photos = [p for p in files if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file()]
    if not photos:
        raise ImageError(f"{source}: no photographs in this folder; looked for {', '.join(sorted(PHOTO_SUFFIXES))}")
    skipped = Counter(p.suffix.lower() or "no ending" for p in files) - Counter(p.suffix.lower() for p in photos)
    if skipped:
        kinds = ", ".join(f"{count} of {suffix}" for suffix, count in skipped.most_common(5))
        _LOG.info("%s: %d files are skipped, they are no photographs: %s", source, skipped.total(), kinds)
    return photos


def load_photo(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a photograph as upright RGB.

    The EXIF orientation is applied. Any mode becomes RGB: 16-bit and float grey are scaled to 8 bits, CMYK, palette
    and YCbCr are converted, transparency is dropped. An animation gives its first picture.

    Args:
        source: a regular file, or a file's bytes.
        max_pixels: the decompression-bomb limit, width * height.

    Raises:
        ImageError: no such file, no regular file, not an image, cut short, more pixels than `max_pixels`, more memory
            than `MAX_DECODED_BYTES`, a JPEG of more than `MAX_SCANS` scans, or more than `MAX_ASPECT` times as long as
            wide.
    """
    with opened_photo(source, max_pixels=max_pixels) as image:
        return image


@contextlib.contextmanager
def opened_photo(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """`load_photo` for one photograph at a time: its memory counts as taken until the block ends.

    Threads that decode large photographs wait for each other, so all of them together keep to `MAX_DECODED_BYTES`.

    Raises:
        ImageError: see `load_photo`.
    """
    where = str(source) if isinstance(source, Path) else f"<{len(source)} bytes>"
    with contextlib.ExitStack() as memory:
        # Pillow warns of bombs and metadata; the limits below are ours.
        with _image_errors(where), QUIET(), _opened(source) as image:
            _check_size(image, where, max_pixels)
            memory.enter_context(MEMORY.taken(_decoded_bytes(image, where, image.size)))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            upright = _to_rgb(image)
        yield upright


@contextlib.contextmanager
def opened_reduced(
    source: Path | bytes, spec: InputSpec, *, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Image.Image, int]]:
    """`opened_photo` for one input alone: a JPEG is decoded no finer than the input needs, and nothing is turned yet.

    libjpeg then computes a half, a quarter or an eighth of the pixels of each side.

    Args:
        source: see `load_photo`.
        spec: the backbone's input.
        max_pixels: see `load_photo`; of the whole photograph.

    Returns:
        The picture as RGB, as it is stored, and its EXIF orientation, 1 to 8; see `bitneck.view.view`.

    Raises:
        ImageError: see `load_photo`.
    """
    where = str(source) if isinstance(source, Path) else f"<{len(source)} bytes>"
    with contextlib.ExitStack() as memory:
        with _image_errors(where), QUIET(), _opened(source) as image:
            _check_size(image, where, max_pixels)
            whole, orientation = image.size, image.getexif().get(_ORIENTATION, 1)
            if image.format in ("JPEG", "MPO"):
                width, height = resized_size(whole, spec, turned=orientation in TURNED)
                image.draft(image.mode, (width, height))
            memory.enter_context(MEMORY.taken(_decoded_bytes(image, where, whole)))
            image.load()
            rgb = _to_rgb(image)
        yield rgb, orientation if orientation in range(1, 9) else 1


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """A photograph whose header is read, and no more."""
    if isinstance(source, Path):
        mode = source.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe or a device may never end
            raise ImageError(f"{source}: not a regular file")
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        head = file.read(12)
        heif = head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS
        if heif:
            _register_heif(source)
        file.seek(0)
        with Image.open(file, formats=("HEIF",) if heif else PHOTO_FORMATS) as image:
            if image.format in ("JPEG", "MPO"):
                _check_scans(file)
            yield image


def _register_heif(source: Path | bytes) -> None:
    """Teach Pillow to read HEIF, which takes a package of its own."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as exc:
        where = str(source) if isinstance(source, Path) else f"<{len(source)} bytes>"
        raise ImageError(f"{where}: HEIF needs a package more; install bitneck with its extra: bitneck[heif]") from exc
    register_heif_opener()


def _check_size(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: {width}x{height} pixels, more than the limit of {max_pixels}; shrink the photograph"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{where}: {width}x{height} pixels, too long and narrow; crop it first")


def _decoded_bytes(image: Image.Image, where: str, whole: tuple[int, int]) -> int:
    """Memory that decoding, turning upright and conversion to RGB take at most.

    Args:
        image: not decoded yet; perhaps to be decoded at a reduced size.
        where: for the message.
        whole: the photograph's own width and height.
    """
    own = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "LA": 4, "PA": 4}.get(image.mode, 4)
    bytes_a_pixel = own if image.mode == "RGB" else own + _RGB_BYTES
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):  # a turned copy
        bytes_a_pixel += own
    needed = image.width * image.height * bytes_a_pixel
    if image.info.get("progressive"):  # libjpeg keeps the coefficients of three components, 2 bytes each
        needed += whole[0] * whole[1] * 6
    if needed > MAX_DECODED_BYTES:
        raise ImageError(
            f"{where}: {image.width}x{image.height} pixels of {image.mode} take {needed >> 20} MiB to decode, "
            f"more than the limit of {MAX_DECODED_BYTES >> 20}; shrink the photograph"
        )
    return needed


def _check_scans(file: IO[bytes]) -> None:
    """Count the scans of a JPEG before they are decoded; the file's position stays."""
    position = file.tell()
    file.seek(0)
    scans = _jpeg_scans(file.read())
    file.seek(position)
    if scans > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans; save it again as a usual one")


def _jpeg_scans(data: bytes) -> int:
    """Scans of a JPEG's first image; counting ends behind `MAX_SCANS`."""
    at, scans = 2, 0
    while scans <= MAX_SCANS:
        marker = _MARKER.search(data, at)
        if marker is None or marker.start() + 4 > len(data):
            break
        at = marker.start()
        if data[at + 1] == 0xD9:  # end of image
            break
        scans += data[at + 1] == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return scans


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker with a length: no stuffed byte, no fill byte, no restart."""


@contextlib.contextmanager
def _image_errors(where: str) -> Iterator[None]:
    """What Pillow raises becomes an `ImageError` that names the photograph."""
    try:
        yield
    except ImageError as exc:
        if str(exc).startswith(where):
            raise
        raise ImageError(f"{where}: {exc}") from exc
    except FileNotFoundError as exc:
        raise ImageError(f"{where}: no such file") from exc
    except UnidentifiedImageError as exc:
        raise ImageError(f"{where}: not an image, or of a format that is not read; {_KNOWN}") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{where}: {exc}") from exc
    except OSError as exc:
        reason = f"cannot be read ({exc.strerror})" if exc.errno is not None else f"damaged or cut short ({exc})"
        raise ImageError(f"{where}: {reason}") from exc
    except Exception as exc:  # Pillow's decoders raise SyntaxError, ValueError, struct.error and more
        raise ImageError(f"{where}: damaged or cut short ({exc})") from exc


_KNOWN = f"known are {', '.join(PHOTO_FORMATS)} and HEIF"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; unlike Pillow's own conversion, deep grey is scaled and not clipped."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled_grey(image)
    return image.convert("RGB") if image.mode != "RGB" else image


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Deep grey to RGB, strip by strip.

    Black is 0, or the smallest finite value if that is below 0; white is 65535 (floats: 1), or the largest finite value
    if that is above it.
    """
    rows = max(1, _STRIP_BYTES // (8 * image.width))
    strips = [(top, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    for top, bottom in strips:
        values = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        finite = values[np.isfinite(values)]
        low, high = min(low, float(finite.min(initial=low))), max(high, float(finite.max(initial=high)))
    scaled = Image.new("RGB", image.size)
    for top, bottom in strips:
        values = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        grey = (np.nan_to_num(values, nan=0.0, posinf=high, neginf=low) - low) * (255.0 / (high - low))
        strip = Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
        scaled.paste(strip, (0, top))
    return scaled
