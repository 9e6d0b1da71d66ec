"""Changes of the bundles that are served: one of each model at a time, and none that waits for a disk for ever.

of(model) --a change before it ends in time--> Change --on_disk: the disk answers--> done
   |                                             |----- the disk does not answer --> Unavailable
   `-- it does not --> Unavailable               `----- another call takes its place --> CanaryRefused
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from bitneck.disk_thread import DiskThread
from bitneck.errors import CanaryRefused, Unavailable
from bitneck_cloud.bundles.folder import Look

__all__ = ["Change", "Changes"]

T = TypeVar("T")

_PATIENT_S = 10.0
"""A change waits for the one before it for so long: loading a bundle takes a second or two."""
_OVER_S = 5.0
"""After this time, a change that may take the place of another one does."""
_LOOK_S = 5.0
"""The disk is looked at so often while a change waits for it."""
_STUCK_S = 1.0
"""What the thread has been at for longer is no work that ends just now."""
_MOST_S = 300.0
"""Work that takes longer is given up, though the disk seems to answer: it may do so from memory."""


class Change:
    """A change of a model's bundle that is under way. `Changes.of` makes it.

    Attributes:
        what: it is, in words.
        yields: whether another change may take its place while it waits for a disk.

    Args:
        what: see above.
        yields: likewise.
        before: the change whose place this one wanted to take; None for none.
        disk: does its work. What that is at already was given up.
    """

    def __init__(self, what: str, *, yields: bool, before: "Change | None", disk: DiskThread) -> None:
        self.what = what
        self.yields = yields
        self._before = before
        self._yielded = False
        self._begun_at = time.monotonic()
        self._disk = disk
        self._given_up = asyncio.Event()

    def __str__(self) -> str:
        """What it is, and for how long."""
        return f"{self.what}, for {time.monotonic() - self._begun_at:.0f} s"

    @property
    def instead_of(self) -> str:
        """The change whose place it took, in words; empty if it took none."""
        return self._before.what if self._before is not None and self._before._yielded else ""

    def give_up(self) -> None:
        """Wait for no disk any more."""
        self._given_up.set()

    async def on_disk(self, folder: Path, work: Callable[..., T], *arguments: object) -> T:
        """Have work done on a disk, and wait for what it gives as long as the disk answers.

        Args:
            folder: that it is about. It is looked at, to know whether the disk answers.
            work: what to do; it blocks.
            *arguments: of `work`.

        Raises:
            Unavailable: the disk does not answer. What the work gives later is lost; so it must change nothing that
                matters then.
            CanaryRefused: another change takes the place of this one.
            Exception: what the work raises.
        """
        if (stuck_s := self._disk.stuck_s) > _STUCK_S:
            raise Unavailable(
                f"{self.what}: work on the bundles of this model that was given up still waits for a disk, for "
                f"{stuck_s:.0f} s by now; try again when the disk answers"
            )
        working = asyncio.ensure_future(self._disk.run(work, *arguments))
        given_up = asyncio.ensure_future(self._given_up.wait())
        look, limit = Look(partial(_answers, folder)), time.monotonic() + _MOST_S
        try:
            while True:
                await asyncio.wait({working, given_up}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    return working.result()
                if given_up.done():
                    self._yielded = True
                    raise CanaryRefused(f"{self}: it was given up for another call while it waited for {folder}")
                if await look.take() is None or time.monotonic() > limit:
                    raise Unavailable(f"{self}: {folder} does not answer; nothing is changed, try again when it does")
        finally:
            working.cancel()
            given_up.cancel()


class Changes:
    """The changes of a server's bundles."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._disks: dict[str, DiskThread] = {}
        self._under_way: dict[str, Change] = {}

    def under_way(self, model: str) -> str:
        """The change of a model's bundle that is under way, and for how long; empty if there is none."""
        return str(self._under_way.get(model, ""))

    @contextlib.asynccontextmanager
    async def of(self, model: str, what: str, *, yields: bool = False, over: bool = False) -> AsyncGenerator[Change]:
        """Change a model's bundle; nobody else does meanwhile.

        Args:
            model: its name.
            what: is done, in words.
            yields: see `Change`.
            over: take the place of a change that yields, if that does not end within seconds.

        Raises:
            Unavailable: another change takes too long.
        """
        lock = self._locks.setdefault(model, asyncio.Lock())
        held = over and await _acquired(lock, _OVER_S)
        before = self._under_way.get(model) if over and not held else None
        if before is not None and before.yields:
            before.give_up()
        if not held and not await _acquired(lock, _PATIENT_S):
            raise Unavailable(
                f"{what}: the bundle of {model} is being changed ({self.under_way(model)}), and a disk may not answer; "
                "try again later"
            )
        disk = self._disks.setdefault(model, DiskThread("bitneck-bundle"))
        change = self._under_way[model] = Change(what, yields=yields, before=before, disk=disk)
        try:
            yield change
        finally:
            del self._under_way[model]
            lock.release()


async def _acquired(lock: asyncio.Lock, most_s: float) -> bool:
    """Take a lock; False if others hold it for so long."""
    try:
        async with asyncio.timeout(most_s):
            await lock.acquire()
    except TimeoutError:
        return False
    return True


def _answers(folder: Path) -> bool:
    """True, whatever is there: that the disk says so is all that is asked."""
    with contextlib.suppress(OSError):
        folder.stat()
    return True
