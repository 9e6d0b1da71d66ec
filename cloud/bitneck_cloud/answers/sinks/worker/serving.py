"""The worker's end of the sockets: a thread for each sink, which does what its sender in the server asks."""

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from typing import Any

from pydantic import TypeAdapter

from bitneck_cloud.answers.document import read_json
from bitneck_cloud.answers.sinks.mqtt.sink import MqttSink
from bitneck_cloud.answers.sinks.settings import MqttTable, SinkTables, WebhookTable
from bitneck_cloud.answers.sinks.state import ClientState, Sink
from bitneck_cloud.answers.sinks.webhook import WebhookSink
from bitneck_cloud.answers.sinks.worker.link import BEAT_S, dumps, load_batch
from bitneck_cloud.observe.logs import keep_secrets_out

__all__ = ["serve"]

_MOST_RECORDS = 1000
_OF_A_RECORD = ("name", "levelno", "levelname", "msg", "created", "msecs", "pathname", "filename", "lineno", "funcName")


def serve(sockets: Sequence[int]) -> None:
    """Serve sinks. It does not return.

    Args:
        sockets: one for each, connected.
    """
    records = _Records()
    served = [_Served(Connection(number), records) for number in sockets]
    for each in served:
        threading.Thread(target=each.run, daemon=True).start()
    while True:
        time.sleep(BEAT_S)
        for each in served:
            each.beat()


class _Records(QueueHandler):
    """Keeps log records for the server. If there are too many, the newest are left out: they say the same."""

    def __init__(self) -> None:
        self._kept: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_RECORDS)
        super().__init__(self._kept)
        self.setFormatter(logging.Formatter("%(message)s"))  # the server writes the rest

    def begin(self, level: int) -> None:
        """Take what is logged from now on."""
        logging.basicConfig(level=level, handlers=[self])
        keep_secrets_out()

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self._kept.put_nowait(record)

    def taken(self) -> list[dict[str, Any]]:
        """All there are, as JSON can hold them."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                record = self._kept.get_nowait()
                found.append({name: getattr(record, name) for name in _OF_A_RECORD})
        return found


class _Served:
    """One sink's socket.

    Args:
        socket: connected.
        records: of all sinks.
    """

    def __init__(self, socket: Connection, records: _Records) -> None:
        self._socket, self._records = socket, records
        self._lock = threading.Lock()
        self._busy = False

    def run(self) -> None:
        """Do what is asked, until the server lets go of its end."""
        with self._socket, contextlib.suppress(EOFError, OSError):
            _, table, server, level = read_json(self._socket.recv_bytes())
            self._records.begin(level)
            sink = _sink_of(TypeAdapter[SinkTables](SinkTables).validate_python(table), server)
            self._reply(sink, None, None)
            while True:
                method, *arguments = read_json(self._socket.recv_bytes())
                with self._lock:
                    self._busy = True
                result, error = None, None
                try:
                    result = _call(sink, method, *arguments)
                except Exception as exc:  # noqa: BLE001  the sender takes care of it
                    error = {"kind": type(exc).__name__, "text": str(exc), "trace": traceback.format_exc()}
                self._reply(sink, result, error)

    def beat(self) -> None:
        """Say that a call still goes on, if one does."""
        with self._lock, contextlib.suppress(OSError):
            if self._busy:
                self._socket.send_bytes(b"")

    def _reply(self, sink: Sink, result: Any, error: dict[str, str] | None) -> None:
        reply = {
            "result": result,
            "error": error,
            "most": sink.most,
            "most_bytes": sink.most_bytes,
            "records": self._records.taken(),
        }
        with self._lock:
            self._busy = False
            self._socket.send_bytes(dumps(reply))


def _sink_of(table: SinkTables, server: str) -> Sink:
    match table:
        case MqttTable():
            return MqttSink(table, server)
        case WebhookTable():
            return WebhookSink(table)
        case _:
            raise AssertionError(type(table))


def _call(sink: Sink, method: str, *arguments: Any) -> Any:
    match method:
        case "send":
            return asdict(sink.send(load_batch(*arguments)))
        case "tell":
            for state in arguments[0]:
                sink.tell(ClientState(**state))
            return None
        case "restless":
            return sink.restless()
        case "close":
            return sink.close()
        case _:
            raise AssertionError(method)
