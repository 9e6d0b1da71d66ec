"""Photographs to the backbone's input, without torch.

The result equals that of torchvision on PIL images, within 1e-6 (a test holds that): ``Resize(resize, interpolation)``
and ``CenterCrop((height, width))``, or ``Resize((height, width), interpolation)`` for an input that is stretched; then
``ToTensor`` and ``Normalize``. So a network sees at the edge what it saw in training.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bitneck.errors import ImageError
from bitneck.manifest import InputSpec

__all__ = ["MAX_ASPECT", "MAX_PIXELS", "PHOTO_SUFFIXES", "crop", "find_photos", "load_photo", "normalize", "preprocess"]

MAX_PIXELS = 100_000_000
"""Larger photographs are refused before they are decoded: a few kilobytes can claim gigapixels."""

MAX_ASPECT = 1000
"""Longer and narrower pictures are refused: scaled until the short side fills the input, they would be gigantic."""

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
"""What `find_photos` takes from a folder."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def find_photos(source: Path) -> list[Path]:
    """The photographs of a path: the file itself, or those in the folder and below it, sorted.

    Raises:
        ImageError: no such path, a folder without photographs, or one that cannot be read.
    """
    try:
        if not source.is_dir():
            if not source.exists():
                raise ImageError(f"{source}: no such file or folder")
            return [source]
        photos = sorted(p for p in source.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file())
    except OSError as exc:
        raise ImageError(f"{source}: cannot be read ({exc.strerror})") from exc
    if not photos:
        raise ImageError(f"{source}: no photographs in this folder; looked for {', '.join(sorted(PHOTO_SUFFIXES))}")
    return photos


def load_photo(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a photograph as upright RGB.

    The EXIF orientation is applied. Any mode becomes RGB: 16-bit and float grey are scaled to 8 bits, CMYK, palette
    and YCbCr are converted, transparency is dropped. An animation gives its first picture.

    Args:
        source: a file, or a file's bytes.
        max_pixels: the decompression-bomb limit, width * height.

    Raises:
        ImageError: no such file, not an image, cut short, more pixels than `max_pixels`, or more than `MAX_ASPECT`
            times as long as wide.
    """
    where = str(source) if isinstance(source, Path) else f"<{len(source)} bytes>"
    try:
        with (
            _QUIET(),  # Pillow warns of bombs and metadata; the limit below is ours
            Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image,
        ):
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{where}: {width}x{height} pixels, more than the limit of {max_pixels}; shrink the photograph"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(f"{where}: {width}x{height} pixels, too long and narrow; crop it first")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright if upright is not None else image)
    except ImageError:
        raise
    except FileNotFoundError as exc:
        raise ImageError(f"{where}: no such file") from exc
    except UnidentifiedImageError as exc:
        raise ImageError(f"{where}: not an image, or of a format that Pillow does not read") from exc
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{where}: {exc}") from exc
    except OSError as exc:
        reason = f"cannot be read ({exc.strerror})" if exc.errno is not None else f"damaged or cut short ({exc})"
        raise ImageError(f"{where}: {reason}") from exc
    except Exception as exc:  # Pillow's decoders raise SyntaxError, ValueError, struct.error and more
        raise ImageError(f"{where}: damaged or cut short ({exc})") from exc


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
        grey = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(np.nan_to_num(grey).max(initial=0.0)))
        grey = np.clip(np.nan_to_num(grey) * (255.0 / top), 0, 255)
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
