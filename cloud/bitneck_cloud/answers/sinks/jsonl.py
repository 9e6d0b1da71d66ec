"""Lines of a file, one JSON document each, with rotation.

A batch is written, and forced to the disk, before it leaves the queue. After a crash it may be in the file twice, under
its old numbers. A line that a power cut has left half is cut off when the file is opened again.
"""

import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bitneck_cloud.answers.sinks.maps import with_map
from bitneck_cloud.answers.sinks.settings import JsonlTable
from bitneck_cloud.answers.sinks.state import Attempt, ClientState, Queued

__all__ = ["JsonlSink"]

_LOG = logging.getLogger(__name__)
_BATCH, _BATCH_BYTES = 1000, 1 << 20
_MODE = 0o640
_TAIL = 1 << 20


class JsonlSink:
    """See `bitneck_cloud.answers.sinks.state.Sink`.

    Args:
        table: its settings.
    """

    most, most_bytes = _BATCH, _BATCH_BYTES

    def __init__(self, table: JsonlTable) -> None:
        self._table = table
        self._file = -1
        self._size = 0
        self._begun = 0.0

    def restless(self) -> bool:
        """Whether the file is old enough for another one."""
        return self._file >= 0 and self._size > 0 and self._is_old(time.time())

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Append a batch."""
        try:
            self._follow_path()
            if self._size and (self._size >= self._table.rotate_bytes or self._is_old(time.time())):
                self._rotate()
            if batch:
                if not self._size:
                    self._begun = time.time()
                self._append(b"".join(with_map(each.body, self._table.maps) + b"\n" for each in batch))
        except OSError as exc:
            self._drop_file()
            return Attempt(error=f"{self._table.path}: {exc.strerror or exc}")
        return Attempt(("",) * len(batch))

    def tell(self, state: ClientState) -> None:
        """A file has no state of clients."""

    def close(self) -> None:
        """Close the file."""
        self._drop_file()

    def _append(self, data: bytes) -> None:
        """All of it, or nothing: what a full disk took of it is cut off again."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            if self._table.fsync == "batch":
                os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _follow_path(self) -> None:
        """Open the file, if it is not open, or if another program has moved it away."""
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                there = self._table.path.stat()
                mine = os.fstat(self._file)
                if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                    self._size = mine.st_size
                    return
            self._drop_file()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not stop us
        file = os.open(self._table.path, flags, _MODE)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "it is no file")
            if found.st_size and os.pread(file, 1, 0) != b"{":
                raise OSError(0, "it is another program's: it does not begin with a JSON object")
            self._size = _whole_lines(file, found.st_size, self._table.path)
            self._begun = _begin_of(file, found.st_mtime) if self._size else time.time()
        except BaseException:
            os.close(file)
            raise
        self._file = file
        if self._table.fsync == "batch":
            _sync_folder(self._table.path.parent)

    def _is_old(self, now: float) -> bool:
        return now - self._begun >= self._table.rotate_s

    def _rotate(self) -> None:
        path = self._table.path
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        os.rename(path, path.with_name(f"{path.stem}.{moment}{path.suffix}"))  # noqa: PTH104  its error has a strerror
        self._drop_file()
        self._follow_path()
        if self._table.keep:
            full = sorted(path.parent.glob(f"{_escaped(path.stem)}.????????T??????.??????Z{_escaped(path.suffix)}"))
            for old in full[: -self._table.keep]:
                old.unlink(missing_ok=True)
                _LOG.info("%s is deleted: %d newer ones are kept", old, self._table.keep)

    def _drop_file(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self._size = -1, 0


def _whole_lines(file: int, size: int, path: Path) -> int:
    """Cut off what follows the last line's end; the size that is left."""
    end = size
    while end > 0:
        begin = max(0, end - _TAIL)
        if (at := os.pread(file, end - begin, begin).rfind(b"\n")) >= 0:
            end = begin + at + 1
            break
        end = begin
    if end != size:
        os.ftruncate(file, end)
        _LOG.warning("%s ended in the middle of a line: %d bytes are cut off", path, size - end)
    return end


def _begin_of(file: int, otherwise: float) -> float:
    """When a file's first answer came, seconds since 1970."""
    try:
        first = json.loads(os.pread(file, _TAIL, 0).partition(b"\n")[0])
        return datetime.fromisoformat(first["received"]).timestamp()
    except (ValueError, TypeError, KeyError):
        return otherwise


def _sync_folder(folder: Path) -> None:
    """Force the name of a new file to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
