"""Bundles on the device: each file is fetched once, verified when it is written and again when it is opened.

    <cache>/bundles/<digest of the manifest>/manifest.json, segments/..., points/<id>/...
    <cache>/servers/<digest of its address and the model>    the bundle that a server had last

A file gets its name only when its size and digest are right. So no half-written file stays, and two processes may fill
the same cache at once.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from pathlib import Path

import platformdirs

from bitneck.bundle import MANIFEST_NAME, Bundle, verify_file
from bitneck.errors import BitneckError, BundleCorrupt, BundleMismatch, InvalidConfig
from bitneck.manifest import FileEntry, Manifest, bundle_id_of
from bitneck.text import clean_text
from bitneck_edge.bundles.cost import check_costs

__all__ = ["cached_bundle", "default_cache_dir", "forget_old", "recall", "remember"]

_KEPT_S = 86_400.0
_BUNDLE_ID = r"sha256:[0-9a-f]{64}"
_MAX_NOTE_BYTES = 200
_UMASK = threading.Lock()
MAX_BUNDLE_BYTES = 1 << 30
"""What the edge's files of a bundle may have together. The shipped ones have 38 MB."""

Fetch = Callable[[str], AsyncGenerator[bytes]]
"""Yields a file of the bundle in chunks, given its path in the manifest."""


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


async def cached_bundle(
    cache_dir: Path,
    manifest_json: bytes,
    bundle_id: str,
    fetch: Fetch,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    *,
    trusted: bool = False,
) -> Bundle:
    """The edge's half of a bundle; missing and damaged files are fetched.

    Args:
        cache_dir: root of the cache.
        manifest_json: the manifest's exact bytes, from the server.
        bundle_id: the bundle's id, as the server says.
        fetch: fetches a file.
        progress: called with (bytes fetched, bytes to fetch).
        trusted: whether to take ONNX files whose cost cannot be bounded, because the bundle was pinned.

    Raises:
        BundleMismatch: the manifest does not hash to the id.
        BundleCorrupt: the manifest cannot be read, or a file arrived with another size or digest.
        InvalidConfig: the cache cannot be written.
    """
    if (real := bundle_id_of(manifest_json)) != bundle_id:
        raise BundleMismatch(
            f"the server says its bundle is {clean_text(bundle_id, 80)}, its manifest hashes to {real}"
        )
    manifest = Manifest.from_json(manifest_json, "the server's manifest")
    root = cache_dir / "bundles" / bundle_id.removeprefix("sha256:")
    wanted = manifest.files_for("edge")
    if (size := sum(entry.size for entry in wanted.values())) > MAX_BUNDLE_BYTES:
        raise BundleCorrupt(f"the server's bundle has {size} bytes for a device, at most {MAX_BUNDLE_BYTES} are taken")
    for path in (*wanted, MANIFEST_NAME):
        _no_links(cache_dir, root / path)
    missing = {path: entry for path, entry in wanted.items() if not _good(root / path, entry)}
    total, done = sum(entry.size for entry in missing.values()), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    try:
        for path, entry in missing.items():
            async with contextlib.aclosing(fetch(path)) as chunks:
                await _receive(root / path, entry, chunks, count)
        if not trusted:  # files that are here already too: the attempt that fetched them may have been cut off
            await asyncio.to_thread(_check_costs, root, manifest, missing)
        if not (root / MANIFEST_NAME).is_file() or (root / MANIFEST_NAME).read_bytes() != manifest_json:
            root.mkdir(parents=True, exist_ok=True)
            with _new_file(root / MANIFEST_NAME) as descriptor:
                _write_all(descriptor, manifest_json)
    except OSError as exc:
        raise InvalidConfig(f"the cache {cache_dir} cannot be written ({exc.strerror}); choose another folder") from exc
    return Bundle.open(root, side="edge")


def remember(cache_dir: Path, server: str, model: str, bundle_id: str) -> None:
    """Note which bundle a server has, for a start while it cannot be reached.

    Raises:
        InvalidConfig: the cache cannot be written.
    """
    note = _note(cache_dir, server, model)
    try:
        _no_links(cache_dir, note)
        if _noted(note) == bundle_id:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        with _new_file(note) as descriptor:
            _write_all(descriptor, bundle_id.encode())
    except (OSError, ValueError) as exc:
        raise InvalidConfig(f"the cache {cache_dir} cannot be written ({exc}); choose another folder") from exc


