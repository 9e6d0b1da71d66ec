"""Photographs to the backbone's input, without torch.

The result equals that of torchvision on PIL images, within 1e-6 (a test holds that): ``Resize(resize, interpolation)``
and ``CenterCrop((height, width))``, or ``Resize((height, width), interpolation)`` for an input that is stretched; then
``ToTensor`` and ``Normalize``. So a network sees at the edge what it saw in training.
"""

import contextlib
import io
import logging
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bitneck.errors import ImageError
from bitneck.manifest import InputSpec

__all__ = [
    "MAX_ASPECT",
    "MAX_DECODED_BYTES",
    "MAX_PIXELS",
    "PHOTO_FORMATS",
    "PHOTO_SUFFIXES",
    "crop",
    "find_photos",
    "load_photo",
    "normalize",
    "opened_photo",
    "preprocess",
]

_LOG = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
"""Larger photographs are refused before they are decoded: a few kilobytes can claim gigapixels."""

MAX_DECODED_BYTES = 512 << 20
"""Memory that decoding may take, for all threads of the process together. A photograph of 100 megapixels takes 400 MB
as RGB; 16-bit, progressive and rotated ones take more for each pixel."""

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

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


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
        with _image_errors(where), _QUIET(), _opened(source) as image:
            _check_size(image, where, max_pixels)
            memory.enter_context(_MEMORY.taken(_decoded_bytes(image, where)))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            upright = _to_rgb(image)
        yield upright


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


def _decoded_bytes(image: Image.Image, where: str) -> int:
    """Memory that decoding, turning upright and conversion to RGB take at most."""
    own = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "LA": 4, "PA": 4}.get(image.mode, 4)
    bytes_a_pixel = own if image.mode == "RGB" else own + _RGB_BYTES
    if image.getexif().get(0x0112, 1) not in (0, 1):  # Orientation: a turned copy
        bytes_a_pixel += own
    if image.info.get("progressive"):  # libjpeg keeps the coefficients of three components, 2 bytes each
        bytes_a_pixel += 6
    needed = image.width * image.height * bytes_a_pixel
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
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            break
        kind = data[at + 1]
        if kind == 0xD9:  # end of image
            break
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:  # stuffed byte, fill byte, or a marker without length
            at += 1 if kind == 0xFF else 2
            continue
        scans += kind == 0xDA
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return scans


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


class _Memory:
    """Bytes that threads share. One that asks for more than are left waits; the first one always gets its share."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Take bytes until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._total)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


_MEMORY = _Memory(MAX_DECODED_BYTES)


class _Quiet:
    """`warnings.catch_warnings` for threads: the first one in silences them, the last one out restores the filters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._caught.__exit__(None, None, None)


_QUIET = _Quiet()


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


def crop(image: Image.Image, spec: InputSpec) -> Image.Image:
    """The part of a photograph that the network sees, at the input's height and width.

    With ``crop`` the short side is resized to ``spec.resize`` and the centre is cut out; with ``stretch`` the whole
    photograph is resized, whatever its shape.

    Args:
        image: RGB, any size.
        spec: the backbone's input.

    Returns:
        RGB, ``spec.height`` x ``spec.width``.

    Raises:
        ImageError: the picture is so long and narrow that resizing it would exceed the pixel limit.
    """
    width, height = image.size
    if spec.resize is None:
        if spec.width * height > MAX_PIXELS:  # Pillow resizes along x first
            raise ImageError(f"a picture of {width}x{height} pixels is too long and narrow; crop it first")
        if (width, height) == (spec.width, spec.height):
            return image
        return image.resize((spec.width, spec.height), _RESAMPLING[spec.interpolation])
    short, long = min(width, height), max(width, height)
    resized_long = int(spec.resize * long / short)
    if resized_long * spec.resize > MAX_PIXELS:
        raise ImageError(f"a picture of {width}x{height} pixels is too long and narrow; crop it first")
    if short != spec.resize:
        new = (spec.resize, resized_long) if width <= height else (resized_long, spec.resize)
        image = image.resize(new, _RESAMPLING[spec.interpolation])
    left = round((image.width - spec.width) / 2.0)
    top = round((image.height - spec.height) / 2.0)
    return image.crop((left, top, left + spec.width, top + spec.height))


def normalize(image: Image.Image, spec: InputSpec) -> NDArray[np.float32]:
    """Scale to 0..1, subtract the mean, divide by the standard deviation.

    Args:
        image: RGB, H x W.
        spec: the backbone's input.

    Returns:
        (1, 3, H, W) float32.
    """
    x = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # (3, H, W); planes first: 12 times faster
    x /= np.float32(255.0)
    x -= np.array(spec.mean, dtype=np.float32)[:, None, None]
    x /= np.array(spec.std, dtype=np.float32)[:, None, None]
    return x[None]


def preprocess(image: Image.Image, spec: InputSpec) -> NDArray[np.float32]:
    """`crop`, then `normalize`: (1, 3, H, W) float32."""
    return normalize(crop(image, spec), spec)
