"""The worker as the server has it: a process that is started with the server, and anew whenever it has ended."""

import contextlib
import logging
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from bitneck_cloud.answers.sinks.settings import SinkTables
from bitneck_cloud.answers.sinks.worker.link import SILENCE_S, Link, WorkerGone

__all__ = ["WorkerProcess"]

_LOG = logging.getLogger(__name__)
_MAIN = "bitneck_cloud.answers.sinks.worker.main"
_END_S = 1.0


class WorkerProcess:
    """One process for all these sinks. Without a sink it does nothing.

    It ends when this process does, however that ends: its standard input ends then.

    Args:
        tables: of the sinks.
        server: name of the server.
    """

    def __init__(self, tables: Sequence[SinkTables], server: str) -> None:
        self._tables, self._server = tables, server
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._links: dict[str, Link] = {}
        self._stops = False

    @property
    def pid(self) -> int | None:
        """Of the process; None if there is none now."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def reap(self) -> None:
        """Note its end, if it has ended; else it would stay in the system's table until somebody needs it."""
        if (process := self._process) is not None:
            process.poll()

    def start(self) -> None:
        """Start it; what it needs to get ready is not waited for. If it cannot be started, `link` tries again."""
        with self._lock, contextlib.suppress(WorkerGone):
            if self._tables and not self._stops:
                self._begin()

    def link(self, name: str) -> Link:
        """A link to a sink that nobody had yet; to a new process, where somebody had that of this one.

        So ask again only when a link has ended: the links of others end then, too.

        Args:
            name: of the sink.

        Raises:
            WorkerGone: the process cannot be started, or must not be any more.
        """
        with self._lock:
            if self._stops:
                raise WorkerGone("the server stops")
            if name not in self._links:
                self._tell_end()
                self._end()
                self._begin()
            return self._links.pop(name)

    def start_no_more(self) -> None:
        """If it ends from now on, it stays so."""
        self._stops = True

    def close(self) -> None:
        """End it, whatever it does."""
        with self._lock:
            self._stops = True
            self._end()

    def _begin(self) -> None:
        pairs: list[tuple[Connection, Connection]] = []
        try:
            pairs.extend(_pair() for _ in self._tables)
            theirs = [there.fileno() for _, there in pairs]
            self._process = subprocess.Popen(  # noqa: S603  this program
                [sys.executable, *_options(), "-m", _MAIN, *map(str, theirs)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=theirs,
                # A terminal's ^C is for the server, which then ends this. In a session of its own, it would be in a
                # group of its own of Linux's scheduler, where niceness means nothing to other groups.
                process_group=0,
            )  # fmt: skip
        except OSError as exc:
            for here, _ in pairs:
                here.close()
            raise WorkerGone(f"the worker of the sinks cannot be started: {exc.strerror or exc}") from exc
        finally:
            for _, there in pairs:
                there.close()
        level = logging.getLogger("bitneck_cloud").getEffectiveLevel()
        self._links = {
            table.name: Link(here, table, self._server, level)
            for table, (here, _) in zip(self._tables, pairs, strict=True)
        }

    def _tell_end(self) -> None:
        if self._process is None:  # it could not be started
            return
        try:
            how = f"has ended (exit status {self._process.wait(_END_S)})"
        except subprocess.TimeoutExpired:
            how = "does not answer any more, and is ended"
        _LOG.warning("the worker of the sinks (process %d) %s; starting it anew", self._process.pid, how)

    def _end(self) -> None:
        process, self._process = self._process, None
        for link in self._links.values():
            link.close()
        self._links = {}
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pair() -> tuple[Connection, Connection]:
    """The server's end and the worker's. A worker that hangs does not keep the server from writing for ever."""
    here, there = socket.socketpair()
    limit = struct.pack("@ll", int(SILENCE_S), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        here.setsockopt(socket.SOL_SOCKET, option, limit)
    return Connection(here.detach()), Connection(there.detach())


def _options() -> list[str]:
    """Of Python: modules come from where this process has its own, and never from the working folder."""
    return ["-P", *["-E"] * sys.flags.ignore_environment, *["-s"] * bool(sys.flags.no_user_site)]
