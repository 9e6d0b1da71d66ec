"""Figures of this and other processes: memory, percentiles, time inside functions; and of answers."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import bitneck_edge.sources.photo
from bitneck.runtime import OnnxModule

__all__ = [
    "COMPUTING",
    "PREPARING",
    "TimeInside",
    "children_of",
    "log_softmax",
    "p50_and_p99",
    "processor_s",
    "resident_mib",
    "stolen_s",
]

COMPUTING = (OnnxModule, "run")
"""A place for `TimeInside`: ONNX Runtime."""

PREPARING = (bitneck_edge.sources.photo, "view"), (bitneck_edge.sources.photo, "to_input")
"""Places for `TimeInside`: a decoded picture becomes the network's input."""


def resident_mib(pid: int) -> float:
    """Resident memory of a process now, MiB. Linux only.

    Raises:
        OSError: no such process.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def processor_s(pid: int) -> float:
    """Processor time of a process and its children so far, seconds. Linux only.

    Raises:
        OSError: no such process.
    """
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in (pid, *children_of(pid))]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def stolen_s() -> float:
    """Processor time that this machine's host has given to others so far, of all processors, seconds. Linux only.

    Raises:
        OSError: the system does not tell.
    """
    return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that it has not asked for their end yet. Linux only."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ends
            found += map(int, (task / "children").read_text().split())
    return found


def p50_and_p99(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, as ``{"p50_ms": ..., "p99_ms": ...}``."""
    return {f"p{q}_ms": float(np.percentile(milliseconds, q)) for q in (50, 99)}


class TimeInside:
    """Adds up the time inside some functions while its block runs, in every thread that calls them.

        with TimeInside((OnnxModule, "run"), clock=time.thread_time) as inside:
            ...
        inside.seconds[0]

    Args:
        places: (module or class, name of one of its functions).
        clock: `time.perf_counter` for elapsed time, `time.thread_time` for processor time of the calling thread.

    Attributes:
        seconds: inside each of the places so far.
    """

    def __init__(self, *places: tuple[Any, str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._places, self._clock, self._lock = places, clock, threading.Lock()
        self.seconds = [0.0] * len(places)

    def __enter__(self) -> Self:
        self._originals = [getattr(owner, name) for owner, name in self._places]
        for k, (owner, name) in enumerate(self._places):
            setattr(owner, name, self._timed(k))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in zip(self._places, self._originals, strict=True):
            setattr(owner, name, original)

    def _timed(self, k: int) -> Callable[..., Any]:
        original, clock = self._originals[k], self._clock

        def timed(*args: Any, **values: Any) -> Any:
            begin = clock()
            try:
                return original(*args, **values)
            finally:
                spent = clock() - begin
                with self._lock:
                    self.seconds[k] += spent

        return timed


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities of one answer's logits, (K,)."""
    shifted = logits.astype(np.float64) - logits.max()
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return found
