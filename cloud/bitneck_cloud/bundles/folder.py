"""The folder of a bundle that is in use: whether the bundle is still there. A disk may not answer."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from bitneck.bundle import MANIFEST_NAME, Bundle
from bitneck.workers import settling

__all__ = ["BundleFolder", "Look"]

T = TypeVar("T")

_MOST_S = 2.0
"""A disk that has not answered for so long, such as a network's that is gone, counts as one that is away."""


class Look(Generic[T]):
    """Looks at a disk that may not answer. The thread that waits for it keeps no server from stopping.

    Args:
        what: to look at.
        most_s: a disk that has not answered for so long does not answer.
    """

    def __init__(self, what: Callable[[], T], most_s: float = _MOST_S) -> None:
        self._what = what
        self._most_s = most_s
        self._found: asyncio.Future[T] | None = None

    async def take(self) -> T | None:
        """What is there; None if the disk does not answer.

        One thread looks at a time, also then; whoever asks meanwhile waits for the same look.
        """
        if self._found is None or self._found.done():
            call, self._found = settling(self._what)
            threading.Thread(target=call, name="bitneck-look", daemon=True).start()
        found = self._found
        await asyncio.wait({found}, timeout=self._most_s)
        return found.result() if found.done() else None


class BundleFolder:
    """The folder of a bundle that was loaded from it.

    Args:
        bundle: that it should hold.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._root = bundle.root
        self._look = Look(partial(_problem_of, bundle))

    async def look(self) -> str:
        """Why the device's half cannot be had there; empty if it can. Contents are not read again: devices do that."""
        problem = await self._look.take()
        return f"its folder {self._root} does not answer" if problem is None else problem


def _problem_of(bundle: Bundle) -> str:
    try:
        if (bundle.root / MANIFEST_NAME).read_bytes() != bundle.manifest_json:
            return f"its folder {bundle.root} holds another bundle now, it was {bundle.bundle_id}"
        for name in bundle.manifest.files_for("edge"):
            if bundle.path(name).stat().st_size != bundle.manifest.files[name].size:
                return f"{bundle.root / name} has changed"
    except OSError as exc:
        return f"its folder {bundle.root} cannot be read ({exc.strerror or exc})"
    return ""
