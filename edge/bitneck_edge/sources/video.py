"""Videos, network streams and cameras, decoded with PyAV, which the extra ``video`` installs."""

import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from bitneck.errors import ImageError, InvalidConfig
from bitneck.image import resized_size
from bitneck.manifest import InputSpec
from bitneck_edge.sources.capture import Capture

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["MAX_VIDEO_PIXELS", "is_live", "read_video", "require_av"]

_CAMERA = "camera:"

_OPEN_S, _READ_S = 10.0, 5.0
"""Timeouts of a live source: to open it, and between two pictures."""
MAX_VIDEO_PIXELS = 1 << 25
"""Pixels of a picture of a video, at most: 8K (7680x4320) fits. Larger ones are refused before they are decoded."""
_PIXELS_AT_ONCE = 4096 * 2304
_MOST_TRACKS = 8
_MOST_BROKEN = 25
"""Pictures in a row that cannot be decoded, after which a video counts as broken."""
_USUAL_RATE = 25.0
"""Pictures a second of a video that says neither its rate nor any time."""
_BACK_S = 0.01
_LAST_S = 1.5
"""A video was shown to its end if its last picture begins at most this long before its end; sound may be longer."""


def is_live(name: str) -> bool:
    """Whether a source is a camera or a network stream, whose pictures come at their own pace."""
    return name.startswith(_CAMERA) or "://" in name


def require_av() -> Any:
    """The module of PyAV.

    Raises:
        InvalidConfig: it is not installed.
    """
    try:
        import av
    except ImportError as exc:
        raise InvalidConfig(f"video and cameras need `pip install 'bitneck[video]'` ({exc})") from exc
    return av


def read_video(
    name: str,
    fps: float | None,
    complete: threading.Event | None = None,
    spec: Callable[[], InputSpec | None] = lambda: None,
) -> Iterator[Capture]:
    """The pictures of a video or camera, decoded and upright.

    Args:
        name: a file, a URL, or ``camera:`` and a number or name.
        fps: leave out pictures of a video file, down to this many a second; None for all.
        complete: set after the last picture, if the source has a known duration and was shown to its end.
        spec: asked with each picture for an input; pictures that are finer than it needs are scaled before they become
            RGB. None for whole ones.

    Raises:
        ImageError: it cannot be opened, has no pictures or too large ones, breaks off, or too many pictures in a row
            are broken. A broken picture alone is a capture with an error.
    """
    av = require_av()
    live = is_live(name)
    file, file_format = _device(name)
    try:
        timeout = (_OPEN_S, _READ_S) if live else None
        # FFmpeg decodes some pictures of each track to learn its format: the limit holds for these too.
        probe = [{"max_pixels": str(MAX_VIDEO_PIXELS)}] * _MOST_TRACKS
        with _opened(av, file, format=file_format, timeout=timeout, stream_options=probe) as container:
            if not container.streams.video:
                raise ImageError(f"{name}: no video in it")
            stream = container.streams.video[0]
            _check_size(name, stream.codec_context)
            pictures, clock = 0, _Clock(fps if not live else None, float(stream.average_rate or 0))
            for number, frame in enumerate(_decoded(name, container, stream)):
                if isinstance(frame, ImageError):
                    yield Capture(b"", f"{name}#{number}", similar=True, broken=frame)
                    continue
                pictures += 1
                if clock.wants(frame.time):
                    yield Capture(
                        _upright(frame, spec()), f"{name}#{number}", unix_us=time.time_ns() // 1000 if live else 0,
                        similar=True,
                    )  # fmt: skip
            if not pictures:
                raise ImageError(f"{name}: no picture in it")
            if complete is not None and _shown_to_its_end(container, stream, clock.shown_s):
                complete.set()
    except (av.FFmpegError, OSError, ValueError) as exc:
        raise ImageError(f"{name}: cannot be read as video ({exc})") from exc


def _shown_to_its_end(container: Any, stream: Any, shown_s: float) -> bool:
    """Whether the picture of this time is the last one; False if the duration is unknown.

    Some containers count the duration from their start time, others from zero.
    """
    if not container.duration:
        return False
    duration, start = container.duration / 1e6, (container.start_time or 0) / 1e6
    end: float = duration if duration > start else start + duration
    rate = float(stream.average_rate or 0)
    return shown_s >= end - max(_LAST_S, 2 / rate if rate else 0.0)


