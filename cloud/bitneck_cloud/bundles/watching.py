"""The folders of the bundles in use, looked at now and then.

Frames are answered from memory, and devices get the files that are held. What needs the folder is the next start, a
reload, and a photograph that is tried in the console: so an operator has to know that it is away, before that.
"""

import asyncio
import logging
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from bitneck_cloud.bundles.folder import BundleFolder
from bitneck_cloud.sessions.registry import Registry

__all__ = ["FolderMetrics", "ServedFolders"]

_LOG = logging.getLogger(__name__)
_LOOK_S = 5.0


class ServedFolders:
    """Whether the bundles that are served are in their folders. Candidates have their own look.

    Args:
        registry: knows what is served.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._folders: dict[str, tuple[str, BundleFolder]] = {}  # by model, with the id of the bundle
        self._problems: dict[str, str] = {}

    def problem(self, name: str) -> str:
        """What is wrong with the folder of the bundle that a model is served from; empty if nothing is."""
        return self._problems.get(name, "")

    async def look(self) -> None:
        """Look at all of them, and log what has changed. A disk that does not answer is waited for two seconds."""
        for name, served in self._registry.models.items():
            bundle_id, folder = self._folders.get(name, ("", None))
            if folder is None or bundle_id != served.bundle.bundle_id:
                folder = BundleFolder(served.bundle)
                self._folders[name] = served.bundle.bundle_id, folder
            problem, before = await folder.look(), self.problem(name)
            if self._registry.model(name) is not served:
                continue
            self._problems[name] = problem
            if problem and problem != before:
                _LOG.warning(
                    "the bundle of %s is not in its folder: %s. The server goes on, and devices get its files, from "
                    "memory and from files that are still open; a restart and a reload need the folder", name, problem,
                )  # fmt: skip
            elif before and not problem:
                _LOG.info("the bundle of %s is in its folder again", name)

    async def watch(self) -> None:
        """Look now and then, until it is cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # noqa: BLE001  a bug here must not end it
                _LOG.exception("the folders of the bundles could not be looked at; it is tried again")
            await asyncio.sleep(_LOOK_S)


class FolderMetrics(Collector):
    """What was seen last of the folders, when it is asked for.

    Args:
        folders: of the bundles in use.
        registry: knows the models.
    """

    def __init__(self, folders: ServedFolders, registry: Registry) -> None:
        self._folders = folders
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        away = GaugeMetricFamily(
            "bitneck_bundle_away",
            "1 while the bundle that is served is not in its folder, or that does not answer.",
            labels=("model",),
        )
        for name in self._registry.models:
            away.add_metric((name,), float(bool(self._folders.problem(name))))
        return (away,)
