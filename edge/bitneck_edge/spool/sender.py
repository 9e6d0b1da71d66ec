"""The frames of a spool to the cloud: on a session of their own, behind the live ones, each until it is answered.

    Spool.take --batch--> Link (Open.spool) --answers--> hand out --> Spool.done

A frame's number is on the disk before it is sent, and a frame leaves the spool when its answer was handed out. The
session belongs to the bundle that coded the frames; frames of another bundle get another session.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from bitneck.backoff import Backoff
from bitneck.disk_thread import DiskThread
from bitneck.errors import (
    BitneckError,
    BundleMismatch,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
    UnknownModel,
    UnknownPoint,
)
from bitneck.wire.link_bytes import LinkBytes
from bitneck.wire.messages import Answers
from bitneck_edge.answers.assemble import spooled_answer_of
from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.sent import Sent
from bitneck_edge.opening import most_answer_bytes
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import SpoolCounts
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.known import KnownBundle
from bitneck_edge.spool.outage import HandOut
from bitneck_edge.spool.pace import SpoolPace
from bitneck_edge.spool.segment import Kept

__all__ = ["Sender"]

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1
_YIELD_S = 0.3
"""A batch waits for the live frames under way, but no longer than this: a camera's link is never without one."""
_IDLE_S = 2.0
"""A session without frames to send stays open for so long."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 1.0, 60.0
_FIRST_REFUSAL_S, _MOST_REFUSAL_S = 60.0, 3600.0
_MOST_ATTEMPTS = 3
"""For a frame that the server fails on, before it counts as answered with a fault."""
_UNKNOWN = (BundleMismatch, UnknownModel, UnknownPoint)
_PASSING = (Unavailable, Overloaded, DeadlineExceeded)


@dataclass(slots=True)
class _Refusal:
    """A bundle that the server does not have: when it is asked again, and at which connection it was asked last."""

    backoff: Backoff
    until: float
    reconnects: int


class Sender:
    """Sends a spool's frames. `run` does it until it is cancelled.

    Args:
        spool: of the device.
        files: works on its files, in order.
        house: brings them to the disk.
        settings: of the client.
        live: the link of the live frames; None while there is none.
        hand_out: takes the answers, and why there is none.
    """

    def __init__(
        self,
        spool: Spool,
        files: DiskThread,
        house: DiskThread,
        settings: EdgeSettings,
        live: Callable[[], Link | None],
        hand_out: HandOut,
    ) -> None:
        self.refused: frozenset[str] = frozenset()
        self._spool = spool
        self._files, self._house = files, house
        self._settings = settings
        self._live = live
        self._hand_out = hand_out
        self._pace = SpoolPace(settings.spool_kbps)
        self._answers = Answers(settings.answers)
        self._changed = asyncio.Event()
        self._refusals: dict[str, _Refusal] = {}
        self._attempts: Counter[int] = Counter()
        self._earlier = LinkBytes()
        self._link: Link | None = None

    @property
    def link_bytes(self) -> LinkBytes:
        """What has crossed the link for the spool's frames."""
        return self._earlier + self._link.link_bytes if self._link is not None else self._earlier

    @property
    def counts(self) -> SpoolCounts:
        """What became of the frames of the spool."""
        return self._spool.counts(self.refused)

    def look(self) -> None:
        """The spool has another frame to send."""
        self._changed.set()

    async def idle(self) -> bool:
        """Whether nothing can be sent now: the spool has no frames that the server could answer, or there is none.

        What was asked of the spool before is done when this returns, and counted.
        """
        waiting = await self._files.run(self._spool.has_waiting, self.refused)
        return not waiting or not self._reachable()

    async def run(self) -> None:
        """Send what is there whenever the link is up."""
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S)
        while True:
            try:
                await self._something_to_send()
                if await self._send_some():
                    backoff.succeeded()
            except (BitneckError, OSError) as exc:  # the server, or the disk
                pause_s = backoff.failed(random.random()) or _MOST_PAUSE_S  # noqa: S311  no secret
                _LOG.warning("frames of the spool are sent again in %.0f s: %s", pause_s, exc)
                await asyncio.sleep(pause_s)

    async def _something_to_send(self) -> None:
        while True:
            self._changed.clear()
            self._ask_again()
            if await self._files.run(self._spool.has_waiting, self.refused):
                if self._reachable():
                    return
                await asyncio.sleep(_POLL_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_S):  # wait_for loses a cancellation if the event comes with it
                        await self._changed.wait()

    def _reachable(self) -> bool:
        live = self._live()
        return live is not None and live.up

    def _ask_again(self) -> None:
        """Bundles that the server did not have are asked for again now and then, and at each new connection."""
        live = self._live()
        for bundle_id, refusal in self._refusals.items():
            again = live is not None and live.reconnects != refusal.reconnects
            if bundle_id in self.refused and (again or time.monotonic() >= refusal.until):
                self.refused -= {bundle_id}

    async def _refuse(self, bundle_id: str, error: BitneckError) -> None:
        live = self._live()
        backoff = Backoff(first_s=_FIRST_REFUSAL_S, most_s=_MOST_REFUSAL_S)
        refusal = self._refusals.setdefault(bundle_id, _Refusal(backoff, 0.0, 0))
        pause_s = refusal.backoff.failed(0.5) or _MOST_REFUSAL_S
        refusal.until = time.monotonic() + pause_s
        refusal.reconnects = live.reconnects if live is not None else 0
        self.refused |= {bundle_id}
        _LOG.warning(
            "%d frames stay in the spool: %s; the server is asked again in %.0f s, and when it is connected again",
            await self._files.run(self._spool.kept_of, [bundle_id]), error, pause_s,
        )  # fmt: skip

    async def _send_some(self) -> bool:
        """Open a session for the bundle of the next frame, and send frames of that as long as there are some.

        Returns:
            Whether anything was answered.

        Raises:
            BitneckError: the session failed, or the server did, and may do better later.
            OSError: the spool cannot be read.
        """
        following = await self._files.run(self._spool.take, 1, 0, self.refused)
        if not following:
            await asyncio.sleep(_POLL_S)  # they were too old
            return False
        bundle_id = following[0].bundle_id
        known = await self._files.run(self._spool.known.get, bundle_id)
        if known is None:
            await self._refuse(
                bundle_id, BitneckError(f"the manifest of the bundle {bundle_id} is not in the spool any more")
            )
            return False
        link = self._link = Link(self._link_settings(known), lambda _point, _reason: None)
        try:
            await link.open()
            return await self._send_all(link, known)
        except _UNKNOWN as exc:
            await self._refuse(bundle_id, exc)
            return False
        finally:
            await link.close()
            self._earlier, self._link = self.link_bytes, None

    def _link_settings(self, known: KnownBundle) -> LinkSettings:
        settings, manifest = self._settings, known.manifest
        return LinkSettings(
            access=settings.access,
            model=manifest.name,
            bundle_id=known.bundle_id,
            client=settings.client,
            connect_timeout_s=settings.connect_timeout_s,
            answer_timeout_s=settings.answer_timeout_s,
            retries=-1,  # what is unanswered in an outage is asked for again on the same session
            patient=True,
            most_bytes=most_answer_bytes(manifest),
            answers=self._answers,
            pack=1024,
            pack_ms=1000,
            positions={point.id: place for place, point in enumerate(manifest.points, start=1)},
            spool=self._spool.spool_id,
        )

    async def _send_all(self, link: Link, known: KnownBundle) -> bool:
        """Batch after batch, until no frame of the bundle is left, or one comes that has to go on another session."""
        last, any_answered, idle_since = 0, False, time.monotonic()
        while True:
            if not self._reachable():
                return any_answered
            frames = await self._next(link)
            if not frames:
                if time.monotonic() - idle_since > _IDLE_S:
                    return any_answered
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._changed.wait()
                continue
            if frames[0].bundle_id != known.bundle_id or frames[0].seq <= last:
                return any_answered
            last = frames[-1].seq
            await self._send_batch(link, known, frames)
            any_answered, idle_since = True, time.monotonic()

    async def _next(self, link: Link) -> list[Kept]:
        """The frames of the next batch, when it is their turn.

        Raises:
            Unavailable: their numbers cannot be brought to the disk.
            OSError: they cannot be read.
        """
        limit = time.monotonic() + _YIELD_S
        while True:
            live, now = self._live(), time.monotonic()
            if live is None or not live.up:
                return []
            waiting = len(live.unanswered)
            self._pace.live(live.link_bytes.busier, waiting > 0, now)
            count = self._pace.batch(link.window, waiting)
            pause_s = self._pace.pause_s(live.max_kbps, now)
            if pause_s <= 0 and count and (not waiting or now >= limit):
                break
            await asyncio.sleep(max(0.01, min(pause_s, _POLL_S)))
        frames = await self._files.run(self._spool.take, count, self._pace.most_bytes, self.refused)
        if frames and not await self._house.run(self._spool.sync):
            # No number is sent that a power failure could give away again.
            raise Unavailable("what is written in the spool cannot be brought to the disk")
        return frames

    async def _send_batch(self, link: Link, known: KnownBundle, frames: list[Kept]) -> None:
        """Send frames in one message, and hand out their answers.

        Raises:
            BitneckError: some are not answered, for a reason that may pass.
        """
        begun, before = time.monotonic(), link.link_bytes.busier
        out: list[tuple[Kept, Sent]] = []
        for frame in frames:
            try:
                sent = await link.send(
                    frame.point, frame.payload,
                    captured_unix_us=frame.captured_unix_us, prompt=frame is frames[-1], seq=frame.seq,
                )  # fmt: skip
            except Overloaded as exc:  # larger than any server takes
                if link.failure is not None:
                    raise
                self._settle(Failure(frame.name, exc), frame)
                continue
            out.append((frame, sent))
        await link.flush()
        later: BitneckError | None = None
        for frame, sent in out:
            try:
                received = await sent.answer
                answer = spooled_answer_of(frame, self._spool.spool_id, sent, received, known, self._answers)
                self._settle(replace(answer, session=link.session_id), frame)
            except BitneckError as exc:
                if self._stays(frame, exc, link):
                    later = exc
                else:
                    self._settle(Failure(frame.name, exc), frame)
        if later is not None:
            raise later
        now, live = time.monotonic(), self._live()
        self._pace.took(
            sum(len(frame.payload) for frame in frames),
            now - begun,
            link.link_bytes.busier - before,
            live.max_kbps if live is not None else 0.0,
            now,
        )

    def _stays(self, frame: Kept, error: BitneckError, link: Link) -> bool:
        """Whether a frame without an answer stays in the spool."""
        if link.failure is not None or isinstance(error, _PASSING):
            return True
        if error.grpc_status != "INTERNAL":
            return False
        self._attempts[frame.seq] += 1
        return self._attempts[frame.seq] < _MOST_ATTEMPTS

    def _settle(self, result: Answer | Failure, frame: Kept) -> None:
        """Hand out a frame's answer, then let it leave the spool."""
        self._hand_out(result)
        self._attempts.pop(frame.seq, None)
        self._files.post(lambda: self._spool.done([frame.seq]))
