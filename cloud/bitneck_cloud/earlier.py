"""Bundles that a server had: kept on its disk, and loaded when a device's spool has frames of one of them.

    <folder>/<model>/<SHA-256 of the manifest>/    the cloud's half of a bundle

A bundle is copied when it is first served, so that it can still be loaded after its folder holds another one, and after
the server was started again.
"""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from bitneck.bundle import MANIFEST_NAME, Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, BundleMismatch, InvalidConfig, StateUnusable, Unavailable
from bitneck.ids import check_id
from bitneck.runtime import ModulePool, return_freed_memory
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.audit import record
from bitneck_cloud.sessions.registry import Registry

__all__ = ["EarlierBundles"]

_LOG = logging.getLogger(__name__)
_PREFIX = "sha256:"
_PART, _GONE = ".part-", ".gone-"
_LEFT_BEHIND_S = 3600.0
"""Age of a half copied or half removed bundle whose process must have been killed."""
_TRIES = 3
_FIRST_S, _MOST_S = 60.0, 30.0
"""A disk that has not answered for so long, at the start and later, does not answer. A bundle is loaded in a second."""


class EarlierBundles:
    """A folder of bundles. One is loaded at a time.

    Args:
        folder: where they are kept; None to keep none.
        most: of each model, besides the one that is served.
        most_age_s: since each was last served or used.
    """

    def __init__(self, folder: Path | None, *, most: int, most_age_s: float) -> None:
        self._folder = folder
        self._most = most
        self._most_age_s = most_age_s
        self._disk = DiskThread("bitneck-earlier")
        self._loading = asyncio.Lock()

    @property
    def folder(self) -> Path | None:
        """Where they are kept; None if none are."""
        return self._folder

    def keep(self, bundle: Bundle, replaced: Bundle | None = None) -> None:
        """Keep a bundle that is served from now on, and remove those that are too many or too old.

        Args:
            bundle: the one that is served from now on.
            replaced: the one that was served until now. At a server's start, it is the one that was used last.

        Raises:
            StateUnusable: the folder cannot be written.
        """
        if self._folder is None:
            return
        place = self._place(bundle.manifest.name, bundle.bundle_id)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(place.parent)
            last = self._place(bundle.manifest.name, replaced.bundle_id) if replaced is not None else _used_last(place)
            if last is not None:
                _use(last)
            if not (place / MANIFEST_NAME).is_file():
                self._copy(bundle, place)
            _use(place)
            self._forget_old(place)
        except OSError as exc:
            raise StateUnusable(
                f"the folder of earlier bundles {self._folder} cannot be written ({exc.strerror or exc}); "
                "make room, or choose another one (--earlier)"
            ) from exc

    async def keep_first(self, bundle: Bundle) -> None:
        """`keep` at the start of a server.

        Raises:
            StateUnusable: the folder cannot be written, or its disk does not answer.
        """
        if self._folder is None:
            return
        try:
            await self._disk.within(_FIRST_S, self.keep, bundle)
        except TimeoutError as exc:
            raise StateUnusable(
                f"the folder of earlier bundles {self._folder} has not answered for {_FIRST_S:.0f} s; look at its "
                "disk, or choose another one (--earlier)"
            ) from exc

    async def generation(
        self, registry: Registry, model: str, bundle_id: str, pool: ModulePool, threads: int
    ) -> ServedModel:
        """The generation of a model that coded a spool's frames. It is loaded if it has to be.

        Raises:
            UnknownModel: no such model.
            BundleMismatch: the bundle is not kept here, or cannot be loaded.
            Unavailable: the disk does not answer.
        """
        try:
            return registry.generation(model, bundle_id, earlier=True)
        except BundleMismatch:
            newest = registry.model(model)
            if self._folder is None or not _is_well_formed(bundle_id):
                raise
        try:
            async with asyncio.timeout(_MOST_S), self._loading:
                if self._disk.stuck_s > _MOST_S:
                    raise TimeoutError
                with contextlib.suppress(BundleMismatch):
                    return registry.generation(model, bundle_id, earlier=True)
                served = await self._disk.within(_MOST_S, self._load, newest, bundle_id, pool, threads)
                if served is None:  # which says so
                    return registry.generation(model, bundle_id, earlier=True)
                registry.add_earlier(served)
                _LOG.info("loaded the earlier bundle %s of %s for a spool", bundle_id, newest.name)
                record("load earlier bundle", f"model {newest.name}", who="server", after={"bundle_id": bundle_id})
                return served
        except TimeoutError as exc:
            _LOG.error("the folder of earlier bundles %s does not answer: %s stays unknown", self._folder, bundle_id)
            raise Unavailable("this server's disk of earlier bundles does not answer; try again later") from exc

    def _load(self, newest: ServedModel, bundle_id: str, pool: ModulePool, threads: int) -> ServedModel | None:
        """A bundle that is kept; None if it is not."""
        place = self._place(newest.name, bundle_id)
        if not (place / MANIFEST_NAME).is_file():
            return None
        try:
            bundle = Bundle.open(place, side="cloud")
            if bundle.bundle_id != bundle_id:
                raise InvalidConfig(f"{place} holds the bundle {bundle.bundle_id}")
            served = ServedModel(bundle, threads=threads, pool=pool, before=newest)
        except BitneckError as exc:
            _LOG.error("the earlier bundle %s cannot be loaded: %s", bundle_id, exc)
            raise BundleMismatch(f"this server cannot load the earlier bundle {bundle_id} any more") from exc
        return_freed_memory()
        with contextlib.suppress(OSError):
            _use(place)
        return served

    def _place(self, model: str, bundle_id: str) -> Path:
        assert self._folder is not None
        return self._folder / check_id(model, "model") / bundle_id.removeprefix(_PREFIX)

    def _copy(self, bundle: Bundle, place: Path) -> None:
        """Copy the cloud's half; the folder gets its name when it is whole."""
        with tempfile.TemporaryDirectory(prefix=_PART, dir=place.parent) as part:
            whole = Path(part) / "bundle"
            for name in bundle.manifest.files_for("cloud"):
                target = whole / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path(name), target)
            (whole / MANIFEST_NAME).write_bytes(bundle.manifest_json)
            for left in reversed(range(_TRIES)):
                try:
                    whole.replace(place)
                    return
                except OSError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not left:
                        raise
                if (place / MANIFEST_NAME).is_file():
                    return  # another server of this folder was faster
                _remove(place)  # what a removal has left that was cut off

    def _forget_old(self, current: Path) -> None:
        now = time.time()
        for number, (used, path) in enumerate(_others(current)):
            if number >= self._most or now - used > self._most_age_s:
                _LOG.info("the earlier bundle %s is removed", path)
                _remove(path)


