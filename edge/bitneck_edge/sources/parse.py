"""The sources that a command line names, checked as far as possible without opening them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitneck.errors import ImageError, InvalidConfig
from bitneck.image import find_photos
from bitneck_edge.sources.video import is_live, require_av
from bitneck_edge.sources.watch import Watch, check_watch

__all__ = ["VIDEO_SUFFIXES", "Source", "parse_sources"]

VIDEO_SUFFIXES = frozenset(
    {".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v"}
    | {".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
    | {".y4m"}
)
"""Files with these suffixes are videos; any other file is a photograph."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of pictures.

    Attributes:
        name: as the user wrote it: a path, ``-``, a URL, or ``camera:`` and a number or name.
        photos: the photographs of a path that is no video.
        watch: how a folder is watched; None of what is none.
    """

    name: str
    photos: tuple[Path, ...] = ()
    watch: Watch | None = None

    @property
    def endless(self) -> bool:
        """Whether its pictures come at their own pace, and their number is unknown."""
        return self.live or self.stdin or self.watch is not None

    @property
    def live(self) -> bool:
        """Whether it is a camera or a network stream, whose pictures come at their own pace."""
        return self.watch is None and is_live(self.name)

    @property
    def video(self) -> bool:
        """Whether it is read with PyAV."""
        return self.watch is None and (self.live or Path(self.name).suffix.lower() in VIDEO_SUFFIXES)

    @property
    def stdin(self) -> bool:
        """Whether paths are read from standard input, a line each."""
        return self.watch is None and self.name == "-"


def parse_sources(names: Sequence[str], folders: Sequence[Path] = (), watch: Watch | None = None) -> list[Source]:
    """The sources of a command line.

    Args:
        names: of the sources.
        folders: to watch; at most one, because watching does not end.
        watch: how.

    Raises:
        InvalidConfig: nothing is named, standard input is named twice or closed, more than one folder is to be watched,
            or a video is named and PyAV is not installed.
        ImageError: there is no such file.
    """
    if not names and not folders:
        raise InvalidConfig("name photographs, folders, videos or cameras to send, or a folder to watch (--watch)")
    if len(folders) > 1:
        raise InvalidConfig("one folder can be watched, with all that is below it; start a second client for another")
    sources = [Source(name) for name in names]
    if sum(source.stdin for source in sources) > 1:
        raise InvalidConfig("standard input (-) can be read once only")
    if sys.stdin is None and any(source.stdin for source in sources):
        raise InvalidConfig("standard input is closed, so no paths can be read from it (-)")
    if any(source.video for source in sources):
        require_av()
    for k, source in enumerate(sources):
        if source.video and not source.live and not Path(source.name).is_file():
            raise ImageError(f"{source.name}: no such video")
        if not source.video and not source.stdin:
            sources[k] = Source(source.name, tuple(find_photos(Path(source.name))))
    for folder in folders:
        check_watch(folder)
        sources.append(Source(str(folder), watch=watch or Watch()))
    return sources
