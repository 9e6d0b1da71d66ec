"""Control of canaries: begins one, gives its bundle to all or takes it back, and keeps that over restarts.

    current bundle   --begin-->  the same, and a candidate for some clients  --promote-->  the candidate
                                                                             --end----->  the current bundle

Clients that have another bundle than the one that they would get now are told so; they fetch it while their session
goes on, and go over. A frame is always decoded by the bundle that its session was opened with.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from bitneck.errors import BitneckError, CanaryRefused
from bitneck.runtime import ModulePool
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.folder import Look
from bitneck_cloud.canary.loading import CandidateLoader, check_folder
from bitneck_cloud.canary.photographs import Photographs
from bitneck_cloud.canary.records import Ended, Running, Streams, Waiting
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.engine.tally import Tally
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Clients
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.observe.audit import acting, record
from bitneck_cloud.sessions.registry import Registry

__all__ = ["Canaries"]

_LOG = logging.getLogger(__name__)
_CANARY: Final = "canary"
_PROMOTED: Final = "promoted"
_LOOK_S = 5.0
"""Folders of candidates are looked at so often, and whenever a device or an operator asks."""


class Canaries:
    """The canaries of one server, at most one of each model.

    Args:
        registry: gives clients their bundle.
        candidates: bundles that may be tried.
        fleet: knows groups of clients, and keeps what is chosen.
        streams: tell clients.
        pool: shares the ONNX files that several bundles have.
        threads: see `ServedModel`.
        earlier: keeps each bundle that is served.
        photos: folder of photographs to compare bundles on; None for none.
        lock: held while a bundle is changed; a reload takes it too.
    """

    def __init__(
        self,
        registry: Registry,
        candidates: Candidates,
        fleet: Fleet,
        streams: Streams,
        pool: ModulePool,
        threads: int,
        earlier: EarlierBundles,
        photos: Path | None,
        lock: asyncio.Lock,
    ) -> None:
        self.candidates = candidates
        self._registry = registry
        self._fleet = fleet
        self._streams = streams
        self._loader = CandidateLoader(registry, candidates, pool, threads, earlier)
        self._earlier = earlier
        self._photos = photos
        self._lock = lock
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

    async def begin(self, name: str, bundle: str, clients: str) -> tuple[Running, int]:
        """Give a candidate to some clients. If that fails, nothing is changed.

        Args:
            name: of the model.
            bundle: name among the candidates.
            clients: pattern of clients' names, or ``@`` and a group.

        Returns:
            The canary, and how many streams were told.

        Raises:
            UnknownModel: no model with this name is served.
            UnknownCandidate: there is no such candidate.
            CanaryRefused: one runs already, or this bundle cannot be one.
            InvalidConfig: a pattern that is refused, or a group that is not there.
            StateUnusable: it cannot be kept.
        """
        async with self._changing(name) as current:
            name = current.name
            if name in self._waiting:
                self.of(name)
            if name in self._running:
                choice = self._running[name].choice
                raise CanaryRefused(
                    f"a canary of {name} runs already, {choice.bundle} for {choice.clients}; promote it "
                    f"(POST /v1/models/{name}/canary/promote) or end it (DELETE /v1/models/{name}/canary) first"
                )
            for_whom = self._fleet.groups.clients(clients)
            await asyncio.to_thread(self.candidates.folder_of, bundle)
            try:
                candidate = await asyncio.to_thread(self._loader.load, bundle, current)
            except BitneckError as exc:
                _LOG.error("the canary %s of %s does not begin: %s", bundle, name, exc)
                record("canary begin", name, before=current.bundle.bundle_id, after=f"failed: {type(exc).__name__}")
                raise
            choice = BundleChoice(
                model=name, kind=_CANARY, base=self._bases[name], bundle=bundle,
                bundle_id=candidate.bundle.bundle_id, clients=clients, since=_now(), by=acting.get(),
            )  # fmt: skip
            told = await self._decide(
                "canary begin", name, [*self._choices(name), choice],
                lambda: self._start(choice, for_whom, current, candidate),
                before=current.bundle.bundle_id, after=_shown(choice),
            )  # fmt: skip
            return self._running[name], told

    async def promote(self, name: str) -> Ended:
        """Give the candidate to all clients.

        Raises:
            UnknownModel: no model with this name is served.
            CanaryRefused: no canary of it runs, or its folder is away, or does not hold the candidate any more.
            StateUnusable: it cannot be kept; nothing is changed.
            InvalidConfig: the folder of earlier bundles cannot be written; likewise.
        """
        async with self._changing(name) as current:
            running = self.of(current.name)
            choice = replace(running.choice, kind=_PROMOTED, clients="", since=_now(), by=acting.get())
            kept = [choice] if choice.bundle_id != choice.base else []

            def serve() -> None:
                self._registry.swap(running.candidate)
                self._promoted.pop(current.name, None)
                self._promoted |= {each.model: each for each in kept}

            if problem := await running.folder.look():
                raise CanaryRefused(f"no device could fetch the candidate {running.choice.bundle}: {problem}")
            await asyncio.to_thread(check_folder, running.candidate.bundle)
            await asyncio.to_thread(self._earlier.keep, running.candidate.bundle, running.current.bundle)
            return await self._finish("canary promote", running, kept, serve, after=choice.bundle_id)

    async def end(self, name: str) -> Ended:
        """Give the candidate to no more clients; those that have it go back. Its folder need not be there.

        Raises:
            UnknownModel: no model with this name is served.
            CanaryRefused: no canary of it runs.
            StateUnusable: it cannot be kept; nothing is changed.
        """
        async with self._changing(name) as current:
            name, after = current.name, current.bundle.bundle_id
            kept = self._choices(name)
            if (waiting := self._waiting.get(name)) is not None:
                told = await self._decide(
                    "canary end", name, kept, lambda: self._forget(name), before=_shown(waiting.choice), after=after
                )
                return Ended(None, told)
            return await self._finish(
                "canary end", self.of(name), kept, lambda: self._registry.withdraw(name), after=after
            )

    async def folder_read(self, name: str, bundle_id: str) -> None:
        """The folder of ``--bundle`` was read again, and its bundle is served next: that takes a promotion's place.

        The caller holds the lock.

        Raises:
            StateUnusable: the promotion cannot be forgotten; nothing is changed.
        """
        if any(choice.model == name for choice in self._fleet.choices):  # also one that could not be served
            await self._fleet.choose(name, [])
            self._promoted.pop(name, None)
            self._forget(name)
        self._bases[name] = bundle_id

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

    async def resume(self) -> None:
        """Go on with what was chosen before a restart, as far as it still counts. The server begins after it."""
        for choice in sorted(self._fleet.choices, key=lambda choice: choice.kind != _PROMOTED):  # a canary is beside it
            base = self._bases.get(choice.model)
            if base is None:
                continue  # another start of the server may have this model again
            what = f"{choice.kind} {choice.bundle} of {choice.model}"
            if base != choice.base:
                _LOG.warning("%s counts no more: the folder of --bundle holds another bundle now, %s", what, base)
                left = [each for each in self._fleet.choices if each.model == choice.model and each.base == base]
                await self._fleet.choose(choice.model, left)
                continue
            look = Look(partial(self.candidates.version, choice.bundle))
            version = await look.take()
            try:
                if version is None:
                    raise CanaryRefused(f"the folder of the candidate {choice.bundle} does not answer")
                await self._resume(choice)
            except BitneckError as exc:
                _LOG.error("%s is not served: %s; the bundle of --bundle is", what, exc)
                if choice.kind == _CANARY:
                    self._waiting[choice.model] = Waiting(choice, str(exc), version, look)

    async def watch(self) -> None:
        """Look at the folders of candidates now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for name in (*self._running, *self._waiting):
                await self.look(name)

    async def look(self, name: str) -> None:
        """Look at the folder of a model's candidate, if it has one.

        While devices cannot fetch the candidate from there, those that do not have it get the current bundle. A canary
        that waits for its bundle begins when that is there.
        """
        if (running := self._running.get(name)) is not None:
            problem = await running.folder.look()
            before, running.problem = running.problem, problem
            if running is not self._running.get(name) or bool(problem) == bool(before):
                return
            self._registry.withhold(name, withheld=bool(problem))
            if problem:
                _LOG.warning("canary %s of %s: %s; devices that do not have its bundle get the current one",
                             running.choice.bundle, name, problem)  # fmt: skip
            else:
                _LOG.info("canary %s of %s: devices get its bundle again", running.choice.bundle, name)
                self._streams.tell_of_bundles(name)
        elif (waiting := self._waiting.get(name)) is not None:
            version = await waiting.look.take()
            if version in (None, waiting.version):
                return
            async with self._lock:
                if self._waiting.get(name) is not waiting:
                    return
                try:
                    await self._resume(waiting.choice)
                except BitneckError as exc:
                    waiting.problem, waiting.version = str(exc), version
                else:
                    self._forget(name)
                    self._streams.tell_of_bundles(name)

    def _forget(self, name: str) -> None:
        """No canary of a model waits any more."""
        self._waiting.pop(name, None)

    async def _resume(self, choice: BundleChoice) -> None:
        current = self._registry.model(choice.model)
        candidate = await asyncio.to_thread(self._loader.load, choice.bundle, current, choice.bundle_id)
        if choice.kind == _PROMOTED:
            self._registry.swap(candidate)
            self._promoted[choice.model] = choice
        else:
            for_whom = self._fleet.groups.clients(choice.clients, known=False)
            if not for_whom.patterns:
                _LOG.warning("the canary %s of %s is for %s, but the settings have no such group: it is for nobody now",
                             choice.bundle, choice.model, choice.clients)  # fmt: skip
            self._start(choice, for_whom, current, candidate)
        _LOG.info("%s %s of %s goes on: %s", choice.kind, choice.bundle, choice.model, choice.bundle_id)

    def _choices(self, name: str) -> list[BundleChoice]:
        """What is chosen for a model beside a canary, also a promotion that could not be served."""
        return [choice for choice in self._fleet.choices if choice.model == name and choice.kind == _PROMOTED]

    @contextlib.asynccontextmanager
    async def _changing(self, name: str) -> AsyncGenerator[ServedModel]:
        """The bundle of a model that is served, which nobody else changes meanwhile.

        Raises:
            UnknownModel: no model with this name is served.
        """
        async with self._lock:
            yield self._registry.model(name)

    async def _decide(
        self,
        action: str,
        name: str,
        kept: Sequence[BundleChoice],
        serve: Callable[[], None],
        *,
        before: object,
        after: object,
    ) -> int:
        """Keep what is chosen for a model, serve by that, log it, and tell clients; how many streams were told.

        Raises:
            StateUnusable: it cannot be kept; nothing is changed.
        """
        await self._fleet.choose(name, kept)
        serve()
        record(action, name, before=before, after=after)
        return self._streams.tell_of_bundles(name)

    def _start(self, choice: BundleChoice, clients: Clients, current: ServedModel, candidate: ServedModel) -> None:
        running = Running(choice, current, candidate, _now())
        current.tally, candidate.tally = Tally(), Tally()
        if self._photos is not None:
            running.photographs = Photographs(self._photos, current, candidate)
            running.task = asyncio.create_task(running.photographs.run(), name="bitneck-canary-photographs")
        self._running[choice.model] = running
        self._registry.begin(candidate, clients)

    async def _finish(
        self, action: str, running: Running, kept: Sequence[BundleChoice], serve: Callable[[], None], *, after: str
    ) -> Ended:
        """`_decide` on the end of a canary, and compare no more."""
        tallies, name = running.tallies, running.choice.model

        def end() -> None:
            serve()
            running.current.tally = running.candidate.tally = None
            if running.photographs is not None:
                running.photographs.end()
            if running.task is not None:
                running.task.cancel()
            del self._running[name]

        told = await self._decide(action, name, kept, end, before=_shown(running.choice), after=after)
        return Ended((running, tallies), told)

    async def close(self) -> None:
        """Compare no more photographs."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shown(choice: BundleChoice) -> dict[str, str]:
    """A canary as the audit log shows it."""
    return {"bundle": choice.bundle, "bundle_id": choice.bundle_id, "clients": choice.clients}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
