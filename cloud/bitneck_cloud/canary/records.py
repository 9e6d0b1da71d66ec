"""A canary that runs, and one that has ended."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from bitneck_cloud.bundles.folder import BundleFolder, Look
from bitneck_cloud.canary.photographs import Photographs
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.engine.tally import Tally
from bitneck_cloud.fleet.records import BundleChoice

__all__ = ["Ended", "Running", "Streams", "Waiting"]


class Streams(Protocol):
    """What reaches clients."""

    def tell_of_bundles(self, model: str) -> int:
        """Tell the clients of a model that have another bundle than the one that they would get now; how many."""


@dataclass(slots=True)
class Running:
    """A canary that runs.

    Attributes:
        choice: what was begun.
        current: the bundle that all others have.
        candidate: the one that is tried.
        counted_since: when the tallies began, RFC 3339: with the canary, or with this run of the server.
        photographs: the comparison on photographs; None if the server has none.
        problem: why devices that do not have the candidate get the current bundle; empty if they do not.
    """

    choice: BundleChoice
    current: ServedModel
    candidate: ServedModel
    counted_since: str
    photographs: Photographs | None = None
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)
    problem: str = ""
    folder: BundleFolder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Its folder is that of the candidate."""
        self.folder = BundleFolder(self.candidate.bundle)

    @property
    def tallies(self) -> tuple[Tally, Tally]:
        """Of the current bundle, and of the candidate."""
        assert self.current.tally is not None
        assert self.candidate.tally is not None
        return self.current.tally, self.candidate.tally


@dataclass(slots=True)
class Waiting:
    """A canary of before a restart whose bundle could not be loaded: all clients have the current one.

    Attributes:
        choice: what was begun.
        problem: why.
        version: of the candidate's manifest when it was tried, see `Candidates.version`; None if the disk did not
            answer.
        look: finds out what it is now.
    """

    choice: BundleChoice
    problem: str
    version: tuple[int, int] | None
    look: Look[tuple[int, int]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """A canary that was promoted, or ended.

    Attributes:
        compared: it in its last state, with the tallies of the current bundle of that time, and of the candidate; None
            if its bundle could not be loaded.
        told: streams whose clients were told that they have another bundle now.
    """

    compared: tuple[Running, tuple[Tally, Tally]] | None
    told: int
