"""Files on the device, each by its digest: what is there is never fetched again, whatever bundle lists it.

    <cache>/files/<SHA-256>          a whole file, verified
    <cache>/parts/<SHA-256>          what a cut-off download has left; the next one goes on behind it
    <cache>/manifests/<SHA-256>      manifests, each locked by the clients that use it

A file gets its name only when its size and digest are right, so no half-written file stays, and several processes may
fill one store at once.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import platformdirs

from bitneck.bundle import Bundle, verify_file
from bitneck.disk_thread import DiskThread
from bitneck.errors import BundleCorrupt, BundleMismatch, InvalidConfig
from bitneck.manifest import FileEntry, Manifest, bundle_id_of
from bitneck_edge.bundles.part import Part, file_mode, write_all
from bitneck_edge.link.remote import MAX_MANIFEST_BYTES

__all__ = ["FileStore", "default_cache_dir", "digits_of", "read_regular", "write_new"]

T = TypeVar("T")

_KEPT_S = 86_400.0
_CLOSE_S = 1.0
"""A disk that does not answer for so long keeps no download from being ended."""
_BUNDLE_ID = r"sha256:[0-9a-f]{64}"
_DIGITS = re.compile(r"[0-9a-f]{64}")

Fetch = Callable[[str, int], AsyncGenerator[bytes]]
"""Yields a file of the bundle in chunks, given its path in the manifest and the first byte that is wanted."""


def default_cache_dir() -> Path:
    """The user's cache folder for bitneck.

    Raises:
        InvalidConfig: this user has no home folder.
    """
    try:
        folder = Path(platformdirs.user_cache_dir("bitneck"))
    except RuntimeError as exc:
        folder = Path(f"~{exc}")
    if not folder.is_absolute():
        raise InvalidConfig("this user has no home folder to keep bundles in; give --cache-dir FOLDER, or set HOME")
    return folder


def digits_of(bundle_id: str) -> str:
    """The hexadecimal digits of a bundle's id.

    Raises:
        BundleMismatch: it is not a bundle's id.
    """
    if not re.fullmatch(_BUNDLE_ID, bundle_id):
        raise BundleMismatch(f"{bundle_id[:80]!r} is no bundle id, expected sha256: and 64 hexadecimal digits")
    return bundle_id.removeprefix("sha256:")


class FileStore:
    """The files of a cache folder. Its methods block, but for those that are awaited.

    Attributes:
        root: the cache folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()
        self._disk = DiskThread("bitneck-cache")
        weakref.finalize(self, self._disk.end)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Have work done that reads or writes the store, which blocks, in a thread of the store's own.

        A disk that does not answer then holds up whoever needs the store, and nobody else.
        """
        return await self._disk.run(work, *arguments)

    def path(self, entry: FileEntry) -> Path:
        """Where a file is, or will be."""
        return self.root / "files" / entry.sha256

    def has(self, entry: FileEntry) -> bool:
        """Whether a file is here and whole. Its digest is computed once by each process."""
        path = self.path(entry)
        if entry.sha256 in self._verified:
            return path.is_file()
        self._no_links(path)
        try:
            verify_file(path, entry)
        except BundleCorrupt:
            return False
        self._verified.add(entry.sha256)
        return True

    def received(self, entry: FileEntry) -> int:
        """Bytes of a file that are here: all, those of a cut-off download, or none."""
        if self.has(entry):
            return entry.size
        part = self._part(entry)
        with contextlib.suppress(OSError):
            if part.is_file() and not part.is_symlink():
                return min(part.stat().st_size, entry.size)
        return 0

    async def receive(self, name: str, entry: FileEntry, fetch: Fetch, on_bytes: Callable[[int], None]) -> None:
        """Fetch one file. If an earlier download was cut off, this one goes on where that stopped.

        Args:
            name: its path in the manifest.
            entry: what the manifest says about it.
            fetch: fetches it from some byte on.
            on_bytes: gets the size of each chunk.

        Raises:
            BundleCorrupt: it arrived with another size or digest. Nothing of it is kept then.
            InvalidConfig: the store cannot be written.
        """
        with self._written():
            part = await self.run(self._begun, entry)
            try:
                left = await self.run(part.size)
                if left:
                    try:
                        await self._fill(part, name, entry, fetch, on_bytes)
                    except BundleCorrupt:  # what the earlier download left may be to blame: once more from the start
                        on_bytes(-left)
                        left = 0
                if not left:
                    await self._fill(part, name, entry, fetch, on_bytes)
                await self.run(part.keep, self.path(entry))
            finally:  # also if this is cancelled: whoever fetches the file next should go on where this one stopped
                await asyncio.wait({asyncio.ensure_future(self.run(part.close))}, timeout=_CLOSE_S)
        self._verified.add(entry.sha256)

    def add(self, source: Path, entry: FileEntry) -> None:
        """Take a file from the disk.

        Raises:
            BundleCorrupt: it is not the file that the manifest lists.
            InvalidConfig: the store cannot be written.
        """
        if self.has(entry):
            return
        verify_file(source, entry)
        with self._written(), contextlib.closing(self._begun(entry)) as part:
            part.empty()
            part.append(source.read_bytes())
            if part.digest() != entry.sha256:
                raise BundleCorrupt(f"{source} changed while it was read; try again")
            part.keep(self.path(entry))
        self._verified.add(entry.sha256)

    def remove(self, entry: FileEntry) -> None:
        """Remove a file."""
        self._verified.discard(entry.sha256)
        self.path(entry).unlink(missing_ok=True)

    def bundle(self, manifest_json: bytes) -> Bundle:
        """A bundle of this store. Its manifest is kept, and locked as long as the bundle is in use.

        Raises:
            BundleCorrupt: not a manifest.
            InvalidConfig: the store cannot be written.
        """
        manifest = Manifest.from_json(manifest_json, "the server's manifest")
        path = self._manifest(bundle_id_of(manifest_json))
        with self._written():
            self._no_links(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if read_regular(path, MAX_MANIFEST_BYTES) != manifest_json:
                write_new(path, manifest_json)
            bundle = Bundle(self.root, manifest, manifest_json, self.path)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            weakref.finalize(bundle, os.close, descriptor)
            with contextlib.suppress(OSError):  # another user's, in a shared cache
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.touch()  # its age is the time since it was last used
        return bundle

    def known(self, bundle_id: str) -> bytes | None:
        """The manifest of a bundle that was here once; None if it is not kept, or damaged."""
        path = self._manifest(bundle_id)
        self._no_links(path)
        manifest_json = read_regular(path, MAX_MANIFEST_BYTES)
        return manifest_json if bundle_id_of(manifest_json) == bundle_id else None

    def forget_old(self, noted: Iterable[str], now: float) -> None:
        """Remove files that are a day old and that no manifest in use lists, so that the store stays small over years.

        In use is a manifest that a server had last, that a running client has locked, or that was used within a day.

        Args:
            noted: ids of the bundles that servers had last.
            now: seconds since 1970.
        """
        with contextlib.suppress(OSError):
            if any((self.root / name).is_symlink() for name in ("files", "parts", "manifests", "bundles")):
                return
            kept = {bundle_id.removeprefix("sha256:") for bundle_id in noted}
            listed: set[str] = set()
            for path in self._entries("manifests"):
                if path.name in kept or not self._old(path, now) or not _unlocked(path):
                    listed |= _listed(path)
                else:
                    path.unlink(missing_ok=True)
            for folder in ("files", "parts"):
                for path in self._entries(folder):
                    if path.name not in listed and self._old(path, now):
                        path.unlink(missing_ok=True)
            for path in (self.root / "parts").glob(".part-*"):
                if self._old(path, now):
                    path.unlink(missing_ok=True)
            for path in self._entries("bundles"):  # a folder for each bundle, up to version 0.2
                if self._old(path, now):
                    shutil.rmtree(path, ignore_errors=True)

    def _entries(self, folder: str) -> list[Path]:
        """The files of a folder that the store has named."""
        try:
            return [path for path in (self.root / folder).iterdir() if _DIGITS.fullmatch(path.name)]
        except OSError:
            return []

    @staticmethod
    def _old(path: Path, now: float) -> bool:
        try:
            return now - path.lstat().st_mtime > _KEPT_S
        except OSError:
            return False

    def _part(self, entry: FileEntry) -> Path:
        return self.root / "parts" / entry.sha256

    def _manifest(self, bundle_id: str) -> Path:
        return self.root / "manifests" / digits_of(bundle_id)

    def _begun(self, entry: FileEntry) -> Part:
        path = self._part(entry)
        self._no_links(path)
        return Part.open(path)

    async def _fill(
        self, part: Part, name: str, entry: FileEntry, fetch: Fetch, on_bytes: Callable[[int], None]
    ) -> None:
        """Append what is missing of a file, and check the whole. A wrong one leaves nothing behind."""
        received = await self.run(part.size)
        problem = ""
        if received < entry.size or not entry.size:
            async with contextlib.aclosing(fetch(name, received)) as chunks:
                async for data in chunks:
                    received += len(data)
                    if received > entry.size:
                        break
                    await self.run(part.append, data)
                    on_bytes(len(data))
        if received > entry.size:
            problem = f"is longer than the {entry.size} bytes that the manifest says; refused"
        elif received < entry.size:
            problem = f"arrived with {received} bytes, the manifest says {entry.size}; refused, try again"
        elif (digest := await self.run(part.digest)) != entry.sha256:
            problem = (
                f"arrived with SHA-256 {digest[:16]}…, the manifest says {entry.sha256[:16]}…; refused: it was damaged "
                "on the way, or the server's bundle is"
            )
        if problem:
            await self.run(part.empty)
            raise BundleCorrupt(f"{name} {problem}")

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """What goes wrong with the disk becomes an error that says what to do."""
        try:
            yield
        except OSError as exc:
            raise InvalidConfig(
                f"the cache {self.root} cannot be written ({exc.strerror}); choose another folder (--cache-dir)"
            ) from exc

    def _no_links(self, path: Path) -> None:
        """Refuse a path whose parts below the cache folder are links: in a shared cache they could lead anywhere.

        Raises:
            InvalidConfig: one is a link.
        """
        for part in (path, *path.parents):
            if part == self.root:
                return
            if part.is_symlink():
                raise InvalidConfig(f"{part} in the cache is a link; remove it, or choose another folder (--cache-dir)")


def read_regular(path: Path, most: int) -> bytes:
    """The first bytes of a regular file; empty if there is none. In a shared cache it may be a pipe, or huge."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, most) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that gets its name when it is whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
        os.fchmod(descriptor, file_mode())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _unlocked(path: Path) -> bool:
    """Whether no client uses a manifest."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _listed(path: Path) -> set[str]:
    """Digests of the files that a manifest lists; none if it cannot be read."""
    try:
        manifest = Manifest.from_json(read_regular(path, MAX_MANIFEST_BYTES), str(path))
    except BundleCorrupt:
        return set()
    return {entry.sha256 for entry in manifest.files.values()}
