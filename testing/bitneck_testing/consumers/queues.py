"""The queue's file of the sinks, without a server: opened, filled, drained, and as a kill would leave it."""

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.answers.sinks.state import Bounds, Entry

__all__ = ["NOW", "WIDE", "copied", "drain", "entry", "jsonl", "keep_house", "numbers", "opened", "stored_bytes"]

NOW = 1_800_000_000.0
WIDE = Bounds(1 << 40, 1e9)


@contextmanager
def opened(path: Path, bounds: dict[str, Bounds], now: float = NOW) -> Iterator[tuple[QueueFile, dict[str, int]]]:
    """A file in use, and what waits in it for others."""
    file = QueueFile(path, bounds, sync=False)
    try:
        others = file.open(now)
        yield file, others
    finally:
        file.close()


def entry(
    number: int, *sinks: str, size: int = 0, maps: str = "", map_size: int = 0, stream: str = "session s"
) -> Entry:
    """An answer; its documents begin with its number. One of the sinks may get a map."""
    bare = b"%d " % number + b"x" * size, b"%d map " % number + b"y" * map_size
    groups = tuple(sink for sink in sinks if sink != maps), tuple(sink for sink in sinks if sink == maps)
    bodies = tuple((names, body) for names, body in zip(groups, bare, strict=True) if names)
    return Entry(stream, number, number, bodies)


def keep_house(file: QueueFile, now: float = NOW) -> None:
    """All that housekeeping has to do."""
    while file.save(0, now):
        pass
    while file.expire(now):
        pass


def drain(file: QueueFile, sink: str, most: int = 1000) -> list[bytes]:
    """All that waits for a sink, delivered."""
    found: list[bytes] = []
    while file.held[sink].queued:
        batch = file.take(sink, most, 1 << 30)
        found += [each.body for each in batch]
        file.settle(sink, batch, [""] * len(batch), NOW)
    return found


def numbers(bodies: Sequence[bytes]) -> list[int]:
    """Those that documents of `entry` begin with."""
    return [int(body.split()[0]) for body in bodies]


def copied(path: Path, folder: Path) -> Path:
    """The file as a kill would leave it now."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # By another process: if this one closed the file, it would lose its locks on it.
    subprocess.run(["cp", str(path), f"{path}-wal", str(folder)], check=True, stderr=subprocess.DEVNULL)
    return folder / path.name


def stored_bytes(path: Path) -> int:
    """Bytes of the documents in a file."""
    with sqlite3.connect(path) as db:
        size = int(db.execute("SELECT ifnull(sum(length(body)), 0) FROM answers").fetchone()[0])
    db.close()
    return size


def jsonl(folder: Path, name: str, **other: Any) -> dict[str, Any]:
    """The settings of a sink that writes a file below a folder."""
    return {
        "kind": "jsonl",
        "name": name,
        "path": str(folder / f"{name}.jsonl"),
        "pause_s": 0.05,
        "linger_s": 0,
    } | other
