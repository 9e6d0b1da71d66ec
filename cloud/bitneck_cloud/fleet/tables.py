"""How a rate and a rule are written, in the config file and in requests alike."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Table
from bitneck_cloud.fleet.patterns import MAX_PATTERN_CHARACTERS, Groups, Pattern
from bitneck_cloud.fleet.rules import EVERYTHING, RateRule, RuleBook
from bitneck_cloud.sessions.rates import ClientChooses, FixedPoint, MaxBytesPerFrame, MaxKbps, MinAccuracy, RatePolicy

__all__ = ["RateRequest", "RateTable", "book_of", "policy_dict", "policy_of"]


class RateRequest(BaseModel):
    """A rate: exactly one of these fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    point: str | None = Field(None, description="id of an operating point")
    max_bytes_per_frame: float | None = Field(None, gt=0, description="mean payload bytes of a frame, at most")
    max_kbps: float | None = Field(
        None, gt=0, description="mean rate on the link at the session's frame rate, of the busier direction, kbit/s"
    )
    min_accuracy: float | None = Field(None, ge=0, le=1, description="measured accuracy, at least, a fraction")
    auto: Literal[True] | None = Field(None, description="the client chooses")

    def policy(self) -> RatePolicy:
        """The policy that the request gives.

        Raises:
            InvalidConfig: none, or more than one.
        """
        given = self.model_dump(include=set(RateRequest.model_fields), exclude_none=True)
        if len(given) != 1:
            raise InvalidConfig(
                f"give exactly one of point, max_bytes_per_frame, max_kbps, min_accuracy and auto; got {len(given)}"
            )
        match given:
            case {"point": str(point)}:
                return FixedPoint(point)
            case {"max_bytes_per_frame": float(limit)}:
                return MaxBytesPerFrame(limit)
            case {"max_kbps": float(limit)}:
                return MaxKbps(limit)
            case {"auto": True}:
                return ClientChooses()
            case _:
                return MinAccuracy(given["min_accuracy"])


class RateTable(RateRequest, Table):
    """A rule: a rate for some clients with some models."""

    model: str = Field(
        EVERYTHING, min_length=1, max_length=MAX_PATTERN_CHARACTERS, description="pattern of models' names"
    )
    clients: str = Field(
        EVERYTHING,
        min_length=1,
        max_length=MAX_PATTERN_CHARACTERS,
        description="pattern of clients' names (*, ?, [abc]), or @ and the name of a group",
    )

    def rule(self, groups: Groups, *, since: str = "", by: str = "", number: int = 0) -> RateRule:
        """The rule that it describes.

        Args:
            groups: those that it may name.
            since: see `RateRule`, like the others.
            by: likewise.
            number: likewise.

        Raises:
            InvalidConfig: a pattern, a group or a rate that is refused.
        """
        return RateRule(
            model=Pattern(self.model),
            clients=groups.clients(self.clients),
            policy=self.policy(),
            since=since,
            by=by,
            number=number,
        )


def policy_dict(policy: RatePolicy) -> dict[str, str | float | bool]:
    """A policy as the request that asks for it."""
    match policy:
        case FixedPoint(point):
            return {"point": point}
        case MaxBytesPerFrame(limit):
            return {"max_bytes_per_frame": limit}
        case MaxKbps(limit):
            return {"max_kbps": limit}
        case MinAccuracy(accuracy):
            return {"min_accuracy": accuracy}
        case ClientChooses():
            return {"auto": True}


def policy_of(text: str) -> RatePolicy:
    """The policy that JSON of `policy_dict` gives.

    Raises:
        ValueError: it is none.
        InvalidConfig: likewise.
    """
    value: Any = json.loads(text)
    return RateRequest.model_validate(value).policy()


def book_of(tables: tuple[RateTable, ...], groups: Groups) -> RuleBook:
    """The rules of a config file. Of two that are equally specific, the later one counts.

    Raises:
        InvalidConfig: a rule that is refused, named by its position.
    """
    rules: list[RateRule] = []
    for number, table in enumerate(tables, 1):
        try:
            rules.append(table.rule(groups, by="the config file", number=number))
        except InvalidConfig as exc:
            raise InvalidConfig(f"rates, number {number}: {exc}") from exc
    return RuleBook(rules)
