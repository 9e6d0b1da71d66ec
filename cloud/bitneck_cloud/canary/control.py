"""Control of canaries: begins one, gives its bundle to all or takes it back, and keeps that over restarts.

    current bundle   --begin-->  the same, and a candidate for some clients  --promote-->  the candidate
                                                                             --end----->  the current bundle

Clients that have another bundle than the one that they would get now are told so; they fetch it while their session
goes on, and go over. A frame is always decoded by the bundle that its session was opened with.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bitneck.errors import BitneckError, CanaryRefused, Unavailable, UnknownCandidate
from bitneck.runtime import ModulePool
from bitneck_cloud.bundles.changes import Change, Changes
from bitneck_cloud.bundles.folder import Look
from bitneck_cloud.canary.candidates import Candidate, Candidates
from bitneck_cloud.canary.loading import CandidateLoader, hold_files
from bitneck_cloud.canary.photographs import Photographs
from bitneck_cloud.canary.records import Ended, Running, Streams, Waiting
from bitneck_cloud.canary.state import CANARY, PROMOTED, CanaryState
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
_ANSWERS_S = 2.0
"""Whoever asks for a canary waits no longer for one that may begin now."""
_LIST_S = 10.0
_LOOK_S = 5.0
"""Folders of candidates are looked at so often, and whenever a device or an operator asks."""


class Canaries(CanaryState):
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
        changes: of the bundles; a reload is one, too.
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
        changes: Changes,
    ) -> None:
        super().__init__(registry, fleet, changes)
        self.candidates = candidates
        self._streams = streams
        self._loader = CandidateLoader(registry, candidates, pool, threads)
        self._earlier = earlier
        self._photos = photos
        self._resuming: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._list = Look(candidates.all, _LIST_S)

    async def listed(self) -> list[Candidate]:
        """The candidates of all models; see `Candidates.all`.

        Raises:
            CanaryRefused: the server has no such folder, or it cannot be read.
            Unavailable: its disk does not answer.
        """
        found = await self._list.take()
        if found is None:
            raise Unavailable("the folder of candidates does not answer; try again when its disk does")
        return found

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
            Unavailable: its disk does not answer, or another change of the model's bundle takes too long.
        """
        name = self._registry.model(name).name
        async with self._changes.of(name, f"canary begin {bundle[:80]}", yields=True) as change:
            self.refuse_second(name)
            current, for_whom = self._registry.model(name), self._fleet.groups.clients(clients)
            place = self.candidates.place(bundle)
            try:
                candidate = await change.on_disk(place, self._loader.load, bundle, current)
                await self._keep_earlier(change, candidate, current)
            except UnknownCandidate:
                raise
            except BitneckError as exc:
                _LOG.error("the canary %s of %s does not begin: %s", bundle, name, exc)
                record("canary begin", name, before=current.bundle.bundle_id, after=f"failed: {type(exc).__name__}")
                raise
            choice = BundleChoice(
                model=name, kind=CANARY, base=self._bases[name], bundle=bundle,
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
            Unavailable: a disk does not answer, or another change takes too long; likewise.
        """
        name = self._registry.model(name).name
        async with self._changes.of(name, "canary promote", yields=True) as change:
            running = self.of(name)
            choice = replace(running.choice, kind=PROMOTED, clients="", since=_now(), by=acting.get())
            kept = [choice] if choice.bundle_id != choice.base else []

            def serve() -> None:
                self._registry.swap(running.candidate)
                self._promoted.pop(name, None)
                self._promoted |= {each.model: each for each in kept}

            if problem := await running.folder.look():
                raise CanaryRefused(f"no device could fetch the candidate {running.choice.bundle}: {problem}")
            await change.on_disk(running.candidate.bundle.root, hold_files, running.candidate)
            await self._keep_earlier(change, running.candidate, running.current)
            return await self._finish("canary promote", running, kept, serve, after=choice.bundle_id)

    async def end(self, name: str) -> Ended:
        """Give the candidate to no more clients; those that have it go back. Its folder need not be there.

        A beginning or a promotion that waits for a disk is given up after a few seconds.

        Raises:
            UnknownModel: no model with this name is served.
            CanaryRefused: no canary of it runs.
            StateUnusable: it cannot be kept; nothing is changed.
            Unavailable: another change of the model's bundle takes too long.
        """
        name = self._registry.model(name).name
        async with self._changes.of(name, "canary end", over=True) as change:
            after, kept = self._registry.model(name).bundle.bundle_id, self._choices(name)
            if (waiting := self._waiting.get(name)) is not None:
                told = await self._decide(
                    "canary end", name, kept, lambda: self._forget(name), before=_shown(waiting.choice), after=after
                )
                return Ended(None, told)
            if name not in self._running and change.instead_of:
                record("canary end", name, before=change.instead_of, after=after)
                return Ended(None, 0)
            return await self._finish(
                "canary end", self.of(name), kept, lambda: self._registry.withdraw(name), after=after
            )

    async def folder_read(self, name: str, bundle_id: str) -> None:
        """The folder of ``--bundle`` was read again, and its bundle is served next: that takes a promotion's place.

        The caller changes the model's bundle; see `Changes`.

        Raises:
            StateUnusable: the promotion cannot be forgotten; nothing is changed.
        """
        if any(choice.model == name for choice in self._fleet.choices):  # also one that could not be served
            await self._fleet.choose(name, [])
            self._promoted.pop(name, None)
            self._forget(name)
        self._bases[name] = bundle_id

    async def resume(self) -> None:
        """Go on with what was chosen before a restart, as far as it still counts. The server begins after it."""
        for choice in sorted(self._fleet.choices, key=lambda choice: choice.kind != PROMOTED):  # a canary is beside it
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
                if choice.kind == CANARY:
                    seen = None if isinstance(exc, Unavailable) else version
                    self._waiting[choice.model] = Waiting(choice, str(exc), seen, look)

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
            if name not in self._resuming:
                if version in (None, waiting.version) or self._waiting.get(name) is not waiting:
                    return
                self._resuming[name] = asyncio.create_task(self._resume_at_last(waiting, version))
                self._resuming[name].add_done_callback(lambda _: self._resuming.pop(name, None))
            await asyncio.wait({self._resuming[name]}, timeout=_ANSWERS_S)

    async def _resume_at_last(self, waiting: Waiting, version: tuple[int, int] | None) -> None:
        """Begin a canary that waits for its bundle, if that is there. Nobody need wait for this."""
        try:
            await self._resume(waiting.choice, waiting)
        except BitneckError as exc:
            waiting.problem, waiting.version = str(exc), None if isinstance(exc, Unavailable) else version

    async def _resume(self, choice: BundleChoice, waiting: Waiting | None = None) -> None:
        """Serve what was chosen before a restart; of one that waits only if it does so still."""
        name = choice.model
        async with self._changes.of(name, f"{choice.kind} {choice.bundle} goes on", yields=True) as change:
            if self._waiting.get(name) is not waiting:
                return
            current, place = self._registry.model(name), self.candidates.place(choice.bundle)
            candidate = await change.on_disk(place, self._loader.load, choice.bundle, current, choice.bundle_id)
            if choice.kind == PROMOTED:
                await change.on_disk(place, hold_files, candidate)
            await self._keep_earlier(change, candidate, current)
            if choice.kind == PROMOTED:
                self._registry.swap(candidate)
                self._promoted[name] = choice
            else:
                for_whom = self._fleet.groups.clients(choice.clients, known=False)
                if not for_whom.patterns:
                    _LOG.warning("the canary %s of %s is for %s, but the settings have no such group: it is for nobody "
                                 "now", choice.bundle, name, choice.clients)  # fmt: skip
                self._start(choice, for_whom, current, candidate)
            self._forget(name)
            _LOG.info("%s %s of %s goes on: %s", choice.kind, choice.bundle, name, choice.bundle_id)
        if waiting is not None:
            self._streams.tell_of_bundles(name)

    async def _keep_earlier(self, change: Change, served: ServedModel, before: ServedModel) -> None:
        """Keep a bundle that is served from now on for the frames of spools.

        Raises:
            StateUnusable: it cannot be kept.
            Unavailable: the disk does not answer.
        """
        if self._earlier.folder is not None:
            await change.on_disk(self._earlier.folder, self._earlier.keep, served.bundle, before.bundle)

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
                self._ending.add(running.task)
                running.task.add_done_callback(self._ending.discard)
            del self._running[name]

        told = await self._decide(action, name, kept, end, before=_shown(running.choice), after=after)
        return Ended((running, tallies), told)

    async def close(self) -> None:
        """Compare no more photographs, and begin nothing any more."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        tasks += self._resuming.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._ending, return_exceptions=True)


def _shown(choice: BundleChoice) -> dict[str, str]:
    """A canary as the audit log shows it."""
    return {"bundle": choice.bundle, "bundle_id": choice.bundle_id, "clients": choice.clients}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
