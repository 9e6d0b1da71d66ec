"""Control of the fleet: sets and deletes rules, tells running sessions, and keeps rules and clients over restarts."""

import asyncio
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, FixedByFile, RateUnreachable, StateUnusable, Unavailable, UnknownPoint
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.records import BundleChoice, ClientBook, ClientRecord, RateChange
from bitneck_cloud.fleet.rules import RateRule, RuleBook
from bitneck_cloud.fleet.state_file import MAX_CHANGES, StateFile
from bitneck_cloud.fleet.tables import policy_dict
from bitneck_cloud.observe.audit import acting, record
from bitneck_cloud.sessions.rates import ClientChooses, RatePolicy
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Session

__all__ = ["Fleet", "Streams", "Told"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_KEEP_EVERY_S = 5.0
_OPEN_S, _DISK_S = 60.0, 10.0
"""Seconds that the disk of the state database may take at the start, and for each change."""
_TURN_S = 0.003
"""Seconds of work with many sessions, after which other work has its turn."""


class Streams(Protocol):
    """What reaches clients."""

    def push_point(self, session: Session, point: str, reason: str) -> bool:
        """Ask a session's client for another point now, and say whether it is connected."""

    def connected(self, session: Session) -> bool:
        """Whether a session has a stream."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a change did to the sessions that its rule matches.

    Attributes:
        told: connected ones that were told.
        waiting: ones that learn it when they come back.
        unreachable: ones whose model has no operating point for it; they keep theirs.
        overruled: ones that a more specific rule is for; they keep theirs.
        points: how many of those that were told or wait get which operating point, by model; None if their client
            chooses.
    """

    told: int = 0
    waiting: int = 0
    unreachable: int = 0
    overruled: int = 0
    points: Mapping[str, Mapping[str | None, int]] = field(default_factory=dict)


class Fleet:
    """Rules and clients of one server.

    Args:
        groups: that rules may name.
        fixed: rules of the config file, which cannot be changed; None if the control API changes them.
        state_db: where rules and clients are kept; None keeps them in memory.
        max_clients: see `CloudSettings`.
    """

    def __init__(self, groups: Groups, fixed: RuleBook | None, state_db: Path | None, max_clients: int) -> None:
        self.groups = groups
        self.fixed = fixed is not None
        self.clients = ClientBook(max_clients)
        self.changes: deque[RateChange] = deque(maxlen=MAX_CHANGES)
        self.choices: list[BundleChoice] = []
        self._first = fixed or RuleBook()
        self._max_clients = max_clients
        self._path = state_db
        self._state: StateFile | None = None
        self._disk = DiskThread("bitneck-state")
        self._changing, self._keeping = asyncio.Lock(), asyncio.Lock()
        self._failing = False
        self._registry: Registry | None = None
        self._streams: Streams | None = None

    @property
    def kept(self) -> bool:
        """Whether there is a state database."""
        return self._path is not None

    async def open(self) -> None:
        """Open the state database, if there is one, and read it.

        Raises:
            StateUnusable: it cannot be used, or does not answer.
        """
        if self._path is None:
            return
        self._state = state = await self._read(StateFile.open, self._path)
        self.clients = ClientBook(self._max_clients, await self._read(state.clients))
        self.changes.extend(await self._read(state.changes))
        self.choices = await self._read(state.choices)
        rules = await self._read(state.rules, self.groups)
        if self.fixed:
            if rules:
                _LOG.warning("%d rules in %s have no effect: the config file has rates", len(rules), self._path)
            return
        self._first = RuleBook(rules)

    def serve(self, registry: Registry, streams: Streams) -> None:
        """Begin: the registry gets the rules.

        Args:
            registry: gives the rules to new sessions.
            streams: tell running ones.
        """
        self._registry, self._streams = registry, streams
        registry.rules = self._first
        for rule in registry.rules.rules:
            if not rule.clients.patterns:
                _LOG.warning("a rule is for %s, but the settings have no such group: it is for nobody now",
                             rule.clients.text)  # fmt: skip

    @property
    def registry(self) -> Registry:
        """Of the server."""
        assert self._registry is not None
        return self._registry

    async def put(self, rule: RateRule, *, running: bool) -> Told | None:
        """Set a rule, in place of the one with the same patterns.

        Args:
            rule: its time and its author are set here.
            running: whether sessions that run get it now.

        Returns:
            What became of the running sessions; None if they were not asked for.

        Raises:
            FixedByFile: the config file has the rules.
            InvalidConfig: there are too many.
            StateUnusable, Unavailable: it cannot be kept, or the disk does not answer; nothing is changed.
        """
        self._refuse_if_fixed()
        async with self._changing:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            book = self.registry.rules.put(replace(rule, since=now, by=acting.get()))
            put = book.get(rule.key)
            assert put is not None
            return await self._change("PUT rate", book, rule.key, put, running=running)

    async def delete(self, key: tuple[str, str], *, running: bool) -> tuple[RateRule, Told | None]:
        """Delete a rule. Sessions that run and that it was for may get the next rule that is for them.

        Args:
            key: the patterns of models and of clients.
            running: whether sessions that run are told now. Where no other rule is for them, the client chooses.

        Returns:
            The rule that was deleted, and what became of the running sessions, as for `put`.

        Raises:
            FixedByFile: the config file has the rules.
            UnknownRule: there is no such rule.
            StateUnusable, Unavailable: as for `put`.
        """
        self._refuse_if_fixed()
        async with self._changing:
            book, rule = self.registry.rules.without(key), self.registry.rules.get(key)
            assert rule is not None
            return rule, await self._change("DELETE rate", book, key, None, running=running)

    async def _change(
        self, action: str, book: RuleBook, key: tuple[str, str], rule: RateRule | None, *, running: bool
    ) -> Told | None:
        before = self.registry.rules.get(key)
        change = RateChange(
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            who=acting.get(),
            model=key[0],
            clients=key[1],
            before=policy_dict(before.policy) if before is not None else None,
            after=policy_dict(rule.policy) if rule is not None else None,
            running=running,
        )
        target = f"{'' if running else 'new '}sessions of model {key[0]}, clients {key[1]}"
        if self._state is not None:
            try:
                undo = functools.partial(self._state.take_back, key, before, change)
                await self._on_disk(self._state.save_rule, key, rule, change, undo=undo)
            except BitneckError as exc:
                _LOG.error("a rule could not be kept, so nothing is changed: %s", exc)
                record(action, target, before=change.before, after=f"failed: {type(exc).__name__}")
                raise
        self.registry.rules = book
        self.changes.append(change)
        told = await self._tell(rule or before) if running else None
        record(action, target, before=change.before, after=change.after)
        return told

    async def _tell(self, changed: RateRule | None) -> Told:
        """Give the sessions that a changed rule matches the rule that is for them now."""
        assert changed is not None
        assert self._streams is not None
        counts = {"told": 0, "waiting": 0, "unreachable": 0, "overruled": 0}
        points: dict[str, Counter[str | None]] = {}
        present = self.registry.rules.get(changed.key)
        async for session in self._sessions():
            if session.spool or not changed.matches(session.model, session.client):
                continue  # frames of a spool are coded already: such a session is asked for no rate
            governing = self.registry.rule_for(session)
            if governing is not None and governing.rank > changed.rank:
                counts["overruled"] += 1
            elif present is not None and governing is not present:
                counts["unreachable"] += 1
            elif governing is not None or session.policy is not None:
                counts[outcome := self._give(session, governing)] += 1
                if outcome != "unreachable":
                    points.setdefault(session.model, Counter())[session.asked_point] += 1
        return Told(**counts, points=points)

    def _give(self, session: Session, rule: RateRule | None) -> str:
        policy: RatePolicy = rule.policy if rule is not None else ClientChooses()
        try:
            point = session.set_policy(policy)
        except (RateUnreachable, UnknownPoint):
            return "unreachable"
        text = ", ".join(f"{k}={v}" for k, v in policy_dict(policy).items())
        assert self._streams is not None
        return "told" if self._streams.push_point(session, point or "", f"control API: {text}") else "waiting"

    def _refuse_if_fixed(self) -> None:
        if self.fixed:
            raise FixedByFile(
                "the rates of this server stand in its config file ([[rates]]), so this change would be lost and other "
                "servers would not have it; change the file on every server and restart them, or set the rate of one "
                "session (PUT /v1/sessions/{id}/rate)"
            )

    async def choose(self, model: str, choices: Sequence[BundleChoice]) -> None:
        """Keep which bundles of a model are served beside that of ``--bundle``, or in its place.

        Raises:
            StateUnusable, Unavailable: they cannot be kept, or the disk does not answer; nothing is changed.
        """
        if self._state is not None:
            before = [choice for choice in self.choices if choice.model == model]
            undo = functools.partial(self._state.save_choices, model, before)
            await self._on_disk(self._state.save_choices, model, choices, undo=undo)
        self.choices = [choice for choice in self.choices if choice.model != model] + list(choices)

    def ended(self, session: Session) -> None:
        """A session was forgotten."""
        self.clients.ended(session, time.monotonic(), time.time())

    async def known_clients(self) -> dict[tuple[str, str], ClientRecord]:
        """Every client that is here, or was, by its name and its model's."""
        assert self._streams is not None
        self.registry.expire(time.monotonic())  # which adds to what is gone
        records = self.clients.gone()  # at the moment that `_sessions` begins: each session counts once
        async for session in self._sessions():
            connected = self._streams.connected(session)
            self.clients.include(records, session, connected=connected, now=time.monotonic(), wall=time.time())
        return records

    async def _sessions(self) -> AsyncIterator[Session]:
        """The sessions of this moment. Other work has its turn in between."""
        begin = time.monotonic()
        for session in self.registry.sessions(begin):
            yield session
            if time.monotonic() - begin > _TURN_S:
                await asyncio.sleep(0)
                begin = time.monotonic()

    async def keep(self) -> None:
        """Write what is known of the clients now and then, for ever."""
        while True:
            await asyncio.sleep(_KEEP_EVERY_S)
            try:
                await self._keep_clients()
            except Exception:  # noqa: BLE001  a bug here must not end it for good
                _LOG.exception("keeping what is known of clients failed; it goes on")

    async def _keep_clients(self) -> None:
        if self._state is None:
            return
        async with self._keeping:
            records = await self.known_clients()
            try:
                await self._on_disk(self._write_clients, records)
                if self._failing:
                    _LOG.info("%s can be written again", self._path)
                self._failing = False
            except BitneckError as exc:
                if not self._failing:
                    _LOG.error("what is known of clients is not kept now: %s", exc)
                self._failing = True

    def _write_clients(self, records: dict[tuple[str, str], ClientRecord]) -> None:
        assert self._state is not None
        changed, gone = self.clients.to_write(records)
        if changed or gone:
            self._state.save_clients(changed, gone)
            self.clients.written(records)

    async def close(self) -> None:
        """Write what is left, and release the database; within a bound."""
        if self._state is not None:
            if self._registry is not None:
                await self._keep_clients()
            try:
                await self._on_disk(self._state.close)
            except Unavailable as exc:
                _LOG.error("the server stops without it: %s", exc)
            self._state = None
        self._disk.end()

    async def _read(self, call: Callable[..., T], *arguments: Any) -> T:
        """What the disk gives at the start."""
        try:
            return await self._disk.within(_OPEN_S, call, *arguments)
        except TimeoutError:
            raise StateUnusable(
                f"state_db {self._path} has not answered for {_OPEN_S:g} s; is its disk there?"
            ) from None

    async def _on_disk(self, call: Callable[..., T], *arguments: Any, undo: Callable[[], object] | None = None) -> T:
        try:
            return await self._disk.within(_DISK_S, call, *arguments, undo=undo)
        except TimeoutError:
            raise Unavailable(
                f"state_db {self._path} has not answered for {_DISK_S:g} s; nothing is changed: try again later"
            ) from None
