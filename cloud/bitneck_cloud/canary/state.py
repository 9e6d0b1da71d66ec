"""What is known of the canaries of a server, and what of them forbids another change."""

from collections.abc import Mapping
from typing import Final

from bitneck.errors import CanaryRefused
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.canary.records import Running, Waiting
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.sessions.registry import Registry

__all__ = ["CANARY", "PROMOTED", "CanaryState"]

CANARY: Final = "canary"
PROMOTED: Final = "promoted"


class CanaryState:
    """The part of `Canaries` that only tells, or refuses. None of it waits for anything.

    Args:
        registry: gives clients their bundle.
        fleet: keeps what is chosen.
        changes: of the bundles; a reload is one, too.
    """

    def __init__(self, registry: Registry, fleet: Fleet, changes: Changes) -> None:
        self._registry = registry
        self._fleet = fleet
        self._changes = changes
        self._bases = {name: model.bundle.bundle_id for name, model in registry.models.items()}
        self._promoted: dict[str, BundleChoice] = {}
        self._running: dict[str, Running] = {}
        self._waiting: dict[str, Waiting] = {}

    @property
    def running(self) -> Mapping[str, Running]:
        """The canaries that run, by model."""
        return self._running

    @property
    def waiting(self) -> Mapping[str, Waiting]:
        """The canaries of before a restart whose bundle cannot be loaded, by model."""
        return self._waiting

    @property
    def kept(self) -> bool:
        """Whether they survive a restart."""
        return self._fleet.kept

    def under_way(self, name: str) -> str:
        """What is being done with a model's bundle now, and for how long; empty if nothing is."""
        return self._changes.under_way(name)

    def base(self, name: str) -> str:
        """Id of the bundle that the folder of ``--bundle`` held when it was loaded last."""
        return self._bases[name]

    def promoted(self, name: str) -> BundleChoice | None:
        """The choice by which a model's bundle is another one than that of ``--bundle``; None if it is not."""
        return self._promoted.get(name)

    def of(self, name: str) -> Running:
        """The canary of a model that runs.

        Raises:
            CanaryRefused: none does.
        """
        if (waiting := self._waiting.get(name)) is not None:
            raise CanaryRefused(
                f"the canary {waiting.choice.bundle} of {name} does not run: {waiting.problem}. It begins by itself "
                f"when its bundle is back; or end it (DELETE /v1/models/{name}/canary)"
            )
        if name not in self._running:
            raise CanaryRefused(f"no canary of {name} runs; POST /v1/models/{name}/canary begins one")
        return self._running[name]

    def refuse_second(self, name: str) -> None:
        """A model has one canary at most.

        Raises:
            CanaryRefused: one runs, or waits for its bundle.
        """
        if name in self._waiting:
            self.of(name)
        if name in self._running:
            choice = self._running[name].choice
            raise CanaryRefused(
                f"a canary of {name} runs already, {choice.bundle} for {choice.clients}; promote it "
                f"(POST /v1/models/{name}/canary/promote) or end it (DELETE /v1/models/{name}/canary) first"
            )

    def refuse_if_running(self, name: str) -> None:
        """A reload would change what the canary is compared with.

        Raises:
            CanaryRefused: a canary of this model runs, or waits for its bundle.
        """
        if name in self._running or name in self._waiting:
            raise CanaryRefused(
                f"a canary of {name} runs and is compared with the bundle that is served: promote it, or end it "
                f"(DELETE /v1/models/{name}/canary), then reload"
            )

    def _forget(self, name: str) -> None:
        """No canary of a model waits any more."""
        self._waiting.pop(name, None)

    def _choices(self, name: str) -> list[BundleChoice]:
        """What is chosen for a model beside a canary, also a promotion that could not be served."""
        return [choice for choice in self._fleet.choices if choice.model == name and choice.kind == PROMOTED]
