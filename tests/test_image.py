"""Photographs: any file to upright RGB or a clear error; preprocessing equal to torchvision's."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitneck.errors import ImageError
from bitneck.image import crop, find_photos, load_photo, preprocess
from bitneck.manifest import InputSpec
from bitneck_models.networks.vision import import_torchvision
from bitneck_testing.photographs import photo, photo_bytes

SIZES = ((500, 375), (375, 500), (256, 256), (257, 256), (224, 300), (90, 61), (31, 1000), (1024, 768), (1, 1), (3, 2))


def spec(interpolation: str) -> InputSpec:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return InputSpec(height=224, width=224, resize=256, interpolation=interpolation, mean=mean, std=std)  # type: ignore[arg-type]


def changed(spec: InputSpec, **values: object) -> InputSpec:
    return InputSpec(**(spec.model_dump() | values))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "fit",
    [
        {},
        {"height": 160},
        {"width": 97, "resize": 230},
        {"fit": "stretch", "resize": None},
        {"fit": "stretch", "resize": None, "height": 90, "width": 61},
        {"fit": "stretch", "resize": None, "height": 120},
    ],
)
def test_preprocess_equals_torchvision(interpolation: str, size: tuple[int, int], fit: dict[str, object]) -> None:
    import_torchvision()
    from torchvision import transforms

    image, s = photo(3, size), changed(spec(interpolation), **fit)
    mode = transforms.InterpolationMode(interpolation)
    if s.fit == "crop":
        fitted = [transforms.Resize(s.resize, mode), transforms.CenterCrop((s.height, s.width))]
    else:
        fitted = [transforms.Resize((s.height, s.width), mode)]
    reference = transforms.Compose([*fitted, transforms.ToTensor(), transforms.Normalize(s.mean, s.std)])(image)
    x = preprocess(image, s)
    assert x.shape == (1, 3, s.height, s.width)
    assert x.dtype == np.float32
    assert torch.allclose(torch.from_numpy(x[0]), reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    upright = load_photo(path)
    assert upright.size == ((40, 20) if orientation <= 4 else (20, 40))
    corner = {1: (0, 0), 2: (-1, 0), 3: (-1, -1), 4: (0, -1), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}[
        orientation
    ]
    x, y = (upright.size[k] - 1 if corner[k] else 0 for k in (0, 1))
    assert upright.getpixel((x, y)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (32, 1))
    base = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = base.convert("RGB").convert(mode)
    path = tmp_path / "photo.tif"
    image.save(path)
    loaded = np.asarray(load_photo(path))
    assert loaded.shape == (32, 32, 3)
    if mode not in ("1", "P", "CMYK", "YCbCr"):
        assert np.abs(loaded[..., 0].astype(int) - grey).max() <= 1


def test_refused_files_say_which(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    photo(0, (300, 200)).save(whole)
    bad = {
        "text.jpg": b"not an image at all",
        "empty.png": b"",
        "cut.jpg": whole.read_bytes()[:900],
    }
    png = tmp_path / "whole.png"
    photo(0, (300, 200)).save(png)
    bad["cut.png"] = png.read_bytes()[: png.stat().st_size // 2]
    bad["huge.png"] = _claims(50_000, 50_000)
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=name):
            load_photo(tmp_path / name)
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        load_photo(tmp_path / "missing.jpg")
    for path, text in ((tmp_path, "Is a directory"), (tmp_path / ("long" * 100), "File name too long")):
        with pytest.raises(ImageError, match=f"cannot be read \\({text}\\)") as caught:
            load_photo(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="<19 bytes>: not an image"):
        load_photo(b"not an image at all")
    with pytest.raises(ImageError, match="limit of 100"):
        load_photo(whole, max_pixels=100)


def _claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a gigantic picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_jpeg_cut_or_damaged_anywhere_is_a_picture_or_an_image_error() -> None:
    """Never another exception or a warning, whatever the damage."""
    rng = np.random.default_rng(0)
    for fmt in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        good = photo_bytes(1, fmt)
        for _ in range(60):
            bad = bytearray(good[: rng.integers(1, len(good) + 1)])
            for k in rng.integers(0, len(bad), 3):
                bad[k] ^= 1 << rng.integers(0, 8)
            with contextlib.suppress(ImageError):
                assert load_photo(bytes(bad), max_pixels=1_000_000).mode == "RGB"


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    image, exif = Image.new("RGB", (64, 32), "blue"), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 32, 32))
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95, subsampling=0)
    upright = load_photo(buffer.getvalue())
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 4))[0] > 240  # type: ignore[index]
    assert upright.getpixel((16, 60))[2] > 240  # type: ignore[index]


def test_transparency_is_dropped_and_the_first_picture_counts(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.info["transparency"] = b"\x00\x80"
    palette.save(tmp_path / "palette.png")
    assert load_photo(tmp_path / "palette.png").getpixel((0, 0)) == (10, 200, 30)
    Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(tmp_path / "clear.png")
    assert load_photo(tmp_path / "clear.png").getpixel((0, 0)) == (9, 8, 7)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_photo(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2001, 2)])
def test_pictures_as_long_as_a_thread_are_refused_by_name(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "thread.png")
    with pytest.raises(ImageError, match=r"thread\.png: .* too long and narrow"):
        load_photo(tmp_path / "thread.png")
    Image.new("RGB", (1, 1000)).save(tmp_path / "strip.png")
    assert preprocess(load_photo(tmp_path / "strip.png"), spec("bilinear")).shape == (1, 3, 224, 224)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(224, 224), (224, 256), (31, 33)]))
@settings(max_examples=40, deadline=None)
def test_any_picture_fills_the_input(width: int, height: int, sizes: tuple[int, int]) -> None:
    cut = changed(spec("bilinear"), height=sizes[0], width=sizes[0] - 3, resize=sizes[1])
    for s in (cut, changed(cut, fit="stretch", resize=None)):
        white = crop(Image.new("RGB", (width, height), "white"), s)
        assert white.getextrema() == ((255, 255),) * 3  # nothing was filled in
        assert white.size == (sizes[0] - 3, sizes[0])


def test_long_and_narrow_pictures() -> None:
    s = spec("bilinear")
    assert crop(Image.new("RGB", (5000, 10)), s).size == (224, 224)
    with pytest.raises(ImageError, match="too long and narrow"):
        crop(Image.new("RGB", (5000, 1)), changed(s, resize=4096))
    stretched = changed(s, width=60_000, fit="stretch", resize=None)
    assert crop(Image.new("RGB", (1, 1600)), stretched).size == (60_000, 224)
    with pytest.raises(ImageError, match="too long and narrow"):
        crop(Image.new("RGB", (1, 1700)), stretched)


def test_find_photos(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.PNG", "b/a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_photos(tmp_path)] == ["a.jpg", "z.PNG"]
    assert find_photos(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no photographs"):
        find_photos(tmp_path / "empty")
    with pytest.raises(ImageError, match="no such file or folder"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="File name too long"):
        find_photos(tmp_path / ("long" * 100))


def test_other_formats_are_not_even_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for EPS, whatever the file's name says."""
    marker = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "photo.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ImageError, match=r"photo\.jpg: not an image"):
        load_photo(tmp_path / "photo.jpg")
    assert not marker.exists()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero")):
        with pytest.raises(ImageError, match="not a regular file"):
            load_photo(path)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    photo(0, (30, 20)).save(tmp_path / "a.png")
    assert find_photos(tmp_path) == [tmp_path / "a.png"]


