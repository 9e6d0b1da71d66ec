"""The link: a session with the cloud that outlives its connections.

One task owns the connection. It opens the session, reads messages, and when the connection ends or an answer is
overdue, it connects again after a pause and resumes the session with its token. A frame keeps its number however often
it is sent, and the cloud answers each number once.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable

from bitneck.backoff import Backoff
from bitneck.errors import BitneckError, DeadlineExceeded, Overloaded, ProtocolError, Unavailable, Unreachable
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import (
    Ack,
    Fault,
    GoAway,
    NewBundle,
    Open,
    Opened,
    Result,
    Results,
    ServerMessage,
    SetPoint,
)
from bitneck_edge.link.connection import Connection, connect
from bitneck_edge.link.exchange import Exchange
from bitneck_edge.link.link_settings import ASK, LinkSettings
from bitneck_edge.link.records import Candidate

__all__ = ["Link", "LinkSettings"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.2, 5.0
_MAX_WINDOW = 1024
_TOO_MANY_PINGS = "too_many_pings"
_FAIR_S = 1.0
"""A server that sends us away after this time, with nothing unanswered, did its part; else it counts as failing."""
_IDLE_PAUSE_S = 60.0
"""Longest pause of a client that is sent away again and again without having anything to send."""
_LEAVE_S = 1.0
"""For the server to read that nobody comes back; a stream that is reset at once may lose what was written last."""
_LEAVE_POLL_S = 0.02
_MOST_CONTROL = 200
"""Messages between two that are about an unanswered frame. A server that sends more is broken."""


class Link:
    """A session with the cloud.

    Attributes:
        session_id: public name of the session.
        reconnects: how often it connected again, attempts that failed included.
        connected: whether a connection is up, and the session open on it.
        initial_point: operating point that the cloud asked for when the session was opened; empty for none.
        max_kbps: what the device's link may carry, as the cloud asks; 0 for no limit.
        token: resumes the session; secret.
        new_bundle: id of another bundle that the cloud has for this client; empty for none.
        send: sends a frame; see `Exchange.send`.
        report: tells the server how the device is; see `Exchange.report`.
        flush: nothing more follows for a while; see `Exchange.flush`.

    Args:
        settings: addresses and limits.
        on_point: called with (point, reason) when the cloud asks for another operating point.
        on_reconnect: called when the session was resumed and unanswered frames have been sent again.
        on_late: called with the point that the cloud asks for when the session is opened after `start` had returned.
        on_new_bundle: called when the cloud has another bundle for this client; see `new_bundle`.
    """

    def __init__(
        self,
        settings: LinkSettings,
        on_point: Callable[[str, str], None],
        on_reconnect: Callable[[], None] = lambda: None,
        on_late: Callable[[str], None] = lambda _point: None,
        on_new_bundle: Callable[[], None] = lambda: None,
    ) -> None:
        self.session_id = ""
        self.reconnects = 0
        self.connected = False
        self.initial_point = ""
        self.max_kbps = 0.0
        self._late = False
        self._on_late = on_late
        self.new_bundle = ""
        self._on_new_bundle = on_new_bundle
        self._tried = asyncio.Event()
        self._settings = settings
        self._access = settings.access
        self._address = settings.access.address
        self._on_point = on_point
        self._on_reconnect = on_reconnect
        self._exchange = Exchange(
            settings.key_every, settings.positions, settings.ask_s, settings.pack, settings.pack_ms / 1e3
        )
        self.send = self._exchange.send
        self.report = self._exchange.report
        self.flush = self._exchange.flush
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._leaving: frozenset[int] | None = None  # the server goes away: frames that it may still answer
        self.token = ""
        self._asked_point = ""
        self._closing = False

    async def open(self) -> None:
        """Connect and open the session.

        Raises:
            Unavailable: no server after the retries.
            BundleMismatch: the server runs another bundle.
            BitneckError: whatever else the server refuses.
        """
        await self._begin()

    async def start(self) -> bool:
        """The same, but if no server answers the first attempt, it goes on trying in the background.

        Returns:
            Whether the session is open.

        Raises:
            BitneckError: whatever else the server refuses.
        """
        opened = self._begin()
        await self._tried.wait()
        if opened.done():
            await opened
        else:
            self._late = True
        return not self._late

    def _begin(self) -> asyncio.Future[None]:
        self._opened = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(self._opened), name="bitneck-link")
        return self._opened

    @property
    def up(self) -> bool:
        """Whether the server answered when the link was last opened, and the connection has not broken since."""
        return self._opened is not None and self._opened.done() and not self._exchange.down and self.failure is None

    @property
    def silent_s(self) -> float:
        """See `Exchange.silent_s`."""
        return self._exchange.silent_s()

    async def takes(self, in_flight: int, limit_s: float) -> bool:
        """See `Exchange.takes`."""
        return self.up and await self._exchange.takes(in_flight, limit_s)

    @property
    def failure(self) -> BitneckError | None:
        """Why the link cannot be used any more; None while it can."""
        return self._exchange.failure

    @property
    def window(self) -> int:
        """Frames that may be unanswered, as the server granted."""
        return self._exchange.window

    @property
    def unanswered(self) -> tuple[int, ...]:
        """Numbers of the frames that wait for their answer."""
        return self._exchange.unanswered

    @property
    def link_bytes(self) -> LinkBytes:
        """What has crossed the link since the session was opened; see `bitneck.wire.link_bytes`."""
        return self._exchange.link_bytes

    def expected_link_bytes(self, payload_bytes: float, interval_s: float) -> LinkBytes:
        """What a frame costs on this link; see `bitneck.wire.link_bytes.LinkMeter.expected`."""
        return self._exchange.expected_link_bytes(payload_bytes, interval_s)

    async def close(self, *, leave: bool = False) -> None:
        """End the session; unanswered frames fail with `Unavailable`.

        Args:
            leave: tell the server that nobody comes back to it, and give it a second to end the stream.
        """
        self._closing = True  # from here on the end of the stream is what was asked for
        leave = leave and self.connected
        await self._exchange.finish(leave=leave)
        if self._task is not None:
            if leave:
                await asyncio.wait({self._task}, timeout=_LEAVE_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._exchange.fail(Unavailable("the link was closed before the answer came"))

    async def leave(self, reason: BitneckError, limit_s: float) -> None:
        """Wait until no frame is unanswered, then take none any more; `close` it after that.

        Args:
            reason: why frames that come later fail, and those that are not answered in time.
            limit_s: how long to wait.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._exchange.flush()
                while self._exchange.unanswered:  # noqa: ASYNC110  only here does anyone wait for all answers
                    await asyncio.sleep(_LEAVE_POLL_S)
        self._exchange.fail(reason)

    def candidate(self, point: str) -> Candidate | None:
        """What the next frame at a point may be coded against; None if it has to be coded by itself."""
        return self._exchange.candidate(point)

    async def _run(self, opened: asyncio.Future[None]) -> None:
        """Keep connected until that fails for good; then tell everyone who waits."""
        try:
            await self._keep_connected(opened)
        except BitneckError as exc:
            self._fail(exc, opened)
        except Exception as exc:  # noqa: BLE001  whoever waits for an answer must not wait for ever
            _LOG.exception("the link failed")
            self._fail(BitneckError(f"the link failed: {exc!r}"), opened)

    def _fail(self, error: BitneckError, opened: asyncio.Future[None]) -> None:
        if not opened.done():
            opened.set_exception(error)
            opened.exception()  # marks it as seen: after `start` nobody awaits it
        self._tried.set()
        self._exchange.fail(error)

    async def _keep_connected(self, opened: asyncio.Future[None]) -> None:
        """One connection after another.

        Raises:
            BitneckError: another connection would not help, or no retry is left.
        """
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=self._settings.retries)
        idle_pause = Backoff(first_s=_FIRST_PAUSE_S, most_s=_IDLE_PAUSE_S)
        while True:
            begun, progress = time.perf_counter(), self._exchange.progress
            try:
                await self._use_connection(opened)
                error: BitneckError = Unavailable(f"{self._address}: the server ended the stream")
            except (Unavailable, DeadlineExceeded, Overloaded) as exc:
                if isinstance(exc, Unreachable) and not (opened.done() or self._settings.patient):
                    raise
                error = exc
            if self._closing:
                return
            if _TOO_MANY_PINGS in str(error).lower():
                self._access = self._access.slower()
                _LOG.info("the server takes fewer keepalives; one comes every %.0f s now", self._access.keepalive_s)
            idle = self._leaving is not None and not self._exchange.unanswered
            sent_away_fairly = idle and time.perf_counter() - begun > _FAIR_S
            self._exchange.down = not sent_away_fairly
            if sent_away_fairly or progress != self._exchange.progress:
                backoff.succeeded()
            if progress != self._exchange.progress:
                idle_pause.succeeded()
            pause_s = backoff.failed(random.random())  # noqa: S311  no secret
            if sent_away_fairly:  # nobody wants anything, so there is no hurry; a frame ends the pause
                pause_s = idle_pause.failed(random.random())  # noqa: S311  likewise
            if pause_s is None:
                raise Unavailable(f"{error}; gave up after {backoff.failures} attempts") from error
            _LOG.warning("%s; connecting again in %.1f s", error, pause_s)
            self._tried.set()
            self._exchange.wake()
            if sent_away_fairly:
                await self._exchange.frame_comes(pause_s)
            else:
                await asyncio.sleep(pause_s)
            self.reconnects += 1

    async def _use_connection(self, opened: asyncio.Future[None]) -> None:
        """One connection, from connecting to its end: open the session or resume it, then read.

        Raises:
            BitneckError: see `connect`, `Connection.read`; or the server does not do its part.
        """
        self._leaving = None
        s = self._settings
        async with connect(self._access, s.connect_timeout_s, s.most_bytes, patient=s.patient) as connection:
            try:
                resumed = opened.done()
                self._grant(await self._handshake(connection), resumed=resumed)
                await self._attach(connection)
                self.connected = True
                self._exchange.down = False
                self._tried.set()
                if resumed:
                    self._on_reconnect()
                else:
                    opened.set_result(None)
                await self._serve(connection)
            finally:
                self.connected = False
                self._exchange.detach()

    async def _handshake(self, connection: Connection) -> Opened:
        """Ask for the session."""
        s = self._settings
        request = Open(
            model=s.model,
            bundle_id=s.bundle_id,
            client=s.client,
            resume_token=self.token,
            references=s.references,
            brief=bool(s.positions),
            answers=s.answers,
            spool=s.spool,
            follows="" if self.token else s.follows,
        )
        try:
            async with asyncio.timeout(s.answer_timeout_s):
                await connection.write(request)
                reply = await connection.read()
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{self._address}: no answer to Open within {s.answer_timeout_s:.1f} s") from exc
        if not isinstance(reply, Opened):
            raise ProtocolError(f"{self._address}: the first message was {type(reply).__name__}, expected Opened")
        return reply

    def _grant(self, reply: Opened, *, resumed: bool) -> None:
        """Note what the server granted, within our own limits."""
        same_session = self.session_id in ("", reply.session_id)
        if not same_session:
            _LOG.warning("the server does not know the session any more; going on in a new one")
        self._exchange.granted(
            window=min(max(1, reply.window), _MAX_WINDOW),
            reach=min(reply.references, _MAX_WINDOW) if self._settings.references else 0,
            same_session=same_session,
        )
        self.session_id, self.token = reply.session_id, reply.resume_token
        before, self._asked_point = self._asked_point, reply.point
        self.max_kbps = reply.max_kbps
        if not resumed:
            self.initial_point = reply.point
            if self._late:
                self._on_late(reply.point)
        elif reply.point not in ("", before):
            self._on_point(reply.point, "asked for while the link was down")

    async def _attach(self, connection: Connection) -> None:
        """Send what is unanswered; a server that does not read it is given up."""
        limit_s = self._settings.answer_timeout_s
        connection.begin()
        try:
            async with asyncio.timeout(limit_s):
                await self._exchange.attach(connection)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{self._address}: the server does not read; waited {limit_s:.1f} s") from exc

    async def _serve(self, connection: Connection) -> None:
        """Read until the stream ends or, if the server goes away, until its last frame is answered."""
        watchdog = asyncio.create_task(self._watch(connection))
        try:
            control = 0
            while self._leaving is None or self._exchange.waits_for(self._leaving):
                message = await connection.read()
                control = 0 if self._exchange.settles(message) else control + 1
                if control > _MOST_CONTROL:
                    raise Unavailable(f"{self._address}: {control} messages without an answer; the server is broken")
                await self._take(message)
        finally:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)

    async def _watch(self, connection: Connection) -> None:
        """Abandon a connection on which an answer is overdue: the other side may be gone without a word."""
        limit_s = self._settings.answer_timeout_s
        while True:
            await asyncio.sleep(limit_s / 20)
            if self._exchange.overdue(limit_s):
                text = f"{self._address}: a frame waited {limit_s:.1f} s for its answer; the link counts as dead"
                connection.abandon(DeadlineExceeded(text))
                return
            await self._exchange.ask(limit_s * ASK)

    async def _take(self, message: ServerMessage | None) -> None:
        """One message of the server."""
        match message:
            case Result() | Results() | Ack() | Fault():
                self._exchange.take(message)
            case SetPoint():
                self._asked_point, self.max_kbps = message.point, message.max_kbps
                self._on_point(message.point, message.reason)
            case NewBundle(bundle_id, reason) if bundle_id != self._settings.bundle_id:
                _LOG.info("the server has the bundle %s for this client: %s", bundle_id, reason)
                self.new_bundle = bundle_id
                self._on_new_bundle()
            case GoAway():
                _LOG.info("the server is going away: %s", message.reason)
                await self._exchange.release()
                self._leaving = frozenset(self._exchange.unanswered)
            case _:
                _LOG.debug("passed over a message: %s", type(message).__name__)
