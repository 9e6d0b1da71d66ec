"""Photographs that appear in a folder, each once, when they are complete.

On Linux the kernel says when a file was closed after writing or renamed into place (inotify, through watchdog). On a
network folder it does not, and elsewhere not in this form: there the folder is listed again and again. With inotify it
is listed now and then too, for what the kernel had no room to say.
"""

import asyncio
import contextlib
import logging
import os
import re
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitneck.disk_thread import DiskThread
from bitneck.errors import ImageError, InvalidConfig
from bitneck.image import PHOTO_SUFFIXES
from bitneck.text import counted
from bitneck_edge.sources.arrivals import Arrivals, Stamp
from bitneck_edge.sources.capture import Capture

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent

__all__ = ["Watch", "check_watch", "is_network_folder", "list_photos", "watched", "watching"]

_LOG = logging.getLogger(__name__)
_MOST_WAITING = 10_000
"""Paths that wait to be sent. What is beyond stays in the folder, and is found by looking when there is room."""
_POLL_S, _POLL_SETTLE_S = 1.0, 2.0
_LOOK_S, _LOOK_SETTLE_S = 30.0, 5.0
_NEW_FOLDER_S, _AGAIN_S = 0.2, 5.0
_BEGIN_S = 60.0
"""At the start: a disk that gives nothing for so long does not answer."""
_CLOSE_S = 2.0
_LEAST_PAUSE = 10.0
"""A look that takes long comes more rarely: it may take one part in so many of the time."""
_LEFT_OUT = (FileNotFoundError, NotADirectoryError, PermissionError)
_NETWORK = frozenset(
    {"9p", "afs", "ceph", "cifs", "davfs", "fuse.sshfs", "fuse.rclone", "glusterfs", "fuse.glusterfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs"}
)
"""Filesystems on which another machine may write without this machine's kernel knowing."""


@dataclass(frozen=True, slots=True)
class Watch:
    """How a folder is watched.

    Attributes:
        existing: also send the photographs that are there at the start, the oldest first.
        poll: list the folder again and again, and do not ask the kernel.
    """

    existing: bool = False
    poll: bool = False