def _grey_png(width: int, height: int) -> bytes:
    """A PNG of 16-bit grey, all black, whose file is small."""
    compressor = zlib.compressobj()
    row = b"\0" + bytes(2 * width)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
        + _chunk(b"IDAT", data)
        + _chunk(b"IEND", b"")
    )


def _peak_mib(code: str, *arguments: str) -> float:
    """Peak memory that a child process needs beyond what it has after its imports."""
    program = (
        "import sys, resource, threading\nfrom pathlib import Path\n"
        "from bitneck.image import load_photo, opened_photo\nfrom bitneck.errors import ImageError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"{code}\nprint((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_deep_pictures_count_with_their_depth_and_are_scaled_in_strips(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(_grey_png(8000, 7000))
    (tmp_path / "deeper.png").write_bytes(_grey_png(10_000, 10_000))
    with pytest.raises(ImageError, match=r"deeper\.png: .*MiB to decode, more than the limit of 512"):
        load_photo(tmp_path / "deeper.png")
    # 56 megapixels: 2 bytes each as they are, 4 as RGB, and a strip.
    assert _peak_mib("load_photo(Path(sys.argv[1]))", str(tmp_path / "deep.png")) < 56 * 6 * 1e6 / 2**20 + 100


def test_two_threads_do_not_take_twice_the_memory(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(_grey_png(8000, 7000))
    code = """
def work():
    with opened_photo(Path(sys.argv[1])) as image:
        image.getpixel((0, 0))
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    assert _peak_mib(code, str(tmp_path / "deep.png")) < 512 + 100


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    photo(0, (64, 48)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert load_photo(data).size == (64, 48)
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff\xda", start + 2)
    many = data[:start] + data[start:end] * 300 + data[end:]
    with pytest.raises(ImageError, match="more than 100 scans"):
        load_photo(many)
    thumbnail = Image.Exif()
    thumbnail[0x010E] = "\xff\xda" * 200  # in a segment, where it is no scan
    photo(0, (64, 48)).save(buffer := io.BytesIO(), "JPEG", exif=thumbnail)
    assert load_photo(buffer.getvalue()).size == (64, 48)


def test_deep_grey_is_scaled_by_its_finite_values(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 4000, 40, dtype=np.float32), (30, 1))
    values[3], values[5, 0] = np.inf, np.nan
    Image.fromarray(values).save(tmp_path / "inf.tif")
    loaded = np.asarray(load_photo(tmp_path / "inf.tif"))[..., 0].astype(int)
    assert np.abs(loaded[10] - np.linspace(0, 255, 40)).max() <= 1
    assert (loaded[3] == 255).all()
    assert loaded[5, 0] == 0
    values = np.tile(np.linspace(-1, 1, 41, dtype=np.float32), (30, 1))
    values[4] = -np.inf
    Image.fromarray(values).save(tmp_path / "negative.tif")
    loaded = np.asarray(load_photo(tmp_path / "negative.tif"))[..., 0].astype(int)
    assert np.abs(loaded[0] - np.linspace(0, 255, 41)).max() <= 1
    assert (loaded[4] == 0).all()


def test_photographs_of_phones_are_read_with_the_extra_and_named_without(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "phone.heic"
    pillow_heif.from_pillow(photo(1, (64, 48))).save(path)
    assert load_photo(path).size == (64, 48)
    assert find_photos(tmp_path) == [path]
    code = (
        "import sys; sys.modules['pillow_heif'] = None\nfrom pathlib import Path\n"
        "from bitneck.image import load_photo\nload_photo(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "bitneck[heif]" in done.stderr.splitlines()[-1]


def test_other_names_of_jpeg_are_found_and_the_rest_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jfif", "b.jpe", "c.mpo", "d.txt", "e.txt", "f.raw"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level("INFO", logger="bitneck.image"):
        assert [p.name for p in find_photos(tmp_path)] == ["a.jfif", "b.jpe", "c.mpo"]
    assert "3 files are skipped" in caplog.text
    assert "2 of .txt" in caplog.text
