"""Photographs: generated ones of any size, and scikit-image's own."""

import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["add_photos", "photo", "photo_bytes", "sample_photo"]


def photo(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture: a few pixels of noise, enlarged to `size`, (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def photo_bytes(seed: int = 0, fmt: str = "PNG") -> bytes:
    """The picture of `photo` as a file of a format that Pillow writes."""
    buffer = io.BytesIO()
    photo(seed).save(buffer, fmt)
    return buffer.getvalue()


def add_photos(folder: Path, numbers: range) -> None:
    """Write photographs of 60x50 pixels, made from these seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in numbers:
        photo(k, (60, 50)).save(folder / f"{k:02d}.png")


def sample_photo(name: str = "coffee.png") -> Path:
    """The path of a photograph that scikit-image installs."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / name
