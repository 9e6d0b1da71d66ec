"""Answers on their way to all sinks: committed to the queue on disk, then delivered by a thread for each sink."""

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bitneck.errors import InvalidConfig
from bitneck.text import clean_text
from bitneck_cloud.answers.sinks.jsonl import JsonlSink
from bitneck_cloud.answers.sinks.queue.access import QueueAccess, checkpoint, log_bytes
from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.answers.sinks.routing import Routing
from bitneck_cloud.answers.sinks.sender import Sender
from bitneck_cloud.answers.sinks.settings import JsonlTable, MqttTable, SinkTables, WebhookTable, check_key, secret_of
from bitneck_cloud.answers.sinks.state import BATCH, BATCH_BYTES, Bounds, ClientState, Document, Entry, Sink, SinkState
from bitneck_cloud.answers.sinks.worker.process import WorkerProcess
from bitneck_cloud.answers.sinks.worker.remote import RemoteSink
from bitneck_cloud.fleet.patterns import Groups

__all__ = ["Outgoing"]

_LOG = logging.getLogger(__name__)
_HOUSEKEEPING_S = 1.0
_TURN_S = 0.002
"""Seconds between two parts of housekeeping: a lock that is taken again at once goes to nobody else."""
_CLOSE_S, _ENDED_S = 5.0, 1.0
_TROUBLE_LOG_S = 60.0
_MOST_LOG_BYTES = 64 << 20