def forget_old(cache_dir: Path, now: float) -> None:
    """Remove bundles that are a day old and that no noted server has, so that the cache stays small over years.

    Args:
        cache_dir: root of the cache.
        now: seconds since 1970.
    """
    with contextlib.suppress(OSError):
        if (cache_dir / "bundles").is_symlink():
            return
        noted = {_noted(note) for note in (cache_dir / "servers").iterdir()}
        for folder in (cache_dir / "bundles").iterdir():
            bundle_id = f"sha256:{folder.name}"
            if not re.fullmatch(_BUNDLE_ID, bundle_id) or bundle_id in noted:
                continue
            if now - folder.lstat().st_mtime > _KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)


def recall(cache_dir: Path, server: str, model: str, *, pinned: str = "") -> Bundle | None:
    """The bundle that a server had last, verified; None if it is not in the cache, or damaged there.

    Args:
        cache_dir: root of the cache.
        server: HOST:PORT.
        model: as for `remember`.
        pinned: id of a bundle whose ONNX files are taken without a check of their cost; empty for none.
    """
    try:
        note = _note(cache_dir, server, model)
        _no_links(cache_dir, note)
        bundle_id = _noted(note)
        root = cache_dir / "bundles" / _digits(bundle_id)
        for path in root.rglob("*"):
            _no_links(cache_dir, path)
        bundle = Bundle.open(root, side="edge")
        if bundle_id != pinned:
            check_costs(root, bundle.manifest)
    except (OSError, ValueError, BitneckError):
        return None
    return bundle if bundle.bundle_id == bundle_id else None


def _digits(bundle_id: str) -> str:
    """The hexadecimal digits of a bundle's id.

    Raises:
        BundleMismatch: it is not a bundle's id.
    """
    if not re.fullmatch(_BUNDLE_ID, bundle_id):
        raise BundleMismatch(f"{bundle_id[:80]!r} is no bundle id, expected sha256: and 64 hexadecimal digits")
    return bundle_id.removeprefix("sha256:")


def _note(cache_dir: Path, server: str, model: str) -> Path:
    return cache_dir / "servers" / hashlib.sha256(f"{server}\n{model}".encode()).hexdigest()[:32]


def _noted(note: Path) -> str:
    """What a note says; empty if there is none. In a shared cache it may be anything, also a pipe or a huge file."""
    try:
        descriptor = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.read(descriptor, _MAX_NOTE_BYTES).decode(errors="replace") if regular else ""
    finally:
        os.close(descriptor)


def _good(path: Path, entry: FileEntry) -> bool:
    try:
        verify_file(path, entry)
    except BundleCorrupt:
        return False
    return True


async def _receive(
    path: Path, entry: FileEntry, chunks: AsyncGenerator[bytes], on_bytes: Callable[[int], None]
) -> None:
    """Write a file as it arrives; `on_bytes` gets the size of each chunk. A wrong file leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, received = hashlib.sha256(), 0
    with _new_file(path) as descriptor:
        async for data in chunks:
            received += len(data)
            if received > entry.size:
                raise BundleCorrupt(
                    f"{path.name} is longer than the {entry.size} bytes that the manifest says; refused"
                )
            digest.update(data)
            _write_all(descriptor, data)
            on_bytes(len(data))
        if received != entry.size:
            raise BundleCorrupt(
                f"{path.name} arrived with {received} bytes, the manifest says {entry.size}; refused, try again"
            )
        if digest.hexdigest() != entry.sha256:
            raise BundleCorrupt(
                f"{path.name} arrived with SHA-256 {digest.hexdigest()[:16]}…, the manifest says "
                f"{entry.sha256[:16]}…; refused: it was damaged on the way, or the server's bundle is"
            )


def _write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: one call may write fewer than it is given, for example when the disk fills up."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _check_costs(root: Path, manifest: Manifest, fetched: Iterable[str]) -> None:
    """Check the graphs; if they would take too much to run, remove those that were fetched now."""
    try:
        check_costs(root, manifest)
    except BundleCorrupt:
        for path in fetched:
            if path.endswith(".onnx"):
                (root / path).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask. There is no way to read it but to set it."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _no_links(folder: Path, path: Path) -> None:
    """Refuse a path whose parts below a folder are links: in a shared cache they could lead anywhere.

    Raises:
        InvalidConfig: one is a link.
    """
    for part in (path, *path.parents):
        if part == folder:
            return
        if part.is_symlink():
            raise InvalidConfig(f"{part} in the cache is a link; remove it, or choose another folder (--cache-dir)")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that gets its name when the block ends without an error, and else is removed."""
    descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        yield descriptor
        os.fsync(descriptor)
        os.fchmod(descriptor, 0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
