"""The server's end of a socket to a sink in the worker: one call at a time, each with one reply.

call:  [method, argument...]    the first one is ["begin", table, server, level of the log]
reply: {"result", "error", "most", "most_bytes", "records"}; before it, empty messages while the call takes its time

Both are JSON, so nothing that the worker got from a network can become code here.
"""

import json
import logging
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
from pydantic import SecretStr

from bitneck.errors import InvalidConfig
from bitneck_cloud.answers.document import read_json
from bitneck_cloud.answers.sinks.settings import SinkTables
from bitneck_cloud.answers.sinks.state import Queued

__all__ = ["BEAT_S", "SILENCE_S", "Link", "SinkFailed", "WorkerGone", "dump_batch", "dumps", "load_batch"]

BEAT_S = 2.0
"""Seconds between two signs of life while a call takes its time."""
SILENCE_S = 60.0
"""Without any for so long, the worker counts as hung. A machine that is short of memory may take its time."""


class WorkerGone(Exception):
    """The worker has ended, does not answer, or cannot be started."""


class SinkFailed(Exception):
    """A bug in the sink. Its traceback is a note."""


class Link:
    """For one thread.

    Attributes:
        most: answers that the next batch may have, once a call has returned.
        most_bytes: of them, likewise.

    Args:
        socket: connected. Writing and reading a message do not wait for ever on it.
        table: which sink is at the other end.
        server: name of the server.
        level: of the log records that the worker sends.
    """

    def __init__(self, socket: Connection, table: SinkTables, server: str, level: int) -> None:
        self._socket = socket
        self._begin = ("begin", table.model_dump(by_alias=True, exclude_unset=True), server, level)
        self._begun = False
        self.most = self.most_bytes = 0

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the sink, and wait for its result.

        Args:
            method: its name.
            *arguments: what JSON can hold.

        Raises:
            WorkerGone: there is no answer. The link is closed then.
            InvalidConfig: raised by the sink.
            SinkFailed: it raised something else.
        """
        if not self._begun:
            self._exchange(self._begin)
            self._begun = True
        return self._exchange((method, *arguments))

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _exchange(self, message: Sequence[Any]) -> Any:
        try:
            self._socket.send_bytes(dumps(message))
            reply = read_json(self._reply())
        except (OSError, EOFError, ValueError, MemoryError) as exc:  # what comes next would answer another call
            self.close()
            raise WorkerGone("the worker of the sinks has ended, or does not answer") from exc
        self.most, self.most_bytes = reply["most"], reply["most_bytes"]
        for each in reply["records"]:
            record = logging.makeLogRecord(each)
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                logger.handle(record)
        if reply["error"] is not None:
            raise _error(**reply["error"])
        return reply["result"]

    def _reply(self) -> bytes:
        silent = 0  # intervals, not seconds: both processes may have been frozen
        while silent < SILENCE_S / BEAT_S:
            if not self._socket.poll(BEAT_S):
                silent += 1
            elif found := self._socket.recv_bytes():
                return found
            else:
                silent = 0
        raise TimeoutError


def dumps(message: object) -> bytes:
    """A message, for `read_json`. It may have what orjson refuses, such as names of files that are not UTF-8."""
    try:
        return orjson.dumps(message, default=_plain)
    except orjson.JSONEncodeError:
        return json.dumps(message, default=_plain).encode()


def _plain(value: object) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case Path():
            return str(value)
        case _:
            raise TypeError(type(value))


def _error(kind: str, text: str, trace: str) -> Exception:
    if kind == InvalidConfig.__name__:
        return InvalidConfig(text)
    error = SinkFailed(f"{kind}: {text}")
    error.add_note(f"In the worker:\n{trace}")
    return error


def dump_batch(batch: Sequence[Queued]) -> list[tuple[int, float, str]]:
    """Answers as JSON can hold them, whatever bytes a damaged file has in place of a document."""
    return [(each.id, each.at, each.body.decode("latin-1")) for each in batch]


def load_batch(found: Sequence[tuple[int, float, str]]) -> list[Queued]:
    """What `dump_batch` gave."""
    return [Queued(identity, at, body.encode("latin-1")) for identity, at, body in found]
