"""Canaries without a server and without clients: the calls of an operator, in this process."""

from collections.abc import Sequence
from pathlib import Path

from bitneck.runtime import ModulePool
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.reload import Reloader
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Session

__all__ = ["Nobody", "Operated", "registry_of"]


class Nobody:
    """Streams of a server to which no client is connected.

    Args:
        *models: that the server has.
    """

    def __init__(self, *models: str) -> None:
        self._models = models or ("tiny",)

    def push_point(self, _session: Session, _point: str, _reason: str) -> bool:
        """Nobody is told."""
        return False

    def connected(self, _session: Session) -> bool:
        """No session has a stream."""
        return False

    def tell_of_bundles(self, model: str) -> int:
        """Nobody is told."""
        assert model in self._models
        return 0


def registry_of(served: Sequence[ServedModel]) -> Registry:
    """A registry of some models."""
    return Registry(
        served, window=1, max_sessions=1, resume_s=1, assumed_fps=1, max_bytes_per_s=0, adopt=False,
        signer=TokenSigner(b"a key of the test", max_age_s=1),
    )  # fmt: skip


class Operated:
    """What an operator changes of some models, and what he sees.

    Attributes:
        registry: of the models.
        fleet: keeps what is chosen, in memory.
        canaries: of the models.
        reloader: reads their folders again.

    Args:
        served: the models.
        candidates: folder of bundles that may be tried.
        earlier: folder of earlier bundles; None for none.
        photos: folder of photographs to compare bundles on; None for none.
    """

    def __init__(
        self, served: Sequence[ServedModel], candidates: Path, earlier: Path | None = None, photos: Path | None = None
    ) -> None:
        pool, changes, kept = ModulePool(), Changes(), EarlierBundles(earlier, most=1, most_age_s=1e9)
        self.registry = registry_of(served)
        self.fleet = Fleet(Groups(), None, None, 10)
        self.canaries = Canaries(
            self.registry, Candidates(candidates), self.fleet, Nobody(*self.registry.models), pool, 1, kept, photos,
            changes,
        )  # fmt: skip
        folders = {model.name: model.bundle.root for model in served}
        self.reloader = Reloader(self.registry, folders, pool, 1, Metrics(), kept, self.canaries, changes)

    async def close(self) -> None:
        """Nothing is changed any more."""
        await self.canaries.close()
        await self.fleet.close()
