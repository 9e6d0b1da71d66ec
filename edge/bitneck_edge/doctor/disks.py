"""Looks at disks that may not answer: that is a finding too, and must not keep the others from being told."""

from collections.abc import Callable

from bitneck.disk_thread import DiskThread
from bitneck_edge.doctor.finding import Finding

__all__ = ["in_time"]

_LOOK_S = 60.0
"""A slow card reads a spool of a gigabyte in this time."""


async def in_time(check: str, place: str, look: Callable[..., list[Finding]], *arguments: object) -> list[Finding]:
    """What a look at a disk finds; one that failed if the disk does not answer in time.

    Args:
        check: name of the finding then.
        place: on the disk.
        look: finds it; it blocks.
        *arguments: of `look`.
    """
    thread = DiskThread(f"bitneck-doctor-{check}")  # of its own: the program ends though a look does not
    try:
        return await thread.within(_LOOK_S, look, *arguments)
    except TimeoutError:
        text = f"the disk of {place} has not answered for {_LOOK_S:.0f} s"
        return [Finding(check, "failed", text, "look at the disk, or name another folder")]
    finally:
        thread.end()
