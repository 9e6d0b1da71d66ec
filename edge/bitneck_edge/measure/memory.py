"""The memory of this process."""

import resource
import sys
from pathlib import Path

__all__ = ["peak_mib"]


def peak_mib() -> float:
    """Peak of resident memory, MiB.

    On Linux it is the program's own (``VmHWM``). Elsewhere it comes from ``getrusage``, which may include the peak of
    the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
