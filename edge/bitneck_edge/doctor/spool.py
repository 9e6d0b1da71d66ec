"""The spool of a device, looked at without a change to it: another process may be using it."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bitneck.text import counted, sized
from bitneck_edge.doctor.finding import Finding
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.disk import whole
from bitneck_edge.spool.format import Damage, Done, FrameEntry, read

__all__ = ["check_spool"]

_CHECK = "spool"
_ADVICE = "give a folder that this user may write (--spool)"


def check_spool(settings: EdgeSettings) -> list[Finding]:
    """Check the folder of the spool; nothing if the settings have none."""
    if settings.spool is None:
        return []
    folder = settings.spool
    try:
        if not folder.exists():
            return [_begun_later(folder)]
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        used = _is_used(folder)
        kept, size, damaged = _contents(folder)
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        return [Finding(_CHECK, "failed", f"{folder} cannot be read and written ({exc.strerror or exc})", _ADVICE)]
    text = f"{folder} has {counted(kept, 'frame')} in {sized(size)}, {free / 1e9:.1f} GB are free"
    if used:
        text += "; another process uses it"
        return [Finding(_CHECK, "warning", text, "right if that is this device's client; each needs its own folder")]
    if damaged:
        advice = "the frames there are lost, the others are sent: look at the disk"
        return [
            Finding(
                _CHECK, "warning", f"{text}; {counted(damaged, 'place is', 'places are')} damaged or cut off", advice
            )
        ]
    if free + size < settings.spool_mb * 1e6:
        advice = f"make room: it may have {settings.spool_mb:.0f} MB (--spool-mb)"
        return [Finding(_CHECK, "warning", text, advice)]
    return [Finding(_CHECK, "ok", text)]


def _begun_later(folder: Path) -> Finding:
    """Whether a folder that is not there can be made."""
    there = next((parent for parent in folder.absolute().parents if parent.exists()), Path("/"))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding(_CHECK, "ok", f"{folder} is not there yet; it can be made")
    return Finding(_CHECK, "failed", f"{folder} is not there, and {there} cannot be written", _ADVICE)


def _is_used(folder: Path) -> bool:
    """Whether a process uses it."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _contents(folder: Path) -> tuple[int, int, int]:
    """Frames that are to be sent, bytes of the files, and places that are damaged."""
    kept = size = damaged = 0
    for path in sorted(folder.glob("*.frames")):
        seqs: set[int] = set()
        for part in (path, path.with_suffix(".done")):
            data = _data(part)
            size += len(data)
            for entry in _entries(data):
                match entry:
                    case FrameEntry(seq):
                        seqs.add(seq)
                    case Done(done):
                        seqs.difference_update(done)
                    case Damage():
                        damaged += 1
        kept += len(seqs)
    return kept, size, damaged


def _entries(data: bytes) -> Iterator[object]:
    return (entry for entry, _ in read(data))


def _data(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    try:
        return whole(descriptor, path)
    finally:
        os.close(descriptor)