def _is_well_formed(bundle_id: str) -> bool:
    digits = bundle_id.removeprefix(_PREFIX)
    return len(digits) == 64 and not set(digits) - set("0123456789abcdef")


def _others(current: Path) -> list[tuple[float, Path]]:
    """The other bundles of a model, with the time when each was used, the one that was used last first."""
    found = []
    for path in current.parent.iterdir():
        if path != current and len(path.name) == 64:
            with contextlib.suppress(FileNotFoundError):  # another server of this folder has removed it
                found.append((path.stat().st_mtime, path))
    return sorted(found, reverse=True)


def _used_last(place: Path) -> Path | None:
    """The bundle that was used last, if it is another one than this."""
    others = _others(place)
    if not others or (place.exists() and place.stat().st_mtime >= others[0][0]):
        return None
    return others[0][1]


def _use(place: Path) -> None:
    """A bundle's age counts from now on."""
    with contextlib.suppress(FileNotFoundError):  # another server of this folder has removed it
        os.utime(place)


def _remove(path: Path) -> None:
    """Remove a bundle. From the first moment on, none is there under its name: half of one is never loaded."""
    gone = path.with_name(_GONE + secrets.token_hex(8))
    with contextlib.suppress(FileNotFoundError):  # another server of this folder was faster
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove_left_behind(folder: Path) -> None:
    """Remove what killed processes have left."""
    now = time.time()
    for path in folder.iterdir():
        if path.name.startswith((_PART, _GONE)):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > _LEFT_BEHIND_S:
                    shutil.rmtree(path, ignore_errors=True)
