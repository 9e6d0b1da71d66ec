"""Videos, network streams and cameras, decoded with PyAV, which the extra ``video`` installs."""

import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from bitneck.errors import ImageError, InvalidConfig
from bitneck_edge.sources.capture import Capture

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["is_live", "read_video", "require_av"]

_CAMERA = "camera:"

_OPEN_S, _READ_S = 10.0, 5.0
"""Timeouts of a live source: to open it, and between two pictures."""
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


def read_video(name: str, fps: float | None, complete: threading.Event | None = None) -> Iterator[Capture]:
    """The pictures of a video or camera, decoded and upright.

    Args:
        name: a file, a URL, or ``camera:`` and a number or name.
        fps: leave out pictures of a video file, down to this many a second; None for all.
        complete: set after the last picture, if the source has a known duration and was shown to its end.

    Raises:
        ImageError: it cannot be opened, has no pictures, or breaks off.
    """
    av = require_av()
    live = is_live(name)
    file, file_format = _device(name)
    try:
        with av.open(file, format=file_format, timeout=(_OPEN_S, _READ_S) if live else None) as container:
            if not container.streams.video:
                raise ImageError(f"{name}: no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            due = 0.0
            shown_s: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                shown_s = frame.time if frame.time is not None else shown_s or 0.0
                if fps and not live and frame.time is not None:
                    if frame.time < due - 1e-6:
                        continue
                    due = max(due, frame.time - 1.0 / fps) + 1.0 / fps
                yield Capture(
                    _upright(frame), f"{name}#{number}", unix_us=time.time_ns() // 1000 if live else 0, similar=True
                )
            if shown_s is None:
                raise ImageError(f"{name}: no picture in it")
            if complete is not None and _shown_to_its_end(container, stream, shown_s):
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


def _upright(frame: "VideoFrame") -> Image.Image:
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
