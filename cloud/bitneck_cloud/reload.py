"""Reload a served model from its folder, beside the running one, and swap."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.runtime import ModulePool, return_freed_memory
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.sessions.registry import Registry

__all__ = ["Reloaded", "Reloader"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload changed: operating points by id, and how many ONNX files had to be read."""

    bundle_id: str
    changed: bool
    added: tuple[str, ...]
    removed: tuple[str, ...]
    altered: tuple[str, ...]
    files_loaded: int


class Reloader:
    """Loads bundles anew. One reload at a time; frames flow meanwhile.

    Args:
        registry: where the new generation goes.
        folders: each model's bundle.
        pool: shares the ONNX files that the new bundle and the running one both have.
        threads: see `ServedModel`.
        metrics: counts the outcomes.
        earlier: keeps each bundle that is served.
        canaries: of the server; None for none. While one of the model runs, it is not reloaded.
        changes: of the bundles; None for those of its own.
    """

    def __init__(
        self,
        registry: Registry,
        folders: Mapping[str, Path],
        pool: ModulePool,
        threads: int,
        metrics: Metrics,
        earlier: EarlierBundles | None = None,
        canaries: Canaries | None = None,
        changes: Changes | None = None,
    ) -> None:
        self._registry = registry
        self._folders = dict(folders)
        self._pool = pool
        self._threads = threads
        self._metrics = metrics
        self._earlier = earlier
        self._canaries = canaries
        self._changes = changes or Changes()

    async def reload(self, name: str) -> Reloaded:
        """Load the model's folder again. If that fails, the old bundle stays in service.

        Open streams finish with the bundle that they began with; new ones get the new one. The folder's bundle takes
        the place of one that was promoted.

        Raises:
            CanaryRefused: a canary of it runs.
            StateUnusable: a promotion cannot be forgotten, or the bundle cannot be kept; nothing is changed.
            UnknownModel: no model with this name is served.
            InvalidConfig, BundleCorrupt, ModelFailure: the bundle in the folder cannot be served.
            Unavailable: a disk does not answer, or another change takes too long.
        """
        name = self._registry.model(name).name
        async with self._changes.of(name, "reload") as change:
            old = self._registry.model(name)
            if self._canaries is not None:
                self._canaries.refuse_if_running(old.name)
            try:
                new, loads = await change.on_disk(self._folders[name], self._load, old)
                if new is not None and self._earlier is not None and self._earlier.folder is not None:
                    await change.on_disk(self._earlier.folder, self._earlier.keep, new.bundle, old.bundle)
                if self._canaries is not None:
                    await self._canaries.folder_read(old.name, (new or old).bundle.bundle_id)
            except BitneckError as exc:
                self._metrics.reload(old.name, "failed")
                _LOG.error("reload of %s failed, %s goes on serving: %s", old.name, old.bundle.bundle_id, exc)
                raise
            if new is None:
                self._metrics.reload(old.name, "unchanged")
                return Reloaded(old.bundle.bundle_id, changed=False, added=(), removed=(), altered=(), files_loaded=0)
            self._registry.swap(new)
            self._metrics.reload(old.name, "ok")
            _LOG.info("reloaded %s: %s in place of %s", new.name, new.bundle.bundle_id, old.bundle.bundle_id)
            before, after = old.identities, new.identities
            return Reloaded(
                bundle_id=new.bundle.bundle_id,
                changed=True,
                added=tuple(p for p in after if p not in before),
                removed=tuple(p for p in before if p not in after),
                altered=tuple(p for p in after if p in before and after[p] != before[p]),
                files_loaded=loads,
            )

    def _load(self, old: ServedModel) -> tuple[ServedModel | None, int]:
        bundle = Bundle.open(self._folders[old.name])
        if bundle.bundle_id == old.bundle.bundle_id:
            if bundle.root == old.bundle.root:
                old.files.hold()  # those of before may be on a disk that is gone
            return None, 0
        if bundle.manifest.name != old.name:
            raise InvalidConfig(
                f"{bundle.root} now holds the model {bundle.manifest.name!r}, expected {old.name!r}; "
                "serve another model with its own --bundle"
            )
        before = self._pool.loads
        model = ServedModel(bundle, threads=self._threads, pool=self._pool, before=old)
        model.files.hold()
        return_freed_memory()
        return model, self._pool.loads - before