def check_watch(folder: Path) -> None:
    """Refuse what cannot be watched.

    Raises:
        ImageError: no such folder, or one that cannot be read.
        InvalidConfig: the package watchdog is not installed.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder to watch")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ImageError(f"{folder}: the folder cannot be read by this user")
    try:
        import watchdog  # noqa: F401
    except ImportError as exc:
        raise InvalidConfig(f"watching a folder needs `pip install 'bitneck[edge]'` ({exc})") from exc


async def watched(folder: Path, watch: Watch) -> AsyncGenerator[Capture]:
    """The photographs of `watching`, from the moment in which the first one is asked for."""
    async with watching(folder, watch) as pictures:
        async for capture in pictures:
            yield capture


@contextlib.asynccontextmanager
async def watching(folder: Path, watch: Watch) -> AsyncGenerator[AsyncGenerator[Capture]]:
    """The photographs that appear in a folder or below it from now on, each once, when they are complete, without end.

    Names that begin with a dot are passed over, and other endings than those of photographs. A file that is gone again
    when its turn comes fails when it is read. If the folder itself goes, it is waited for.

    Args:
        folder: it is read in a thread.
        watch: how.
    """
    eyes = _Eyes(folder, watch)

    async def pictures() -> AsyncGenerator[Capture]:
        while True:
            path, mtime_ns = await eyes.following()
            yield Capture(path, str(path), unix_us=max(0, mtime_ns // 1000))

    try:
        try:
            await eyes.begin()
        except TimeoutError as exc:
            raise ImageError(f"{folder}: its disk has not answered for {_BEGIN_S:.0f} s; look at the disk") from exc
        yield pictures()
    finally:
        await eyes.close()


class _Eyes:
    """Watches one folder: the kernel's events, and looks at it."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._folder, self._existing = folder, watch.existing
        self._disk = DiskThread("bitneck-watch")  # a folder's disk may not answer; the program goes on, and can end
        self._polls = watch.poll or not sys.platform.startswith("linux")
        self._arrivals = self._fresh()
        self._waiting: OrderedDict[Path, int] = OrderedDict()  # with their time of writing
        self._changed = asyncio.Event()
        self._observer: Any = None
        self._identity: tuple[int, int] | None = None
        self._look_at = 0.0
        self._missing = False
        self._unwatched = False  # a folder came that the observer does not know

    def _fresh(self) -> Arrivals:
        return Arrivals(settle_s=_POLL_SETTLE_S if self._polls else _LOOK_SETTLE_S, by_events=not self._polls)

    async def begin(self) -> None:
        """What is there now is not new; then watch."""
        self._polls = self._polls or await self._disk.within(_BEGIN_S, is_network_folder, self._folder)
        self._arrivals = self._fresh()
        listing = await self._listed()
        self._arrivals.begin(listing)
        if self._existing:
            for path in sorted(listing, key=lambda path: (listing[path].mtime_ns, path)):
                self._waiting[path] = listing[path].mtime_ns
        async with asyncio.timeout(_BEGIN_S):
            await self._observe()
        how = "by listing it" if self._polls else "with inotify"
        there = counted(len(listing), "photograph is", "photographs are")
        _LOG.info("%s: watching it %s; %s there", self._folder, how, there)
        self._look_at = time.monotonic()  # what came since the listing

    async def _listed(self) -> dict[Path, Stamp]:
        """The photographs that are there; `TimeoutError` if the disk gives nothing for a while."""
        seen_at = [time.monotonic()]

        def saw() -> None:
            seen_at[0] = time.monotonic()

        listing = asyncio.ensure_future(self._disk.run(list_photos, self._folder, saw))
        try:
            while not listing.done():
                if (left_s := seen_at[0] + _BEGIN_S - time.monotonic()) <= 0:
                    raise TimeoutError
                await asyncio.wait({listing}, timeout=left_s)
            return listing.result()
        finally:
            listing.cancel()

    async def following(self) -> tuple[Path, int]:
        """The next photograph, and when it was written, nanoseconds since 1970."""
        while True:
            now = time.monotonic()
            if now >= self._look_at:
                await self._look()
            elif self._waiting:
                return self._waiting.popitem(last=False)
            else:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(self._look_at - now, _POLL_S)):
                        await self._changed.wait()
                if not self._polls and await self._disk.run(_identity_of, self._folder) != self._identity:
                    self._look_at = 0.0

    async def close(self) -> None:
        """Stop watching."""
        self._disk.post(self._end_observer)  # behind one that is being made
        if not await self._disk.close(_CLOSE_S):
            _LOG.warning("%s: its disk does not answer; the watching is left", self._folder)

    def _end_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            with contextlib.suppress(RuntimeError):  # it had not begun
                observer.join(1.0)

    def _begin_observer(self, tell: Callable[..., None]) -> None:
        self._end_observer()
        self._observer = _observer_of(self._folder, tell, self._closed, self._new_folder)

    async def _look(self) -> None:
        """List the folder: for all that is new when polling, else for what no event told."""
        begun = time.monotonic()
        identity = await self._disk.run(_identity_of, self._folder)
        if identity is None:
            if not self._missing:
                _LOG.warning("%s: the folder is gone; waiting for it", self._folder)
            self._missing, self._identity, self._look_at = True, None, begun + _POLL_S
            return
        if identity != self._identity or self._unwatched:
            if self._missing:
                _LOG.warning("%s: the folder is back", self._folder)
            self._missing = False
            await self._observe()
        try:
            listing = await self._disk.run(list_photos, self._folder)
        except OSError as exc:
            _LOG.warning("%s: it cannot be listed (%s); trying again", self._folder, exc.strerror or exc)
            self._look_at = time.monotonic() + _AGAIN_S
            return
        if await self._disk.run(_identity_of, self._folder) != identity:  # it went away: the list may lack files
            return
        now = time.monotonic()
        room = _MOST_WAITING - len(self._waiting)
        for path in self._arrivals.looked(listing, now, max(0, room)):
            self._waiting[path] = listing[path].mtime_ns
        often = _POLL_S if self._polls else min(_LOOK_S, _LOOK_SETTLE_S) if self._arrivals.settling else _LOOK_S
        self._look_at = now + max(often, _LEAST_PAUSE * (now - begun))

    async def _observe(self) -> None:
        """Ask the kernel for events; where it has none to give, list the folder from now on."""
        self._identity, self._unwatched = await self._disk.run(_identity_of, self._folder), False
        if self._polls:
            return
        loop = asyncio.get_running_loop()

        def tell(call: Callable[..., None], *values: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(call, *values)

        try:
            await self._disk.run(self._begin_observer, tell)
        except FileNotFoundError:
            self._identity = None
        except OSError as exc:
            self._polls = True
            before, self._arrivals = self._arrivals, self._fresh()
            self._arrivals.begin(before.sent)
            _LOG.warning(
                "%s: the kernel does not watch it (%s); listing it each %g s instead. The limits are in "
                "/proc/sys/fs/inotify",
                self._folder, exc.strerror or exc, _POLL_S,
            )  # fmt: skip

    def _closed(self, path: Path, stamp: Stamp) -> None:
        """A photograph is complete."""
        if len(self._waiting) < _MOST_WAITING and self._arrivals.closed(path, stamp):
            self._waiting[path] = stamp.mtime_ns
            self._changed.set()

    def _new_folder(self, unwatched: bool) -> None:
        """A folder was made: the kernel may not have watched it yet when files came into it. Or it was moved here."""
        self._unwatched |= unwatched
        self._look_at = min(self._look_at, time.monotonic() + _NEW_FOLDER_S)
        self._changed.set()


def list_photos(folder: Path, saw: Callable[[], None] = lambda: None) -> dict[Path, Stamp]:
    """The photographs in a folder and below it. Links to folders are not followed.

    What this user may not read, and what goes while it is listed, is left out.

    Args:
        folder: to list.
        saw: called for each file: the disk answers.

    Raises:
        OSError: the folder or one below it cannot be listed, for another reason.
    """
    found: dict[Path, Stamp] = {}

    def on_error(exc: OSError) -> None:
        if not isinstance(exc, _LEFT_OUT):
            raise exc

    for parent, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            saw()
            if (stamp := _stamp_of(path)) is not None:
                found[path] = stamp
    return found


def is_network_folder(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder is on a filesystem that other machines write to.

    Args:
        folder: a folder.
        mounts: the mounts, as Linux lists them.
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
        real = folder.resolve()
    except OSError:
        return False
    best, kind = -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        where = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4]))
        if real.is_relative_to(where) and len(where.parts) >= best:
            best, kind = len(where.parts), rest.split(" ")[0]
    return kind in _NETWORK


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")


