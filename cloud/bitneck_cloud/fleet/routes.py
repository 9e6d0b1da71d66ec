"""Paths of the control API for rules of rates and for clients."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from bitneck.errors import BitneckError, UnknownModel
from bitneck_cloud.fleet.control import Fleet, Told
from bitneck_cloud.fleet.patterns import MAX_PATTERN_CHARACTERS, Pattern
from bitneck_cloud.fleet.records import ClientRecord
from bitneck_cloud.fleet.rules import EVERYTHING, RateRule
from bitneck_cloud.fleet.tables import RateTable, policy_dict
from bitneck_cloud.sessions.rates import choose
from bitneck_cloud.sessions.registry import Registry

__all__ = ["add_fleet"]

_MOST_CLIENTS = 1000
_AUTO = "auto"
_PatternText = Annotated[str, Query(min_length=1, max_length=MAX_PATTERN_CHARACTERS)]
_NOTES = {
    "file": "The config file holds the rules ([[rates]]): change them there, on every server; PUT and DELETE get 409",
    "database": "Rules are kept in this server's state_db over restarts; other servers do not have them",
    "memory": "Rules are forgotten when this server ends; set state_db to keep them",
}


class RulePut(RateTable):
    """A rule to set: a rate (exactly one of the five), and for whom. Without patterns it is for everybody."""

    running: bool = Field(False, description="whether sessions that run get it too, at once")


class SessionsTold(BaseModel):
    """What became of the sessions that the rule's patterns match."""

    told: int = Field(description="connected ones that were told")
    waiting: int = Field(description="disconnected ones, which learn it when they come back")
    unreachable: int = Field(description="ones whose model has no operating point for it; they keep theirs")
    overruled: int = Field(description="ones that a more specific rule is for; they keep theirs")
    points: dict[str, dict[str, int]] = Field(
        description="how many of those told and waiting get which operating point, by model: each is weighed at its "
        "own frame rate, on its own link; auto if the client chooses"
    )


class RuleAnswer(BaseModel):
    """The rule that was set."""

    model: str
    clients: str
    policy: dict[str, str | float | bool]
    points: dict[str, str | None] = Field(
        description="the operating point that new sessions get, by served model; null if the client chooses"
    )
    running: SessionsTold | None = Field(description="null if sessions that run were left alone")


class RuleInfo(BaseModel):
    """A rule."""

    model: str = Field(description="pattern of models' names")
    clients: str = Field(description="pattern of clients' names, or @ and a group")
    policy: dict[str, str | float | bool]
    points: dict[str, str | None] = Field(description="as new sessions get them, by served model")
    since: str = Field(description="when it was set, RFC 3339; empty for a rule of the config file")
    by: str


class RulesInfo(BaseModel):
    """All rules, in the order in which they count: for a session, the first that matches and fits its model."""

    source: Literal["file", "database", "memory"]
    changeable: bool = Field(description="false if PUT and DELETE get 409")
    note: str
    rules: list[RuleInfo]
    groups: dict[str, list[str]] = Field(description="patterns of clients' names, by group; from the config file")


class RuleDeleted(BaseModel):
    """The rule that was deleted."""

    model: str
    clients: str
    policy: dict[str, str | float | bool]
    running: SessionsTold | None


class RateChangeInfo(BaseModel):
    """A rule that was set or deleted."""

    at: str = Field(description="RFC 3339")
    who: str
    model: str
    clients: str
    before: dict[str, str | float | bool] | None
    after: dict[str, str | float | bool] | None = Field(description="null if the rule was deleted")
    running: bool


class ClientInfo(BaseModel):
    """A client with one model, over all its sessions on this server."""

    client: str = Field(description="its name, as it says itself, cleaned")
    model: str
    caller: str = Field(description="who opened its newest session: a token's or certificate's name, else an address")
    connected: bool
    point: str | None = Field(description="of its newest frame")
    last_seen: str = Field(description="when a stream began or ended, or a frame came; RFC 3339")
    frames: int = Field(description="that were answered")
    payload_bytes: int
    link_bytes_up: int
    link_bytes_down: int
    faults: int


class ClientsInfo(BaseModel):
    """Clients, the ones that were seen last first."""

    total: int = Field(description="clients that match, with those that are not in this page")
    clients: list[ClientInfo]


