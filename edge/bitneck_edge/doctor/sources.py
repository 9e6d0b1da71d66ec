"""What a client reads and writes: the sources that are named, the folder that is watched, the one for class maps."""

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, ImageError
from bitneck.text import counted
from bitneck_edge.doctor.finding import Finding
from bitneck_edge.sources.parse import Source, parse_sources
from bitneck_edge.sources.photo import picture_of
from bitneck_edge.sources.threads import in_thread
from bitneck_edge.sources.video import read_video
from bitneck_edge.sources.watch import is_network_folder, list_photos

__all__ = ["check_out", "check_sources", "check_watches"]

_SOURCE_S = 20.0


async def check_sources(names: Sequence[str]) -> list[Finding]:
    """Take a picture of each source. One that gives none in time fails."""
    return [await _source(name) for name in names]


async def _source(name: str) -> Finding:
    begun, disk = time.perf_counter(), DiskThread("bitneck-doctor-source")  # the program ends though it hangs
    try:
        async with asyncio.timeout(_SOURCE_S):
            (source,) = await disk.run(parse_sources, [name])
            if source.stdin:
                return Finding("source", "skipped", "standard input is not read here")
            size, more = await _first_picture(source, disk)
    except TimeoutError:
        return Finding("source", "failed", f"{name}: no picture within {_SOURCE_S:.0f} s", "is it sending?")
    except BitneckError as exc:
        return Finding("source", "failed", str(exc), _camera_advice(name) if name.startswith("camera:") else "")
    finally:
        disk.end()
    took = time.perf_counter() - begun
    return Finding("source", "ok", f"{name}: {size[0]}x{size[1]} pixels in {took:.1f} s{more}")


async def _first_picture(source: Source, disk: DiskThread) -> tuple[tuple[int, int], str]:
    """Width and height of its first picture, and what else there is."""
    if not source.video:
        picture = await disk.run(picture_of, source.photos[0])
        return picture.size, f"; {len(source.photos)} photographs" if len(source.photos) > 1 else ""
    async with contextlib.aclosing(in_thread(lambda: read_video(source.name, None))) as pictures:
        async for capture in pictures:
            if capture.broken is None:
                return (await disk.run(picture_of, capture.photo)).size, ""
    raise ImageError(f"{source.name}: it gave no picture")


def _camera_advice(name: str) -> str:
    """What to do about a camera that cannot be opened."""
    number = name.partition(":")[2]
    device = Path(f"/dev/video{number}")
    if not number.isdigit() or not device.exists():
        cameras = sorted(str(path) for path in Path("/dev").glob("video*"))
        return f"cameras here: {', '.join(cameras) or 'none'}; is it plugged in?"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"this user may not open {device}: add it to the group video"
    return "another program may use it"


def check_watches(folders: Sequence[Path]) -> list[Finding]:
    """Check the folder that is to be watched; more than one cannot be."""
    try:
        parsed = parse_sources((), folders) if folders else []
        return [_watch(Path(source.name)) for source in parsed]
    except (BitneckError, OSError) as exc:
        missing = [folder for folder in folders if not folder.is_dir()]
        advice = "make the folder, or name the one that photographs come into (--watch)" if missing else ""
        return [Finding("watch", "failed", str(exc), advice)]


def _watch(folder: Path) -> Finding:
    text = f"{folder}: {counted(len(list_photos(folder)), 'photograph is', 'photographs are')} there"
    if is_network_folder(folder):
        return Finding("watch", "ok", f"{text}; it is on another machine, and listed once a second")
    return Finding("watch", "ok", text)


def check_out(folder: Path | None) -> list[Finding]:
    """Check the folder for class maps, which need not be there yet."""
    if folder is None:
        return []
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
    except OSError as exc:
        return [Finding("out", "failed", f"{there} cannot be written ({exc.strerror})", "name another folder (--out)")]
    return [Finding("out", "ok", f"{folder} can be written" if there == folder else f"{folder} can be made")]