def _stamp_of(path: Path) -> Stamp | None:
    """Of a photograph; None of what is none, or is gone."""
    if not _is_photo(path):
        return None
    try:
        status = path.stat()
    except _LEFT_OUT:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _identity_of(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _observer_of(
    folder: Path,
    tell: Callable[..., None],
    closed: Callable[[Path, Stamp], None],
    new_folder: Callable[[bool], None],
) -> Any:
    """A running observer of a folder.

    Args:
        folder: it and what is below it.
        tell: makes a call in the event loop.
        closed: called so with each complete photograph.
        new_folder: called so when a folder appeared, with whether it came from elsewhere. It is not watched then.

    Raises:
        OSError: the kernel does not watch it.
    """
    from watchdog.events import DirCreatedEvent, DirMovedEvent, FileClosedEvent, FileMovedEvent, FileSystemEventHandler
    from watchdog.observers.inotify import InotifyObserver

    class Handler(FileSystemEventHandler):
        """Gets the events in the observer's thread."""

        def dispatch(self, event: "FileSystemEvent") -> None:
            name = event.dest_path if event.event_type == "moved" else event.src_path
            if not name:  # it was moved away
                return
            path = Path(os.fsdecode(name))
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                return
            with contextlib.suppress(OSError):  # a look finds what is missed here
                if not event.is_directory:
                    if (stamp := _stamp_of(path)) is not None:
                        tell(closed, path, stamp)
                    return
                if event.event_type == "moved":  # its files were complete before
                    for photo, stamp in list_photos(path).items():
                        tell(closed, photo, stamp)
            tell(new_folder, event.event_type == "moved" and not event.src_path)

    observer = InotifyObserver(generate_full_events=True)
    kinds = [FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]
    observer.schedule(Handler(), str(folder), recursive=True, event_filter=list(kinds))
    observer.daemon = True
    observer.start()
    return observer
