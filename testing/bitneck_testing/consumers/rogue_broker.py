"""An MQTT broker that treats messages as it is told: refuses them in words, ends the connection, or says nothing.

It takes one connection after the other, MQTT 5 or 3.1.1, and knows no subscribers: `taken` is what it acknowledged.
"""

import socket
import threading
from collections.abc import Callable
from typing import Self

__all__ = ["CUT", "SILENT", "RogueBroker"]

CUT, SILENT = -1, -2
_CONNECT, _PUBLISH, _UNSUBSCRIBE, _PINGREQ, _DISCONNECT = 1, 3, 10, 12, 14


class RogueBroker:
    """Use it as a context manager.

    Attributes:
        port: on loopback.
        seen: topics of all messages that came.
        taken: topics of those that it has acknowledged without a refusal.

    Args:
        verdict: for a message's topic and payload: the reason code of MQTT 5 (0 takes it), `CUT` or `SILENT`.
    """

    def __init__(self, verdict: Callable[[str, bytes], int]) -> None:
        self.verdict = verdict
        self.seen: list[str] = []
        self.taken: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="rogue-broker", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(30)
                try:
                    self._serve(connection)
                except (OSError, EOFError):
                    continue

    def _serve(self, connection: socket.socket) -> None:
        five = False
        while True:
            kind, body = _packet(connection)
            if kind == _CONNECT:
                five = body[6] == 5  # behind the protocol's name
                connection.sendall(b"\x20\x03\x00\x00\x00" if five else b"\x20\x02\x00\x00")
            elif kind == _PUBLISH:
                size = int.from_bytes(body[:2], "big")
                topic, number = body[2 : 2 + size].decode(), body[2 + size : 4 + size]
                self.seen.append(topic)
                verdict = self.verdict(topic, body)
                if verdict == CUT:
                    return
                if verdict == SILENT:
                    continue
                if not verdict:
                    self.taken.append(topic)
                connection.sendall(b"\x40\x03" + number + bytes([verdict]) if five else b"\x40\x02" + number)
            elif kind == _UNSUBSCRIBE:
                connection.sendall(b"\xb0\x04" + body[:2] + b"\x00\x11" if five else b"\xb0\x02" + body[:2])
            elif kind == _PINGREQ:
                connection.sendall(b"\xd0\x00")
            elif kind == _DISCONNECT:
                return


def _packet(connection: socket.socket) -> tuple[int, bytes]:
    """Type and body of the next packet.

    Raises:
        EOFError: the connection ended.
    """
    kind, size, shift = _exactly(connection, 1)[0] >> 4, 0, 0
    while True:
        byte = _exactly(connection, 1)[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return kind, _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return found