class Outgoing:
    """All sinks of a server. Without a sink it does nothing.

    Args:
        tables: one for each sink.
        queue: file of the queue; None where there is no sink.
        server: name of this server.
        sync: whether each commit is forced to the disk; else that is done once a second.
        groups: of clients, for filters; None for none.
        clock: seconds since 1970.

    Attributes:
        sync: as given.

    Raises:
        InvalidConfig: a filter is refused.
    """

    def __init__(
        self,
        tables: Sequence[SinkTables],
        queue: Path | None,
        *,
        server: str,
        sync: bool = False,
        groups: Groups | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.sync = sync
        self._path, self._clock = queue, clock
        self._tables = tuple(tables)
        self._routing = Routing(tables, groups or Groups())
        bounds = {table.name: Bounds(table.queue_bytes, table.queue_age_s) for table in tables}
        self._queue = QueueAccess(QueueFile(queue, bounds, sync=sync)) if queue is not None and tables else None
        self._worker = WorkerProcess([table for table in tables if not isinstance(table, JsonlTable)], server)
        self._senders: dict[str, Sender] = {}
        self._known: dict[str, set[str]] = {table.name: set() for table in tables}
        if self._queue is not None:
            for table in tables:
                self._senders[table.name] = Sender(table, self._sink_of(table), self._queue)
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep_house, name="bitneck-sinks-keeper", daemon=True)
        self._uncommitted, self._logged_at = 0, -_TROUBLE_LOG_S
        self._reached, self._forced = 0, -1

    @property
    def pid(self) -> int | None:
        """Of the worker, which delivers to brokers and webhooks; None if there is none now."""
        return self._worker.pid

    @property
    def wants_maps(self) -> bool:
        """Whether a sink sends class maps along. If none does, documents need not hold them."""
        return any(table.maps != "none" for table in self._tables)

    def check_served(self, labels: Mapping[str, Sequence[str]]) -> None:
        """Refuse a sink that no answer of the served models would ever go to.

        Args:
            labels: names of the classes of each served model, by its id.

        Raises:
            InvalidConfig: the filter of a sink has a model or class that is not served.
        """
        self._routing.check_served(labels)

    def start(self) -> None:
        """Open the queue and begin to deliver what is in it. It blocks.

        Raises:
            StateUnusable: the queue is damaged, another program's or in use.
            InvalidConfig: a secret cannot be read.
        """
        if self._queue is None:
            return
        for table in self._tables:
            _check_secrets(table)
        try:
            others = self._queue.call(self._queue.file.open, self._clock())
            gone = self._queue.call(self._queue.file.clients)
        except BaseException:
            self._queue.close()
            raise
        for name, count in others.items():
            _LOG.warning("%d answers wait for a sink %s, which is not set up any more; they are kept a week",
                         count, clean_text(name))  # fmt: skip
        for text in reversed(gone):
            state = replace(ClientState(**json.loads(text)), online=False)
            self._tell(state)
        if self._stop.is_set():  # a stopping server did not wait for the queue to open
            return
        self._worker.start()
        for sender in self._senders.values():
            sender.start()
        self._keeper.start()

    def last_number(self) -> int:
        """The largest ``number`` of an answer that was given to `commit`; 0 for none. A server counts on from it.

        After a kill, it may be that of an answer some seconds before, if no sink wanted those that came after it.
        Call it after `start`.
        """
        return self._queue.call(self._queue.file.last_number) if self._queue is not None else 0

    def commit(
        self,
        documents: Sequence[Document],
        owners: Sequence[str] = (),
        made: Callable[[int, str], None] = lambda _place, _text: None,
    ) -> None:
        """Commit the answers of a pass for all sinks that want them. It blocks until they are on disk.

        A commit outlives this process. It outlives a power cut too, at once or a second later: see `sync`.
        What cannot be committed, because the disk is full, is counted and logged; this call raises nothing then.

        Args:
            documents: of the answers, in the order of answering. A map has run lengths, or is null.
            owners: who sent each frame, so that nobody's frames pass for repeats of another's spool; none if that does
                not matter.
            made: called with the place of a document and its JSON without a map, which others need not make again.
        """
        if self._queue is None or not documents:
            return
        self._reached = max(self._reached, *(document["number"] for document in documents))
        entries: list[Entry] = []
        too_large: Counter[str] = Counter()
        for place, document in enumerate(documents):
            owner = owners[place] if owners else ""
            entry, text = self._routing.entry(document, owner, too_large)
            if text:
                made(place, text)
            if entry is not None:
                entries.append(entry)
        if too_large:
            self._queue.post(self._queue.file.lost, too_large, "size")
        if not entries:
            return
        try:
            told = self._queue.call(self._queue.file.add, entries, self._clock())
        except sqlite3.Error as exc:
            self._not_committed(entries, exc)
            return
        for name in told:
            self._senders[name].wake()

    def client_state(self, state: ClientState) -> None:
        """A client has come, gone, or changed its point or rate: sinks that retain it publish its newest state.

        Args:
            state: as it is now.
        """
        if self._queue is None or not self._tell(state):
            return
        # Also of one that is gone: the broker may not have learned it when this server ends.
        self._queue.post(self._keep_client, state.client, json.dumps(asdict(state)))

    def states(self) -> tuple[SinkState, ...]:
        """Every sink as it is now, in the order of the settings."""
        now = self._clock()
        return tuple(sender.state(now) for sender in self._senders.values())

    def close(self) -> None:
        """Stop to deliver; what is not delivered stays in the queue. It blocks, some seconds at most.

        Nothing may be committed after it. A second call does nothing.
        """
        if self._queue is None or self._stop.is_set():
            return
        self._stop.set()
        self._worker.start_no_more()
        for sender in self._senders.values():
            sender.ask_to_stop()
        deadline = time.monotonic() + _CLOSE_S
        for sender in self._senders.values():
            sender.join(max(0.0, deadline - time.monotonic()))
        self._worker.close()  # which ends the attempts that take too long
        for name, sender in self._senders.items():
            if not sender.join(_ENDED_S):
                _LOG.warning("sink %s is still busy with an attempt; it is left", name)
        if self._keeper.ident is not None:
            self._keeper.join()
            with contextlib.suppress(sqlite3.Error):
                self._save()
                self._save()  # the rest
        self._queue.close()

    def _sink_of(self, table: SinkTables) -> Sink:
        match table:
            case JsonlTable():
                return JsonlSink(table)
            case WebhookTable():
                return RemoteSink(table.name, self._worker, table.batch, table.batch_bytes)
            case MqttTable():
                return RemoteSink(table.name, self._worker, BATCH, BATCH_BYTES)

    def _tell(self, state: ClientState) -> bool:
        """Tell the sinks that retain states; whether there was one."""
        wanting: list[tuple[Sender, ClientState]] = []
        for name, sender in self._senders.items():
            known = self._known[name]
            table = sender.table
            retains = isinstance(table, MqttTable) and bool(table.state_topic)
            takes = retains and self._routing.takes_client(name, state.client, state.model)
            if takes and state.online:
                known.add(state.client)
                wanting.append((sender, state))
            elif takes or state.client in known:  # it went, or went on with a model that this sink does not take
                known.discard(state.client)
                wanting.append((sender, replace(state, online=False)))
        for sender, told in wanting:
            sender.sink.tell(told)
            sender.wake()
        return bool(wanting)

    def _save(self) -> None:
        """Save which frames were answered, and how far numbers have come, also where no sink wanted the answers."""
        assert self._queue is not None
        while self._queue.call(self._queue.file.save, self._reached, self._clock()):
            time.sleep(_TURN_S)

    def _keep_client(self, client: str, text: str) -> None:
        assert self._queue is not None
        try:
            self._queue.file.keep_client(client, text, self._clock())
        except sqlite3.Error as exc:
            _LOG.warning("the state of a client cannot be kept in sinks_queue: %s", exc)

    def _not_committed(self, entries: Sequence[Entry], exc: sqlite3.Error) -> None:
        assert self._queue is not None
        counts = Counter(name for entry in entries for name in entry.sinks)
        self._queue.post(self._queue.file.lost, counts, "disk")
        self._uncommitted += len(entries)
        for name in counts:
            self._senders[name].note(f"answers cannot be queued: {exc}")
        if time.monotonic() - self._logged_at >= _TROUBLE_LOG_S:
            _LOG.error("%d answers could not be queued for their sinks and are lost to them: %s",
                       self._uncommitted, exc)  # fmt: skip
            self._uncommitted, self._logged_at = 0, time.monotonic()

    def _keep_house(self) -> None:
        """Each second: force what was committed to the disk, delete what nobody wants, let fall out what is too old."""
        assert self._queue is not None
        while not self._stop.wait(_HOUSEKEEPING_S):
            self._worker.reap()
            for step in (self._save, self._force, self._expire):
                try:
                    step()
                except (sqlite3.Error, OSError) as exc:
                    _LOG.warning("housekeeping of sinks_queue failed; it goes on: %s", exc)
                except Exception:  # noqa: BLE001  a bug here must not stop what comes after it
                    _LOG.exception("housekeeping of sinks_queue failed; it goes on")

    def _force(self) -> None:
        assert self._queue is not None
        assert self._path is not None
        if (writes := self._queue.file.writes) != self._forced:
            checkpoint(self._path)
            self._forced = writes
            if log_bytes(self._path) > _MOST_LOG_BYTES:  # commits came all the time, so it could not begin anew
                self._queue.call(self._queue.file.begin_log_anew)

    def _expire(self) -> None:
        assert self._queue is not None
        while self._queue.call(self._queue.file.expire, self._clock()) and not self._stop.wait(_TURN_S):
            pass


def _check_secrets(table: SinkTables) -> None:
    if isinstance(table, MqttTable):
        secret_of(table.password, table.password_file)
    elif isinstance(table, WebhookTable):
        text = secret_of(table.secret, table.secret_file) or ""
        try:
            check_key(text, "secret_file")
        except ValueError as exc:
            raise InvalidConfig(f"sink {table.name}: {exc}") from exc
