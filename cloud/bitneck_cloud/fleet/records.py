"""What is kept of clients and of changed rules. Pure: times come in as arguments."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from bitneck_cloud.sessions.session import Session

__all__ = ["BundleChoice", "BundleKind", "ClientBook", "ClientRecord", "RateChange"]

BundleKind = Literal["canary", "promoted"]

Key = tuple[str, str]
"""A client's name and its model's: what a record is known by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChange:
    """A rule that was set or deleted.

    Attributes:
        at: when, RFC 3339.
        who: did it.
        model: the rule's pattern of models.
        clients: its pattern of clients.
        before: the rate before, as the request that asks for it; None if there was no such rule.
        after: the rate now; None if the rule was deleted.
        running: whether sessions that ran got it too.
    """

    at: str
    who: str
    model: str
    clients: str
    before: dict[str, str | float | bool] | None
    after: dict[str, str | float | bool] | None
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleChoice:
    """A bundle that is served beside the one of ``--bundle``, or in its place.

    Attributes:
        model: the model's name.
        kind: ``canary`` for some clients, ``promoted`` for all.
        base: id of the bundle that the folder of ``--bundle`` held. While it holds that, the choice counts.
        bundle: name among the candidates.
        bundle_id: of that bundle.
        clients: pattern of the clients that have it, or ``@`` and a group; empty for all.
        since: when, RFC 3339.
        by: who chose.
    """

    model: str
    kind: BundleKind
    base: str
    bundle: str
    bundle_id: str
    clients: str
    since: str
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRecord:
    """What a client has sent, over all its sessions with one model.

    Attributes:
        client: its name, as it says itself, cleaned.
        model: of its sessions.
        caller: who opened the newest of them: a device's token or certificate, else an address.
        connected: whether a session has a stream.
        point: of its newest frame; empty if none came.
        last_seen: when a stream of it began or ended, or a frame came; seconds since 1970.
        frames: that were answered.
        payload_bytes: of its frames.
        link_bytes_up: see `bitneck.wire.link_bytes`.
        link_bytes_down: likewise.
        faults: frames and messages that were refused, or failed.
    """

    client: str
    model: str
    caller: str
    connected: bool = field(default=False, compare=False)
    point: str = ""
    last_seen: float = 0.0
    frames: int = 0
    payload_bytes: int = 0
    link_bytes_up: int = 0
    link_bytes_down: int = 0
    faults: int = 0

    @property
    def key(self) -> Key:
        """What it is known by."""
        return self.client, self.model

    def __add__(self, later: "ClientRecord") -> "ClientRecord":
        """Both together. What is no sum is that of the one that was seen last."""
        older, newer = (self, later) if self.last_seen <= later.last_seen else (later, self)
        return ClientRecord(
            client=newer.client,
            model=newer.model,
            caller=newer.caller,
            last_seen=newer.last_seen,
            point=newer.point or older.point,
            connected=self.connected or later.connected,
            frames=self.frames + later.frames,
            payload_bytes=self.payload_bytes + later.payload_bytes,
            link_bytes_up=self.link_bytes_up + later.link_bytes_up,
            link_bytes_down=self.link_bytes_down + later.link_bytes_down,
            faults=self.faults + later.faults,
        )


class ClientBook:
    """Clients that are here and clients that are gone. Of too many, the ones that ended longest ago fall out.

    Args:
        most: records of clients that are gone.
        kept: records of an earlier run.
    """

    def __init__(self, most: int, kept: Iterable[ClientRecord] = ()) -> None:
        self._most = most
        self._ended: OrderedDict[Key, ClientRecord] = OrderedDict()
        for record in sorted(kept, key=lambda record: record.last_seen):
            self._add(replace(record, connected=False))
        self._written = dict(self._ended)

    def ended(self, session: Session, now: float, wall: float) -> None:
        """A session was forgotten.

        Args:
            session: in its last state.
            now: seconds, on the clock of its times.
            wall: the same moment, seconds since 1970.
        """
        self._add(_record(session, False, now, wall))

    def gone(self) -> dict[Key, ClientRecord]:
        """What sessions that were forgotten have done, by client and model. The caller may change the dictionary."""
        return dict(self._ended)

    @staticmethod
    def include(
        records: dict[Key, ClientRecord], session: Session, *, connected: bool, now: float, wall: float
    ) -> None:
        """Add what an open session has done so far.

        Args:
            records: such as `gone` gives.
            session: an open one.
            connected: whether it has a stream.
            now: see `ended`.
            wall: likewise.
        """
        record = _record(session, connected, now, wall)
        before = records.get(record.key)
        records[record.key] = before + record if before is not None else record

    def to_write(self, records: dict[Key, ClientRecord]) -> tuple[list[ClientRecord], list[Key]]:
        """What differs from what `written` was told last: records that are new or changed, and keys that are gone."""
        changed = [record for key, record in records.items() if record != self._written.get(key)]
        return changed, [key for key in self._written if key not in records]

    def written(self, records: dict[Key, ClientRecord]) -> None:
        """These records are on the disk now."""
        self._written = dict(records)

    def _add(self, record: ClientRecord) -> None:
        before = self._ended.pop(record.key, None)
        self._ended[record.key] = before + record if before is not None else record
        while len(self._ended) > self._most:
            self._ended.popitem(last=False)


def _record(session: Session, connected: bool, now: float, wall: float) -> ClientRecord:
    link = session.link_bytes(now)
    heard = max(session.last_heard, session.disconnected_at or 0.0)
    return ClientRecord(
        client=session.client,
        model=session.model,
        caller=session.caller,
        connected=connected,
        point=session.last_point or "",
        last_seen=round(wall - (now - heard), 3),
        frames=session.answered,
        payload_bytes=session.payload_bytes,
        link_bytes_up=round(link.up),
        link_bytes_down=round(link.down),
        faults=session.faults.total(),
    )
