"""Pictures with little work: decoded no finer than needed, only the seen part resized, turned last; arrays; videos."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.errors import ImageError
from bitneck.image import opened_reduced, preprocess, resized_size, sharing
from bitneck.manifest import InputSpec
from bitneck_edge import Pixels
from bitneck_edge.answers.results import Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.sources.capture import Capture
from bitneck_edge.sources.photo import Photo, input_of, photo_of, picture_of
from bitneck_edge.sources.video import read_video
from bitneck_testing.measuring import COMPUTING, PREPARING, TimeInside
from bitneck_testing.photographs import photo
from bitneck_testing.rogue_servers import answer_all, rogue_server

HALF = (0.5, 0.5, 0.5)
CROP = InputSpec(height=224, width=224, resize=256, interpolation="bicubic", mean=HALF, std=(0.2, 0.5, 0.9))
ODD = InputSpec(height=100, width=131, resize=140, interpolation="bilinear", mean=HALF, std=HALF)
STRETCH = InputSpec(height=96, width=160, fit="stretch", interpolation="bilinear", mean=HALF, std=HALF)
SPECS = pytest.mark.parametrize("spec", [CROP, ODD, STRETCH], ids=["crop", "odd", "stretch"])


def smooth(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0])
    return Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def saved(picture: Image.Image, kind: str = "PNG", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def both(data: Photo, spec: InputSpec) -> tuple[np.ndarray, np.ndarray]:
    with input_of(data, spec, exact=True) as (exact, _), input_of(data, spec, exact=False) as (fast, _):
        return exact, fast


@SPECS
@pytest.mark.parametrize("size", [(500, 377), (301, 640), (257, 256), (90, 70), (256, 256), (160, 96)])
def test_the_same_places_are_sampled_whatever_the_orientation(spec: InputSpec, size: tuple[int, int]) -> None:
    for orientation in range(1, 9):
        exact, fast = both(saved(smooth(size), orientation=orientation), spec)
        assert exact.shape == fast.shape == (1, 3, spec.height, spec.width)
        assert np.abs(exact - fast).max() < 0.05, orientation  # a place beside it would be off by far more


@SPECS
def test_a_large_jpeg_is_decoded_no_finer_than_needed(spec: InputSpec) -> None:
    for orientation in (1, 6):
        data = saved(smooth((2400, 1800)), "JPEG", orientation, quality=90)
        with opened_reduced(data, spec) as (image, turn):
            assert turn == orientation
            needed = resized_size((2400, 1800), spec, turned=orientation == 6)
            assert image.width < 2400 / 3
            assert all(has >= wants for has, wants in zip(image.size, needed, strict=True))
        exact, fast = both(data, spec)
        assert np.abs(exact - fast).mean() < 0.01


def test_no_jpeg_becomes_coarser_than_the_input() -> None:
    for size in ((300, 300), (511, 900), (512, 512), (70, 60)):
        with opened_reduced(saved(smooth(size), "JPEG"), CROP) as (image, _):
            assert image.size == size or min(image.size) >= 256


def test_limits_hold_for_the_whole_photograph() -> None:
    data = saved(smooth((2000, 1500)), "JPEG")
    with (
        pytest.raises(ImageError, match=r"2000x1500 pixels, more than the limit of 1000"),
        opened_reduced(data, CROP, max_pixels=1000),
    ):
        pass
    with pytest.raises(ImageError, match="too long and narrow"), opened_reduced(saved(smooth((4004, 4)), "JPEG"), CROP):
        pass


def test_memory_counts_at_the_size_that_is_decoded() -> None:
    plain, progressive = (saved(smooth((2400, 1800)), "JPEG", progressive=p) for p in (False, True))
    taken = []
    for data in (plain, progressive):
        with opened_reduced(data, CROP) as (image, _):
            taken.append(sharing.MEMORY._taken)
            assert sharing.MEMORY._taken < 2400 * 1800 * 4 + 2400 * 1800 * 6
            assert sharing.MEMORY._taken >= image.width * image.height * 4
    assert taken[1] - taken[0] == 2400 * 1800 * 6  # libjpeg keeps the whole photograph's coefficients
    assert sharing.MEMORY._taken == 0


# What counts as a photograph


def test_what_benchmarks_time_is_what_an_encoder_calls(tiny_bundle: Bundle) -> None:
    encoder = EdgeEncoder(tiny_bundle, threads=1)
    with TimeInside(COMPUTING, *PREPARING) as inside:
        encoder.encode(photo(), "s1-r1")
    assert min(inside.seconds) > 0


def test_arrays_say_their_order(tiny_bundle: Bundle) -> None:
    picture = smooth((120, 90))
    rgb = np.asarray(picture)
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    spec = tiny_bundle.manifest.input
    for exact in (True, False):
        with input_of(picture, spec, exact=exact) as (expected, _):
            for array in (Pixels(rgb, "rgb"), Pixels(bgr, "bgr"), Pixels(rgb[:, :, ::-1], "bgr")):
                with input_of(array, spec, exact=exact) as (x, _):
                    assert np.abs(x - expected).max() < 1e-6
    assert np.array_equal(np.asarray(picture_of(Pixels(bgr, "bgr"))), rgb)
    with input_of(Pixels(rgb[:, :, 0], "rgb"), spec, exact=False) as (x, _):
        assert np.array_equal(x[0, 0], x[0, 1])  # grey
    encoder = EdgeEncoder(tiny_bundle, threads=1)
    symbols = [encoder.encode(p, "s1-r2").encoded.symbols for p in (picture, Pixels(bgr, "bgr"))]
    assert np.array_equal(*symbols)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"Pixels\(array, 'bgr'\)"),
        (3, "int is no photograph"),
        (None, "NoneType is no photograph"),
        (io.StringIO("text"), "mode 'rb'"),
    ],
)
def test_what_is_no_photograph_says_what_to_do(given: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        photo_of(given)
    broken = Capture.of(given).broken
    assert broken is not None


@pytest.mark.parametrize(
    ("array", "order", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "rgb", "expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), "rgb", r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "rgb", "shape"),
        (np.zeros((4,), np.uint8), "rgb", "shape"),
        (np.zeros((4, 4, 3), np.uint8), "hsv", "expected 'rgb' or 'bgr'"),
        ([[1]], "rgb", "expected uint8"),
    ],
)
def test_arrays_that_are_refused(array: Any, order: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message), input_of(Pixels(array, order), CROP, exact=False):
        pass


async def test_paths_as_text_and_file_objects(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    photo(1).save(path)
    async with rogue_server(tiny_bundle, answer_all) as (address, _):
        async with EdgeClient(address, cache_dir=tmp_path / "cache", threads=1) as client:
            with path.open("rb") as file:
                given = [str(path), file, io.BytesIO(path.read_bytes()), bytearray(path.read_bytes()), 7]
                results = [result async for result in client.stream(given)]  # type: ignore[arg-type]
    assert [result.file for result in results[:2]] == [str(path), str(path)]
    assert [isinstance(result, Failure) for result in results] == [False] * 4 + [True]


def test_a_picture_that_the_program_has_is_not_copied_and_not_changed(tiny_bundle: Bundle) -> None:
    picture = smooth((300, 200))
    before = picture.tobytes()
    EdgeEncoder(tiny_bundle, threads=1).encode(picture, "s1-r2")
    assert (picture.size, picture.tobytes()) == ((300, 200), before)


def test_exact_is_todays_arithmetic(tiny_bundle: Bundle) -> None:
    data = saved(smooth((640, 480)), "JPEG")
    with input_of(data, CROP, exact=True) as (x, _):
        assert np.array_equal(x, preprocess(Image.open(io.BytesIO(data)).convert("RGB"), CROP))


# Videos


def test_pictures_of_a_video_are_scaled_before_they_become_rgb(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.bit_rate = 8_000_000
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(smooth((1280, 720)))))
        container.mux(stream.encode())
    whole = [capture.photo for capture in read_video(str(path), None)]
    for spec in (CROP, STRETCH):
        pictures = read_video(str(path), None, spec=lambda spec=spec: spec)  # type: ignore[misc]
        small = [capture.photo for capture in pictures]
        assert len(small) == len(whole) == 3
        assert isinstance(small[0], Image.Image)
        assert small[0].size == resized_size((1280, 720), spec)
        with input_of(whole[0], spec, exact=True) as (a, _), input_of(small[0], spec, exact=False) as (b, _):
            assert np.abs(a - b).mean() < 0.03
    huge = CROP.model_copy(update={"resize": 800, "height": 700, "width": 700})
    (first, *_) = [capture.photo for capture in read_video(str(path), None, spec=lambda: huge)]
    assert isinstance(first, Image.Image)
    assert first.size == (1280, 720)  # never enlarged here
