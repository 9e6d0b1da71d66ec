"""One sink's thread: takes batches from the queue in order, delivers them, and waits longer after each failure."""

import logging
import random
import sqlite3
import threading
import time

from bitneck.backoff import Backoff
from bitneck.errors import InvalidConfig
from bitneck.text import clean_text
from bitneck_cloud.answers.sinks.queue.access import QueueAccess
from bitneck_cloud.answers.sinks.settings import SinkTables
from bitneck_cloud.answers.sinks.state import Attempt, Queued, Sink, SinkState, tries
from bitneck_cloud.observe.audit import record

__all__ = ["Sender"]

_LOG = logging.getLogger(__name__)
_FAREWELL_S = 3.0
_IDLE_S = 1.0
_TURN_S = 0.001
_LONGEST_WAIT_S = 3600.0
_ERROR_CHARACTERS = 300


class Sender:
    """Delivers what waits for one sink, until it is closed.

    Args:
        table: the sink's settings.
        sink: how it delivers.
        queue: of all sinks.
    """

    def __init__(self, table: SinkTables, sink: Sink, queue: QueueAccess) -> None:
        self.table, self.sink = table, sink
        self._queue = queue
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"bitneck-sink-{table.name}", daemon=True)
        self._delivered = self._failed = self._refused = 0
        self._failing, self._error = False, ""
        self._error_at: float | None = None
        self._delivered_at: float | None = None
        self._bugs = self._set_aside = 0

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """Something was queued for it."""
        if not self._wake.is_set():
            self._wake.set()

    def ask_to_stop(self) -> None:
        """Begin no further attempt. What is not delivered stays in the queue."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until its thread has ended, if it has begun; whether it has."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def note(self, error: str) -> None:
        """Show an error that is not of an attempt."""
        self._error, self._error_at = _short(error), time.time()

    def state(self, now: float) -> SinkState:
        """The sink as it is now; `now` is in seconds since 1970."""
        held = self._queue.file.held[self.table.name]
        return SinkState(
            name=self.table.name,
            kind=self.table.kind,
            queued=held.queued,
            queue_bytes=held.bytes,
            behind_s=max(0.0, now - held.oldest_at) if held.queued else 0.0,
            delivered=self._delivered,
            failed=self._failed,
            refused=self._refused,
            dropped=dict(held.dropped),
            failing=self._failing,
            last_error=self._error,
            last_error_at=self._error_at,
            last_delivered_at=self._delivered_at,
        )

    def _run(self) -> None:
        backoff = Backoff(first_s=self.table.pause_s, most_s=self.table.max_pause_s)
        failing = False
        while not self._stop.is_set():
            self._wake.clear()
            try:
                attempt, left = self._attempt()
            except Exception as exc:  # noqa: BLE001  a bug here must not end the sink
                if self._stop.is_set():  # the attempt took too long, and the queue is closed
                    failing = True
                    break
                _LOG.exception("sink %s: an attempt failed", self.table.name)
                attempt, left = Attempt(error=f"an internal error ({type(exc).__name__}); the log says more"), False
            failing = bool(attempt.error)
            if failing and self._stop.is_set():  # it may have been ended for that
                break
            if len(attempt.settled) > attempt.cut:
                backoff.succeeded()
            if not attempt.error:
                backoff.succeeded()
                if not left and self._wake.wait(_IDLE_S):
                    self._stop.wait(self.table.linger_s)  # for more: a batch costs about as much as one answer
                continue
            self._trouble(attempt.error)
            pause_s = backoff.failed(random.random()) or 0.0  # noqa: S311  spreads attempts, nothing secret
            self._stop.wait(min(max(pause_s, attempt.retry_after_s or 0.0), _LONGEST_WAIT_S))
        try:
            end = time.monotonic() + _FAREWELL_S
            while not failing and self.sink.restless() and time.monotonic() < end:  # the states of clients
                attempt, _ = self._attempt()
                failing = bool(attempt.error)
            self.sink.close()
        except Exception:  # noqa: BLE001  likewise
            _LOG.exception("sink %s: closing failed", self.table.name)

    def _attempt(self) -> tuple[Attempt, bool]:
        """Deliver a batch; and whether another one waits that is full, or is the rest of this one."""
        name = self.table.name
        try:
            # What an attempt has does not fall out meanwhile: it must not be all that there is.
            most_bytes = min(self.sink.most_bytes, self.table.queue_bytes // 4)
            batch = self._take(1 if self._bugs else self.sink.most, most_bytes)
        except sqlite3.Error as exc:
            return Attempt(error=f"the queue cannot be read: {exc}"), False
        if not batch and not self.sink.restless():
            return Attempt(), False
        try:
            attempt = self.sink.send(batch)
        except InvalidConfig as exc:
            attempt = Attempt(error=str(exc))
        except Exception as exc:
            self._bugs += 1
            if len(batch) != 1 or self._bugs <= tries(self._set_aside):  # after the first, an answer goes alone
                self._queue.call(self._queue.file.settle, name, batch, (), time.time())
                raise
            _LOG.exception("sink %s: an attempt failed", name)
            why = f"an internal error each time ({type(exc).__name__}); the log says more"
            self._bugs, self._set_aside, attempt = 0, self._set_aside + 1, Attempt((why,), why)
        else:
            self._bugs = self._set_aside = 0
        attempt = self._settle(batch, attempt)
        held = self._queue.file.held[name]
        if held.queued:  # by commits whose wake this attempt took for its own
            self.wake()
        full = held.queued >= self.sink.most or held.bytes >= most_bytes
        return attempt, full or len(attempt.settled) < len(batch)

    def _take(self, most: int, most_bytes: int) -> list[Queued]:
        """The next answers. Where many of other sinks come before them, others may use the queue meanwhile."""
        name = self.table.name
        while True:
            batch = self._queue.call(self._queue.file.take, name, most, most_bytes)
            if batch or not self._queue.file.held[name].queued or self._stop.is_set():
                return batch
            time.sleep(_TURN_S)

    def _settle(self, batch: list[Queued], attempt: Attempt) -> Attempt:
        """Take what is settled from the queue, and only then count it: if the disk fails here, it comes again."""
        name, refused = self.table.name, [reason for reason in attempt.settled if reason]
        settled = tuple(_short(reason) for reason in attempt.settled)
        try:
            self._queue.call(self._queue.file.settle, name, batch, settled, time.time(), attempt.cut)
        except sqlite3.Error as exc:
            return Attempt(error=f"settled answers cannot be taken from the queue, they come again: {exc}")
        if not attempt.error:
            self._succeeded()
        if len(refused) < len(settled):
            self._delivered_at = time.time()
        self._delivered += len(settled) - len(refused)
        self._refused += len(refused) - attempt.cut
        if refused:
            _LOG.warning("sink %s: %d answers are set aside for good: %s", name, len(refused), _short(refused[-1]))
        return attempt

    def _trouble(self, error: str) -> None:
        self._failed += 1
        self._error, self._error_at = _short(error), time.time()
        if not self._failing:
            self._failing = True
            _LOG.warning("sink %s: %s; it tries again", self.table.name, self._error)
            record("sink state", f"sink {self.table.name}", who="server", before="delivers", after="fails")

    def _succeeded(self) -> None:
        if self._failing:
            self._failing = False
            _LOG.info("sink %s delivers again", self.table.name)
            record("sink state", f"sink {self.table.name}", who="server", before="fails", after="delivers")


def _short(text: str) -> str:
    return clean_text(text, _ERROR_CHARACTERS)
