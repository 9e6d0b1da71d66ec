"""Addresses and limits of one link."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitneck.wire.messages import Answers
from bitneck_edge.link.remote import MAX_ANSWER_BYTES, Access

__all__ = ["ASK", "LinkSettings"]

ASK = 1 / 6
"""Share of the time until a link counts as dead, after which the device asks for acknowledgements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """See `bitneck_edge.settings.EdgeSettings`."""

    access: Access
    model: str
    bundle_id: str
    client: str
    connect_timeout_s: float
    answer_timeout_s: float
    retries: int
    references: bool = False
    key_every: int = 1
    most_bytes: int = MAX_ANSWER_BYTES
    positions: Mapping[str, int] = field(default_factory=dict)
    """Of the operating points in the bundle's manifest. With them the session is brief: the client has the labels."""
    answers: Answers = Answers.ALL
    pack: int = 1
    pack_ms: int = 0
    spool: str = ""
    follows: str = ""
    """See `bitneck.wire.messages.Open`, also for the one before."""
    patient: bool = False
    """Go on trying where another attempt would give the same, too: the network in between may be to blame. An attempt
    that is refused is over at once."""

    @property
    def ask_s(self) -> float | None:
        """See `bitneck_edge.link.records.Records`."""
        return self.answer_timeout_s * ASK if self.answers is Answers.NONE else None
