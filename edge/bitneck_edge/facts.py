"""What an edge client shows of itself: its session, its bundle, its spool, and what it has done so far."""

import asyncio

from bitneck.bundle import Bundle
from bitneck.errors import Unavailable
from bitneck.wire.link_bytes import LinkBytes
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.link.remote import check_process
from bitneck_edge.observe.state import ClientState, Tally
from bitneck_edge.observe.temperature import temperatures_c
from bitneck_edge.session import EdgeSession
from bitneck_edge.settings import AUTO, EdgeSettings
from bitneck_edge.spool.bounds import SpoolCounts
from bitneck_edge.spool.spooling import Spooling

__all__ = ["ClientFacts"]


class ClientFacts:
    """The part of `EdgeClient` that changes nothing.

    Attributes:
        settings: see `EdgeClient`, like the next two.
        dropped: likewise.
        tally: likewise.
    """

    settings: EdgeSettings
    dropped: int
    tally: Tally
    _session: EdgeSession | None
    _spooling: Spooling | None
    _switched_times: int

    @property
    def point(self) -> str:
        """The operating point of the next frame. Assign another, or ``"auto"``; the control API can do so too."""
        return self._session.points.point if self._session is not None else ""

    @point.setter
    def point(self, point_id: str) -> None:
        self._opened().points.set(point_id)

    @property
    def encoder(self) -> EdgeEncoder:
        """The edge's half of the network.

        Raises:
            Unavailable: outside the ``async with`` block; so do the other properties of the session.
        """
        return self._opened().encoder

    @property
    def bundle(self) -> Bundle:
        """The bundle in use."""
        return self._opened().bundle

    @property
    def session_id(self) -> str:
        """The session's id, for the control API."""
        return self._opened().link.session_id

    @property
    def reconnects(self) -> int:
        """How often the link was opened again."""
        return self._opened().reconnects

    @property
    def link_bytes(self) -> LinkBytes:
        """What crossed this device's interface for all frames so far; see `bitneck.wire.link_bytes`."""
        return self._all_link_bytes(self._opened())

    @property
    def spool(self) -> SpoolCounts | None:
        """What became of the frames of the spool; None without one. It follows the disk; `drain` waits for that.

        It never waits itself: while the disk does not answer, these are the counts of before, and `waiting` grows.
        """
        return self._spooling.counts if self._spooling is not None else None

    @property
    def _kept_where(self) -> str:
        """Where a photograph's frame is that was left to the spool."""
        if self._spooling is not None and not self._spooling.counts.opened:
            return "the photograph waits in memory for the disk of the spool, which does not answer"
        return "the photograph is in the spool"

    @property
    def spool_id(self) -> str:
        """The name under which the cloud knows the spool; empty without one, and until it is open."""
        return self._spooling.spool_id if self._spooling is not None else ""

    async def drain(self, stop: asyncio.Event) -> None:
        """Wait until the spool has nothing more that can be sent now, or `stop` is set."""
        if self._spooling is not None:
            await self._spooling.drained(stop)

    def state(self) -> ClientState:
        """What it has done so far, and how it is now; also before it is open."""
        session = self._session
        return ClientState(
            tally=self.tally,
            dropped=self.dropped,
            unanswered=len(session.link.unanswered) if session is not None else 0,
            reconnects=session.reconnects if session is not None else 0,
            switches=self._switched_times,
            link=self._all_link_bytes(session),
            spool=self.spool,
            point=self.point,
            connected=session is not None and session.link.connected,
            temperatures_c=temperatures_c(),
        )

    def _all_link_bytes(self, session: EdgeSession | None) -> LinkBytes:
        """Those of a session and those before it, and of the spool."""
        live = session.link_bytes if session is not None else LinkBytes()
        return live + self._spooling.link_bytes if self._spooling is not None else live

    @property
    def opened(self) -> bool:
        """Whether it has a session: the first one was opened, and its bundle is here."""
        return self._session is not None

    @property
    def auto(self) -> bool:
        """Whether the operating point is chosen for each frame by what the link and the device can do."""
        return self._session.points.auto if self._session is not None else self.settings.point == AUTO

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._opened().link.window

    def _opened(self) -> EdgeSession:
        check_process()
        if self._session is None:
            raise Unavailable("the client is not open: use it inside `async with`")
        return self._session
