"""One photograph's way through a client: encoded, sent, answered, across changes of the server's bundle."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from bitneck.errors import BitneckError, BundleMismatch
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.link.sent import Sent
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.sources.capture import Capture
from bitneck_edge.spool.outage import Flight, Outage

__all__ = ["Passage", "Ways"]

T = TypeVar("T")

_BUNDLE_CHANGES = 3
"""How often one photograph is encoded again because the server came back with another bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What a passage needs of its client.

    Attributes:
        usable: the session for the next photograph.
        interval_s: mean time between pictures; 0 if unknown.
        renews: whether a session that failed is replaced by one with the server's other bundle.
        renew: replace it.
        finished: an answer as the program gets it.
        failed: told why a picture of a stream has no answer.
        outage: takes frames that the link does not take; None if there is no spool.
    """

    usable: Callable[[], EdgeSession]
    interval_s: Callable[[], float]
    renews: Callable[[EdgeSession], bool]
    renew: Callable[[EdgeSession], Awaitable[None]]
    finished: Callable[[Capture, Answer], Awaitable[Answer]]
    failed: Callable[[BitneckError], None]
    outage: Callable[[], Outage | None] = lambda: None


class Passage:
    """One photograph on its way through a client: a `Job` of the pipeline.

    If the server has another bundle at some stage, the client opens a session with that, and the stages before are done
    again.
    """

    def __init__(self, ways: Ways, capture: Capture, *, live: bool = False) -> None:
        self._ways = ways
        self._capture = capture
        self._bundle_changes = 0
        self._prompt = False
        self._live = live
        self._encoding: Encoding | None = None
        self._session: EdgeSession
        self._sent: Sent
        self._flight: Flight | None = None
        self._spooled = False

    def encode(self) -> None:
        """Begin to load and encode it."""
        with contextlib.suppress(BitneckError):  # `send` meets it again, and knows what to do
            self._begin()

    def send(self, *, prompt: bool = False) -> Awaitable[None]:
        """Wait until it is encoded, and send it; see `EdgeSession.send`."""
        self._prompt = prompt
        return self._through(self._send, self._encode)

    def drop(self) -> None:
        """Nobody waits for it any more: do not encode it, if that has not begun. With a spool, a frame goes there."""
        if self._encoding is not None:
            self._encoding.photo.cancel()
        if self._flight is not None and (outage := self._ways.outage()) is not None:
            outage.give_up(self._flight)

    def answer(self) -> Awaitable[Answer | None]:
        """Wait for its answer; None if the frame is in the spool."""
        return self._through(self._answer, self._encode, self._send)

    async def alone(self) -> Answer | None:
        """All stages, for a program that waits for this photograph alone; None if the frame is in the spool.

        Raises:
            BitneckError: it has no answer.
        """
        self.encode()
        try:
            await self.send(prompt=True)
            answer = await self.answer()
        except BitneckError:
            self.told()
            raise
        except BaseException:
            self.drop()
            raise
        if answer is not None:
            self.told()
        return answer

    def told(self) -> None:
        """The program has its answer, or its failure: the spool need not keep the frame any more."""
        if self._flight is not None and (outage := self._ways.outage()) is not None:
            outage.told(self._flight)

    def failed(self, error: BitneckError) -> Failure:
        """It was not answered."""
        self._ways.failed(error)
        return Failure(self._capture.name, error)

    def _begin(self) -> Encoding:
        self._session = self._ways.usable()
        self._encoding = self._session.begin(self._capture, self._ways.interval_s())
        if (outage := self._ways.outage()) is not None:
            self._flight = outage.begin(self._session, self._encoding, self._flight)
        return self._encoding

    async def _encode(self) -> None:
        self._begin()

    async def _send(self) -> None:
        encoding = self._encoding or self._begin()
        if (outage := self._ways.outage()) is not None and self._flight is not None:
            await self._send_or_keep(outage, encoding, self._flight)
            return
        self._sent = await self._session.send(encoding, prompt=self._prompt, live=self._live)

    async def _send_or_keep(self, outage: Outage, encoding: Encoding, flight: Flight) -> None:
        """Send it if the link takes it; else it goes to the spool."""
        try:
            await outage.encoded(flight)
            if await self._session.takes_frames():
                try:
                    self._sent = await self._session.send(encoding, prompt=self._prompt, live=self._live)
                except BitneckError:
                    if self._session.failure is None or self._moved:
                        raise
                else:
                    outage.sent(flight, self._sent)
                    return
            if self._moved and (moved := self._session.failure) is not None:
                raise moved
            self._spooled = True
            await outage.keep(flight)
        except asyncio.CancelledError:
            outage.give_up(flight)
            raise

    @property
    def _moved(self) -> bool:
        """Whether the client has another session with another bundle: what was not sent is coded again for that."""
        return self._ways.renews(self._session) and self._ways.usable() is not self._session

    async def _answer(self) -> Answer | None:
        assert self._encoding is not None
        if self._spooled:
            return None
        outage = self._ways.outage()
        if outage is not None and self._flight is not None and not await outage.watch(self._flight):
            return None
        return await self._ways.finished(self._capture, await self._session.answer(self._encoding, self._sent))

    async def _through(self, stage: Callable[[], Awaitable[T]], *before: Callable[[], Awaitable[None]]) -> T:
        """A stage; after a change of the bundle the stages before it are done again."""
        again: tuple[Callable[[], Awaitable[None]], ...] = ()
        while True:
            try:
                for each in again:
                    await each()
                return await stage()
            except BundleMismatch:
                self._bundle_changes += 1
                if not self._ways.renews(self._session) or self._bundle_changes > _BUNDLE_CHANGES:
                    raise
                await self._ways.renew(self._session)
                again, self._prompt = before, True  # nobody follows close behind it
