"""The HTTP listener: uvicorn behind an accept loop that bounds the number of connections and their time.

A connection has `patience_s` for its TLS handshake, and the same for each request, from its first byte to the end of
its body. It has `stall_s` to read what waits for it; an answer that is read may take as long as it wants. One that is
silent, slow or one too many is closed, so strangers cannot use up the process's descriptors. Under TLS the same holds:
there a client reads what its system acknowledges, because asyncio has two buffers then, and shows one of them.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import socket
import ssl
import struct
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address
from bitneck_cloud.observe.audit import RefusalLog

__all__ = ["HttpServer", "listen"]

_LOG = logging.getLogger(__name__)
_AFTER_ERROR_S = 0.2
_GRACE_S = 5
_STALLED_S = 1.0
"""Seconds that a stopping server waits for a client that has something to read, and reads nothing of it."""
_MOST_UNREAD_BYTES = 1 << 16
"""That asyncio keeps for a connection before its answer has to wait; under TLS twice that, where it would be 0.5 MB."""
_BYTES_ACKED = 120
"""Place of ``tcpi_bytes_acked``, 8 bytes, in Linux's ``struct tcp_info``."""
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
_RECEIVED = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)

_SEND_BUFFER_BYTES = 1 << 17
"""That the kernel may keep for one connection; else it keeps up to 4 MB, which nobody counts."""

MOST = 256
"""Connections that are open at once."""
MOST_OF_ADDRESS = 64
"""Those of one address."""
PATIENCE_S = 10.0
"""Seconds for a TLS handshake, and for a request to arrive."""


def listen(address: Address) -> list[socket.socket]:
    """Sockets that listen on all that the host stands for: both families of ``localhost`` and of ``[::]``.

    Raises:
        InvalidConfig: the port is taken, or this machine has no such address.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise InvalidConfig(f"HTTP cannot listen on {address} ({exc.strerror}); is it a name of this machine?") from exc
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    port = address.port
    for family, host in dict.fromkeys((info[0], str(info[4][0])) for info in found):
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
        except OSError as exc:
            failure = exc
            continue
        listener.setblocking(False)
        sockets.append(listener)
        port = listener.getsockname()[1]  # if the system chose it, every family gets the same one
    taken = failure is not None and failure.errno not in _NO_SUCH_ADDRESS
    if failure is not None and (taken or not sockets):
        for listener in sockets:
            listener.close()
        raise InvalidConfig(
            f"HTTP cannot listen on {address} ({failure.strerror}); is another server there?"
        ) from failure
    return sockets


class _Protocol(H11Protocol):
    """uvicorn's protocol with limits for the times in which a request arrives, and what waits is read."""

    def __init__(
        self,
        *args: Any,
        patience_s: float,
        stall_s: float,
        connection: socket.socket,
        lost: "asyncio.Future[None]",
        refused: Callable[[str], None],
        **values: Any,
    ) -> None:
        super().__init__(*args, **values)
        self._refused = refused
        self._patience_s = patience_s
        self._stall_s = stall_s
        self._connection = connection
        self._lost = lost
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._left = (0, 0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_MOST_UNREAD_BYTES)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.received:
            self._forget()
        elif self._deadline is None:
            self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_s and self._unread is None:
            self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._forget_unread()
        super().connection_lost(exc)
        if not self._lost.done():
            self._lost.set_result(None)

    def send_400_response(self, msg: str) -> None:
        self._refused("no HTTP request")
        super().send_400_response(msg)

    @property
    def received(self) -> bool:
        """Whether a request has come to its end, and is being answered."""
        return self.conn.their_state in _RECEIVED

    @property
    def progress(self) -> tuple[int, int]:
        """Something that changes when the client reads what waits for it."""
        return self._acknowledged(), self._buffered()

    @property
    def waits_for_client(self) -> bool:
        """Whether there is nothing to do for the connection but to wait until its client has read, or closes it."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered or self._buffered() > 0 or self._in_kernel() > 0

    def end(self) -> None:
        """End the connection at once."""
        self.transport.abort()
        with contextlib.suppress(OSError):  # under TLS, a transport that was closed before does not hear that
            self._connection.shutdown(socket.SHUT_RDWR)

    def _buffered(self) -> int:
        """Bytes that asyncio keeps for the client, as far as it says so."""
        try:
            return self.transport.get_write_buffer_size()
        except AttributeError:  # of TLS, and closed
            return 0

    def _acknowledged(self) -> int:
        """Bytes that the client's system has acknowledged; 0 where that is not known."""
        if not hasattr(socket, "TCP_INFO"):
            return 0
        try:
            found = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
        except OSError:  # it is closed
            return 0
        return int(struct.unpack_from("Q", found, _BYTES_ACKED)[0]) if len(found) == _BYTES_ACKED + 8 else 0

    def _in_kernel(self) -> int:
        """Bytes that the kernel keeps for the client; 0 where that is not known."""
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4)))[0])
        except (OSError, ValueError):
            return 0

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(self._patience_s, self._too_slow)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch(self) -> None:
        self._left = self.progress
        self._unread = self.loop.call_later(self._stall_s, self._look)

    def _look(self) -> None:
        """Go on as long as the client reads, however slowly."""
        if self.progress != self._left:
            self._watch()
        else:
            self._too_slow()

    def _too_slow(self) -> None:
        self.end()


