"""gRPC made of bare HTTP/2 frames, for what no library does: leave messages unread, or count pings."""

import asyncio
import gzip
import socket
import struct
from typing import Any, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

__all__ = ["BareClient", "CalmServer", "InflatingServer", "grpc_message"]

_SERVICE = "/bitneck.v2.SplitInference/"


def grpc_message(message: Any) -> bytes:
    """A protobuf message as gRPC frames it, uncompressed."""
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + bytes(data)


class BareClient:
    """One plaintext connection.

    Args:
        address: HOST:PORT.
        window: bytes that the server may send on a stream before the client, which never does, gives more.
        timeout_s: for each step on the socket.
        source: the client's own address; empty for the system's choice.
        heeds_limit: begin no more calls than the server allows at a time. Otherwise `call` never refuses.
    """

    def __init__(
        self, address: str, *, window: int = 65535, timeout_s: float = 10.0, source: str = "", heeds_limit: bool = True
    ) -> None:
        host, _, port = address.rpartition(":")
        self._address = address
        self.socket = socket.create_connection((host, int(port)), timeout_s, (source, 0) if source else None)
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._http.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._http.initiate_connection()
        self.flush()
        while not any(isinstance(event, h2.events.RemoteSettingsChanged) for event in self.events()):
            pass
        self.most_calls = self._http.remote_settings.max_concurrent_streams
        """Calls that the server lets a connection have open."""
        if not heeds_limit:
            self._http.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1 << 31
            self._http.remote_settings.acknowledge()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, method: str, message: Any | None = None, *, end: bool = False, service: str = _SERVICE) -> int:
        """Begin a call, and perhaps send a message; nothing is flushed.

        Args:
            method: of the service.
            message: the first one.
            end: whether nothing more will be sent.
            service: its path.

        Returns:
            The stream's number.
        """
        stream = self._http.get_next_available_stream_id()
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", service + method), (":authority", self._address),
            ("te", "trailers"), ("content-type", "application/grpc"),
        ]  # fmt: skip
        self._http.send_headers(stream, headers)
        if message is not None:
            self.send(stream, message, end=end)
        return stream

    def room(self, stream: int) -> int:
        """Bytes that the server takes on a stream at this moment."""
        return self._http.local_flow_control_window(stream)

    def send(self, stream: int, message: Any, *, end: bool = False) -> None:
        """Send a message on a stream; nothing is flushed."""
        self._http.send_data(stream, grpc_message(message), end_stream=end)

    def reset(self, stream: int) -> None:
        """Take a call back; nothing is flushed."""
        self._http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)

    def read_more(self, stream: int, size: int = 1 << 20) -> None:
        """Let the server send so many more bytes on a stream, and on the connection; nothing is flushed."""
        self._http.increment_flow_control_window(size)
        self._http.increment_flow_control_window(size, stream)

    def take(self, event: h2.events.DataReceived) -> None:
        """Give back the window that received data took; nothing is flushed."""
        if event.flow_controlled_length and event.stream_id is not None:
            self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def flush(self) -> None:
        """Write what waits."""
        self.socket.sendall(self._http.data_to_send())

    def events(self) -> list[h2.events.Event]:
        """What the server sent, after waiting for it. The server's settings and pings are answered.

        Raises:
            ConnectionError: the server closed the connection.
            TimeoutError: nothing came in time.
        """
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        events = self._http.receive_data(data)
        self.flush()
        return events

    def status(self, stream: int) -> str:
        """Wait for the end of a call.

        Returns:
            Its gRPC status, or the HTTP/2 error that reset it.
        """
        while True:
            for event in self.events():
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, h2.events.StreamReset):
                    return f"reset {event.error_code}"
                if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                    for name, value in event.headers or ():
                        if bytes(name) == b"grpc-status":
                            return bytes(value).decode()


class CalmServer:
    """A server that opens every stream, counts the pings of each connection, and ends one that sends too many.

    Args:
        opened: its first message on each stream.
        most: pings of one connection that it takes. The next one is answered by the GOAWAY that gRPC servers send.

    Attributes:
        pings: by connection, in order.
    """

    def __init__(self, opened: Any, most: int) -> None:
        self.pings: list[int] = []
        self._opened = grpc_message(opened)
        self._most = most

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for `asyncio.start_server`."""
        number = len(self.pings)
        self.pings.append(0)
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        writer.write(http.data_to_send())
        try:
            while data := await reader.read(1 << 16):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        assert event.stream_id is not None
                        http.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                        http.send_data(event.stream_id, self._opened)
                    elif isinstance(event, h2.events.PingReceived):
                        self.pings[number] += 1
                if self.pings[number] > self._most:
                    http.close_connection(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
                    writer.write(http.data_to_send())
                    return
                writer.write(http.data_to_send())
        finally:
            writer.close()


class InflatingServer:
    """A server that answers each call with one message in gRPC's own compression, asked for or not.

    Args:
        message: what it becomes when it is inflated.
    """

    def __init__(self, message: Any) -> None:
        data = gzip.compress(message.SerializeToString())
        self._answer = struct.pack(">BI", 1, len(data)) + data

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for `asyncio.start_server`."""
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        writer.write(http.data_to_send())
        headers = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-encoding", "gzip")]
        try:
            while data := await reader.read(1 << 16):
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.StreamEnded):
                        assert event.stream_id is not None
                        http.send_headers(event.stream_id, headers)
                        http.send_data(event.stream_id, self._answer)
                        http.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
                writer.write(http.data_to_send())
        finally:
            writer.close()