def _device(name: str) -> tuple[str, str | None]:
    """The file that FFmpeg opens for a source, and the format to open it with; None for FFmpeg's guess."""
    if not name.startswith(_CAMERA):
        return name, None
    device = name.removeprefix(_CAMERA)
    if sys.platform == "darwin":
        return device, "avfoundation"
    return (f"/dev/video{device}" if device.isdigit() else device), "v4l2"


class _Clock:
    """Which pictures of a video are taken, by their times.

    A clock that goes back, as where recordings were joined, starts anew. Pictures without a time come at the video's
    average rate.

    Args:
        fps: pictures a second that are taken at most; None for all.
        rate: the video's average rate; 0 if unknown.
    """

    def __init__(self, fps: float | None, rate: float) -> None:
        self.shown_s = 0.0
        self._interval = 1.0 / fps if fps else 0.0
        self._step = 1.0 / (rate or _USUAL_RATE)
        self._due = 0.0
        self._begun = False

    def wants(self, at: float | None) -> bool:
        """Whether to take the next picture, whose time in the video is `at` seconds, or unknown."""
        before = self.shown_s
        self.shown_s = at if at is not None else before + self._step if self._begun else 0.0
        if self.shown_s < before - _BACK_S:
            self._due = self.shown_s
        self._begun = True
        if self.shown_s < self._due - 1e-6:
            return False
        self._due = max(self._due, self.shown_s - self._interval) + self._interval
        return True


def _decoded(name: str, container: Any, stream: Any) -> "Iterator[VideoFrame | ImageError]":
    """The pictures of a track; one that cannot be decoded is an error in its place, and too many in a row raise it."""
    av = require_av()
    broken = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except (av.FFmpegError, ValueError) as exc:
            error = ImageError(f"{name}: a picture cannot be decoded ({exc})")
            broken += 1
            if broken >= _MOST_BROKEN:
                raise ImageError(f"{name}: {broken} pictures in a row cannot be decoded; the last one: {exc}") from exc
            yield error
            continue
        for frame in frames:
            broken = 0
            yield frame


def _opened(av: Any, file: str, **values: Any) -> Any:
    """Open a container for reading; FFmpeg takes options for each track that it finds, and no more."""
    for tracks in range(len(values["stream_options"]), -1, -1):
        try:
            return av.open(file, **values | {"stream_options": values["stream_options"][:tracks]})
        except ValueError:
            if not tracks:
                raise
    raise AssertionError("unreachable")


def _check_size(name: str, codec: Any) -> None:
    """Refuse gigantic pictures before one is decoded, also where a track becomes larger in its middle."""
    if codec.width * codec.height > MAX_VIDEO_PIXELS:
        raise ImageError(
            f"{name}: pictures of {codec.width}x{codec.height} pixels, a video has at most {MAX_VIDEO_PIXELS} (8K)"
        )
    if not codec.width:  # the limit held while FFmpeg looked at the first pictures, or these are broken
        raise ImageError(
            f"{name}: its pictures have more than {MAX_VIDEO_PIXELS} pixels (8K), or are damaged from the beginning"
        )
    codec.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
    # Decoding several pictures at once takes their memory several times.
    codec.thread_type = "AUTO" if codec.width * codec.height <= _PIXELS_AT_ONCE else "SLICE"


def _upright(frame: "VideoFrame", spec: InputSpec | None) -> Image.Image:
    """A picture as a player shows it: turned and mirrored as its display matrix says.

    Args:
        frame: as decoded.
        spec: the input that it is for, if it need not be finer.
    """
    turn = None
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = struct.unpack("<9i", bytes(matrix)[:36])
        turn = _TURNS.get(tuple(round(value / 65536) for value in (a, b, c, d)))
    if spec is not None:
        turned = turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, *_MIRRORED_TURNS)
        width, height = resized_size((frame.width, frame.height), spec, turned=turned)
        if width <= frame.width and height <= frame.height:
            # FFmpeg scales the planes as they were decoded, mostly with half the colours: less than half of RGB.
            kind = _SCALERS[spec.interpolation]
            frame = frame.reformat(width=width, height=height, format="rgb24", interpolation=kind)
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    return image.transpose(turn) if turn is not None else image


_MIRRORED_TURNS = (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE)
_SCALERS = {"nearest": "POINT", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS"}
"""FFmpeg's scaler, by the input's interpolation."""


_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # clockwise by a quarter; PIL counts the other way
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""By the first two rows and columns of a display matrix: x' = a x + c y, y' = b x + d y."""