class HttpServer(uvicorn.Server):
    """uvicorn with bounded connections, and without signal handlers of its own: the program has one way to stop.

    Args:
        app: the ASGI application.
        tls: uvicorn's settings for TLS; empty for plaintext.
        refusals: logs what is refused.
        most: connections that are open at once.
        most_of_address: those of one address.
        patience_s: seconds for a handshake, and for a request to arrive.
        stall_s: seconds that a client may leave unread what waits for it; 0 for ever.
    """

    def __init__(
        self,
        app: Any,
        tls: dict[str, Any],
        refusals: RefusalLog,
        *,
        most: int = MOST,
        most_of_address: int = MOST_OF_ADDRESS,
        patience_s: float = PATIENCE_S,
        stall_s: float = 0.0,
    ) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=_GRACE_S, **tls
        )
        super().__init__(config)
        # Its warnings come once for each bad request, and its information says nothing that ours does not.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.listening = asyncio.Event()
        self._refusals = refusals
        self._most = most
        self._most_of_address = most_of_address
        self._patience_s = patience_s
        self._stall_s = stall_s
        self._open: Counter[str] = Counter()
        self._work: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests on sockets that listen."""
        await self.lifespan.startup()
        self.servers = []
        for listener in sockets or ():
            self._start(self._accept(listener))
        self.started = True
        self.listening.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end the open ones within a bounded time."""
        for task in self._work:
            if task.get_name() == "accept":
                task.cancel()
        for protocol in list(self.server_state.connections):
            if isinstance(protocol, _Protocol) and not protocol.received:
                protocol.end()  # what has not come by now is not waited for
        ending = asyncio.create_task(self._end_stalled())
        await super().shutdown(sockets)
        ending.cancel()
        for protocol in list(self.server_state.connections):
            if isinstance(protocol, _Protocol):
                protocol.end()
        await asyncio.gather(*self._work, return_exceptions=True)

    async def _end_stalled(self) -> None:
        """Close the connections whose clients do not read. What is still to be answered is waited for."""
        while True:
            before = {it: it.progress for it in self.server_state.connections if isinstance(it, _Protocol)}
            await asyncio.sleep(_STALLED_S)
            for protocol, progress in before.items():
                if protocol.waits_for_client and protocol.progress == progress:
                    protocol.end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the program."""
        yield

    def _start(self, work: Any, name: str = "accept") -> None:
        task = asyncio.create_task(work, name=name)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as exc:  # such as no descriptors left
                self._refusals.refused("HTTP connections", f"accept failed: {exc.strerror}")
                await asyncio.sleep(_AFTER_ERROR_S)
                continue
            host = str(address[0])
            if self._open.total() >= self._most or self._open[host] >= self._most_of_address:
                connection.close()
                self._refusals.refused(f"address {host}", "too many HTTP connections")
                continue
            self._bound(connection)
            self._open[host] += 1
            self._start(self._serve_one(connection, host), name="connection")

    def _bound(self, connection: socket.socket) -> None:
        """Let the kernel keep little of what is not read, and end the connection of a client that is gone."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if self._stall_s and hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._stall_s * 1e3))

    async def _serve_one(self, connection: socket.socket, host: str) -> None:
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()

        def protocol() -> _Protocol:
            return _Protocol(
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                patience_s=self._patience_s,
                stall_s=self._stall_s,
                connection=connection,
                lost=lost,
                refused=lambda reason: self._refusals.refused(f"address {host}", reason),
            )

        limit = self._patience_s if self.config.ssl is not None else None
        try:
            await loop.connect_accepted_socket(protocol, connection, ssl=self.config.ssl, ssl_handshake_timeout=limit)
            await lost
        except (OSError, ssl.SSLError) as exc:  # the handshake failed, or took too long
            self._refusals.refused(f"address {host}", "the TLS handshake failed")
            _LOG.debug("%s: %r", host, exc)
            connection.close()
        finally:
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]
