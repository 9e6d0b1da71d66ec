"""MQTT's client library on a connection that reads ahead, and that writes many messages at once.

The library reads an acknowledgement in three steps, and writes each message in one of its own. Each step is a system
call: the thread gives the interpreter up before it and waits for it afterwards, and frames wait for both.
"""

import contextlib
import socket
import ssl

from paho.mqtt import client as paho

__all__ = ["BufferedClient", "BufferedSocket"]

_READ = _WRITE = 1 << 16
"""Bytes that are read at once, and beyond which no further message is taken before some are written."""
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux has it
_FULL = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class BufferedSocket:
    """A connection as the library uses it: see its ``SocketLike``.

    Args:
        connected: the connection. It must not block once `send` is called.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._connected = connected
        self._read, self._place = b"", 0
        self._unsent = bytearray()

    @property
    def unsent(self) -> bool:
        """Whether something is still to be written."""
        return bool(self._unsent)

    def pending(self) -> bool:
        """Whether something can be read without a wait for the network."""
        decrypted = self._connected.pending() if isinstance(self._connected, ssl.SSLSocket) else 0
        return self._place < len(self._read) or decrypted > 0

    def recv(self, size: int) -> bytes:
        """Some bytes, `size` at most; none at the connection's end.

        Raises:
            OSError: there are none now, or the connection breaks.
        """
        if self._place == len(self._read):
            self._read, self._place = self._connected.recv(_READ), 0
        part = self._read[self._place : self._place + size]
        self._place += len(part)
        return part

    def send(self, data: bytes | bytearray) -> int:
        """Take bytes, which `flush` writes.

        Returns:
            How many: all of them.

        Raises:
            BlockingIOError: there are too many already, and the network takes none.
            OSError: the connection breaks.
        """
        if len(self._unsent) > _WRITE:
            self.flush()
            if len(self._unsent) > _WRITE:
                raise BlockingIOError
        self._unsent += data
        return len(data)

    def flush(self) -> None:
        """Write what the network takes now.

        Raises:
            OSError: the connection breaks.
        """
        with contextlib.suppress(*_FULL):
            while self._unsent:
                del self._unsent[: self._connected.send(self._unsent)]

    def hurry(self) -> None:
        """Tell the other side at once that its last bytes have come.

        Else Linux waits up to 40 ms for something to send with it, and a side that gathers small messages (Nagle's
        algorithm) keeps the next ones back so long.
        """
        if _QUICKACK is not None:
            with contextlib.suppress(OSError):  # a broken connection, or one that is no TCP
                self._connected.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def fileno(self) -> int:
        """Of the connection."""
        return self._connected.fileno()

    def setblocking(self, flag: bool) -> None:
        """Of the connection."""
        self._connected.setblocking(flag)

    def close(self) -> None:
        """Write what the network takes now, and close the connection."""
        with contextlib.suppress(OSError):
            self.flush()
        self._connected.close()


class BufferedClient(paho.Client):
    """The library's client, on such a connection.

    A release of the library that opens connections in another way gets plain ones, which are slower.
    """

    @property
    def pending(self) -> bool:
        """Whether something can be read without a wait for the network."""
        connected = self.socket()
        return isinstance(connected, BufferedSocket | ssl.SSLSocket) and bool(connected.pending())

    @property
    def unsent(self) -> bool:
        """Whether something is still to be written."""
        connected = self.socket()
        return self.want_write() or (isinstance(connected, BufferedSocket) and connected.unsent)

    def flush(self) -> None:
        """Write what the network takes now. Reading tells of a connection that breaks, after what still came on it."""
        if isinstance(connected := self.socket(), BufferedSocket):
            with contextlib.suppress(OSError):
                connected.flush()

    def hurry(self) -> None:
        """Tell the broker at once that its last bytes have come; see `BufferedSocket.hurry`."""
        if isinstance(connected := self.socket(), BufferedSocket):
            connected.hurry()

    def _create_socket(self) -> BufferedSocket:
        connected = super()._create_socket()
        assert isinstance(connected, socket.socket)
        return BufferedSocket(connected)