def add_fleet(app: FastAPI, fleet: Fleet, guarded: Sequence[Any], problems: dict[int | str, dict[str, Any]]) -> None:
    """Add the paths to the application.

    Args:
        app: the control API.
        fleet: what they show and change.
        guarded: dependencies of each path, for ``openapi.json``.
        problems: responses of each path.
    """
    common: dict[str, Any] = {"dependencies": list(guarded), "responses": problems}
    registry = fleet.registry

    @app.get("/v1/rate", tags=["rate"], **common)
    async def rules() -> RulesInfo:
        """The rules that give sessions their rates, and where they are kept."""
        source: Literal["file", "database", "memory"]
        source = "file" if fleet.fixed else "database" if fleet.kept else "memory"
        return RulesInfo(
            source=source,
            changeable=not fleet.fixed,
            note=_NOTES[source],
            rules=[_rule_info(registry, rule) for rule in registry.rules.rules],
            groups=fleet.groups.lists,
        )

    @app.put("/v1/rate", tags=["rate"], **common)
    async def put_rule(request: RulePut) -> RuleAnswer:
        """Set a rule, in place of one with the same patterns. Open sessions keep their rates unless `running` asks."""
        rule = request.rule(fleet.groups)
        points, refused = _points(registry, rule)
        if not points:
            first = next(iter(refused.values()))
            raise first if len(refused) == 1 else type(first)("; ".join(f"{n}: {exc}" for n, exc in refused.items()))
        told = await fleet.put(rule, running=request.running)
        return RuleAnswer(
            model=request.model,
            clients=request.clients,
            policy=policy_dict(rule.policy),
            points=points,
            running=_told(told),
        )

    @app.delete("/v1/rate", tags=["rate"], **common)
    async def delete_rule(
        clients: _PatternText = EVERYTHING, model: _PatternText = EVERYTHING, running: bool = False
    ) -> RuleDeleted:
        """Delete the rule with these patterns. With `running`, its sessions get the next rule that is for them."""
        rule, told = await fleet.delete((model, clients), running=running)
        return RuleDeleted(model=model, clients=clients, policy=policy_dict(rule.policy), running=_told(told))

    @app.get("/v1/rate/changes", tags=["rate"], **common)
    async def changes(limit: Annotated[int, Query(ge=1, le=500)] = 100) -> list[RateChangeInfo]:
        """Rules that were set or deleted, the newest first. The audit log has all changes."""
        newest = list(reversed(fleet.changes))[:limit]
        return [RateChangeInfo.model_validate(change, from_attributes=True) for change in newest]

    @app.get("/v1/clients", tags=["sessions"], response_model=ClientsInfo, **common)
    async def clients(
        client: _PatternText = EVERYTHING,
        connected: bool | None = None,
        limit: Annotated[int, Query(ge=1, le=_MOST_CLIENTS)] = _MOST_CLIENTS,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        """Clients that are here and clients that are gone, the ones that were seen last first."""
        pattern, records = Pattern(client), await fleet.known_clients()
        page = await asyncio.to_thread(_page, records.values(), pattern, connected, limit, offset)
        return Response(page, media_type="application/json")


def _points(registry: Registry, rule: RateRule) -> tuple[dict[str, str | None], dict[str, BitneckError]]:
    """The points that new sessions get, and why other models have none, by served model.

    Raises:
        UnknownModel: the rule's pattern matches no served model.
    """
    points: dict[str, str | None] = {}
    refused: dict[str, BitneckError] = {}
    fps = registry.assumed_fps
    remedy = f"New sessions are weighed at {fps:g} frames a second (--assumed-fps), each in a message of its own"
    for name, served in registry.models.items():
        if not rule.model.matches(name):
            continue
        try:
            chosen = choose(served.ladder, rule.policy, frames_per_s=fps, remedy=remedy)
            points[name] = chosen.id if chosen is not None else None
        except BitneckError as exc:
            refused[name] = exc
    if not points and not refused:
        raise UnknownModel(f"no model {rule.model.text[:80]!r} is served; there are: {', '.join(registry.models)}")
    return points, refused


def _rule_info(registry: Registry, rule: RateRule) -> RuleInfo:
    try:
        points, _ = _points(registry, rule)
    except UnknownModel:
        points = {}
    return RuleInfo(
        model=rule.model.text,
        clients=rule.clients.text,
        policy=policy_dict(rule.policy),
        points=points,
        since=rule.since,
        by=rule.by,
    )


def _told(told: Told | None) -> SessionsTold | None:
    if told is None:
        return None
    points = {
        model: {point if point is not None else _AUTO: count for point, count in chosen.items()}
        for model, chosen in told.points.items()
    }
    return SessionsTold(
        told=told.told, waiting=told.waiting, unreachable=told.unreachable, overruled=told.overruled, points=points
    )


def _page(records: Any, pattern: Pattern, connected: bool | None, limit: int, offset: int) -> bytes:
    """A page of clients as JSON; not on the event loop, because there may be thousands."""
    found: list[ClientRecord] = [
        r for r in records if pattern.matches(r.client) and (connected is None or r.connected == connected)
    ]
    found.sort(key=lambda r: (r.last_seen, r.key), reverse=True)
    shown = [
        ClientInfo(
            client=r.client,
            model=r.model,
            caller=r.caller,
            connected=r.connected,
            point=r.point or None,
            last_seen=datetime.fromtimestamp(r.last_seen, UTC).isoformat(timespec="milliseconds"),
            frames=r.frames,
            payload_bytes=r.payload_bytes,
            link_bytes_up=r.link_bytes_up,
            link_bytes_down=r.link_bytes_down,
            faults=r.faults,
        )
        for r in found[offset : offset + limit]
    ]
    return ClientsInfo(total=len(found), clients=shown).model_dump_json().encode()
