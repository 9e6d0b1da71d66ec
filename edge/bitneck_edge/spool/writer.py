"""Frames on their way into the spool's files: in order, in a thread of their own, within a bound of memory.

put --QUEUED--> thread --WRITTEN--> on_settled, with a number
        |          `------REFUSED-> on_settled, without one
        `-- done, before the thread has it: it is never written
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, Overloaded, Unavailable
from bitneck.workers import tell
from bitneck_edge.spool.disk import Complaints
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept

__all__ = ["Record", "Writer"]

_LOG = logging.getLogger(__name__)
_MOST_FRAMES, _MOST_BYTES = 2048, 8 << 20
"""Frames, and bytes of their payloads, that may wait for the disk."""
_PATIENT_S = 1.0
"""A frame waits for the disk for so long, less the time that the disk has been at its present work."""
_FRAME_BYTES = 512
"""Memory of a frame that waits, beside its payload, about."""


@dataclass(slots=True, eq=False)
class Record:
    """A frame that was given to the disk. The thread sets `seq` and `error`; all else is of the event loop.

    Attributes:
        seq: its number in the spool, once it is written; None before, and if it was refused.
        error: why it can never be written; None if a spool with room takes it.
        held: see `Spool.put`.
        settled: done when it is written, refused, or not wanted any more.
        unwanted: it need not be kept any more.
    """

    frame: Kept = field(repr=False)
    bundle: Bundle = field(repr=False)
    on_settled: Callable[["Record"], None]
    held: bool
    settled: "asyncio.Future[None]"
    seq: int | None = None
    error: BitneckError | None = None
    ticket: int | None = field(default=None, repr=False)
    unwanted: bool = False

    @property
    def waits(self) -> bool:
        """Whether the disk has yet to say what becomes of it."""
        return not self.settled.done()

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return len(self.frame.payload) + _FRAME_BYTES


class Writer:
    """Writes frames. All methods are of the event loop, and none waits for the disk but `settled`.

    Attributes:
        dropped: frames that did not get so far as to the spool, because too many waited for the disk.

    Args:
        spool: of the device.
        thread: that works on its files.
    """

    def __init__(self, spool: Spool, thread: DiskThread) -> None:
        self.dropped = 0
        self._spool = spool
        self._thread = thread
        self._frames = self._bytes = 0
        self._complaints = Complaints(spool.folder)

    @property
    def spool_id(self) -> str:
        """The name under which the cloud knows the spool; empty before it is open."""
        return self._spool.spool_id

    @property
    def waiting(self) -> int:
        """Frames that wait for the disk."""
        return self._frames

    def put(self, frame: Kept, bundle: Bundle, *, held: bool, on_settled: Callable[[Record], None]) -> Record:
        """Have a frame written.

        Args:
            frame: its number is not looked at.
            bundle: that coded it.
            held: see `Spool.put`.
            on_settled: called on the event loop once the frame is written or refused; not after `done`.
        """
        record = Record(frame, bundle, on_settled, held, asyncio.get_running_loop().create_future())
        self._submit(record)
        return record

    def _submit(self, record: Record) -> None:
        loop = asyncio.get_running_loop()
        if self._thread.closed:
            loop.call_soon(self._refused, record, Unavailable("the spool is closed"))
            return
        if self._frames >= _MOST_FRAMES or self._bytes + record.size > _MOST_BYTES:
            loop.call_soon(self._refused, record, None)
            return
        self._frames, self._bytes = self._frames + 1, self._bytes + record.size

        def write() -> None:
            held = record.held  # what changes that from now on comes behind this
            try:
                self.know(record.bundle)
                record.seq = self._spool.put(record.frame, held=held)
            except BitneckError as exc:
                record.error = exc
            except Exception as exc:  # noqa: BLE001  it must reach whoever waits
                _LOG.exception("the spool failed on a frame")
                record.error = Unavailable(f"the spool failed on the frame, it is lost: {exc!r}; the log says more")
            tell(loop, self._written, record, held)

        record.ticket = self._thread.post(write)

    def release(self, record: Record) -> None:
        """A frame that was held, and is written or will be, is to be sent from the spool."""
        record.held = False
        self._thread.post(lambda: self._spool.release(record.seq) if record.seq is not None else None)

    def done(self, record: Record) -> None:
        """A frame need not be kept any more."""
        if record.unwanted:
            return
        record.unwanted = True
        if record.ticket is not None and self._thread.forget(record.ticket):
            self._free(record)
            record.settled.set_result(None)
        else:
            self._thread.post(lambda: self._spool.done([record.seq]) if record.seq is not None else None)

    async def settled(self, record: Record) -> None:
        """Wait until it is known what becomes of a frame; for a moment only, or not at all, if the disk is slow."""
        left_s = _PATIENT_S - self._thread.stuck_s
        if record.waits and left_s > 0:
            await asyncio.wait({record.settled}, timeout=left_s)

    def know(self, bundle: Bundle) -> None:
        """Keep what answers to a bundle's frames are understood with. It blocks: a thread calls it."""
        if not self._spool.opened:  # another process may be using the folder
            return
        try:
            self._spool.known.keep(bundle)
        except (OSError, BitneckError) as exc:
            _LOG.warning("the manifest of the bundle cannot be kept in the spool: %s", exc)

    def _written(self, record: Record, held: bool) -> None:
        self._free(record)
        refused = record.seq is None and record.error is None
        if refused and held and not record.held and not record.unwanted:
            self._submit(record)  # it was left to the spool meanwhile: now it counts
        else:
            self._settle(record)

    def _refused(self, record: Record, error: BitneckError | None) -> None:
        """A frame that the disk is not asked to take."""
        if error is None and not record.held and not record.unwanted:
            self.dropped += 1
            error = Overloaded(
                f"the disk of the spool does not answer, and {self._frames} frames wait for it: this one is lost"
            )
            self._complaints.say(str(error))
        record.error = error
        self._settle(record)

    def _settle(self, record: Record) -> None:
        if not record.settled.done():
            record.settled.set_result(None)
        if not record.unwanted:
            record.on_settled(record)

    def _free(self, record: Record) -> None:
        self._frames, self._bytes, record.ticket = self._frames - 1, self._bytes - record.size, None
