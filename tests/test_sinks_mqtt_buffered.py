"""The buffer between MQTT's client library and its connection."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitneck_cloud.answers.sinks.mqtt.buffered import BufferedSocket
from bitneck_cloud.answers.sinks.mqtt.connection import Connection
from bitneck_cloud.answers.sinks.settings import MqttTable
from bitneck_testing.authority import Authority
from bitneck_testing.consumers.broker import MOSQUITTO, Broker

needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture
def pair() -> Iterator[tuple[BufferedSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(10)
        ours.setblocking(False)
        buffered = BufferedSocket(ours)
        yield buffered, theirs
        buffered.close()


def test_what_came_is_read_at_once_and_taken_in_parts(pair: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, theirs = pair
    with pytest.raises(BlockingIOError):
        buffered.recv(1)
    theirs.sendall(b"abcdef")
    assert not buffered.pending()
    assert buffered.recv(1) == b"a"
    theirs.close()
    assert buffered.pending()
    assert (buffered.recv(2), buffered.recv(9)) == (b"bc", b"def")
    assert not buffered.pending()
    assert buffered.recv(1) == buffered.recv(1) == b""


def test_messages_are_written_together(pair: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, theirs = pair
    theirs.setblocking(False)
    assert (buffered.send(b"one"), buffered.send(bytearray(b"two"))) == (3, 3)
    assert buffered.unsent
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    buffered.flush()
    assert not buffered.unsent
    assert theirs.recv(9) == b"onetwo"


def test_the_buffer_is_bounded_and_keeps_the_order(pair: tuple[BufferedSocket, socket.socket]) -> None:
    """One message more than the network takes is refused, and nothing is lost."""
    buffered, theirs = pair
    taken = bytearray()
    for k in range(1000):
        part = bytes([k % 251]) * 50_000
        try:
            assert buffered.send(part) == len(part)
        except BlockingIOError:
            break
        taken += part
    else:
        raise AssertionError("it takes all that there is")
    assert buffered.unsent
    got = bytearray()
    while len(got) < len(taken):
        buffered.flush()
        got += theirs.recv(1 << 20)
    assert got == taken
    assert not buffered.unsent


def test_the_last_words_are_written_at_the_end(pair: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, theirs = pair
    buffered.send(b"goodbye")
    buffered.close()
    assert (theirs.recv(99), theirs.recv(99)) == (b"goodbye", b"")


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux lets a program choose")
def test_what_came_can_be_acknowledged_at_once() -> None:
    """Else a broker that gathers small messages keeps its next acknowledgements back."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with theirs:
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        buffered = BufferedSocket(ours)
        buffered.hurry()
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK) == 1
        buffered.close()
        buffered.hurry()


def test_a_connection_that_is_no_tcp_needs_no_hurry(pair: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, theirs = pair
    buffered.hurry()
    theirs.sendall(b"a")
    assert buffered.recv(9) == b"a"


def test_a_broken_connection_is_told(pair: tuple[BufferedSocket, socket.socket]) -> None:
    buffered, theirs = pair
    theirs.close()
    buffered.send(b"one")
    with pytest.raises(OSError, match="Broken pipe"):
        buffered.flush()


@needs_broker
@pytest.mark.parametrize("tls", [False, True])
def test_the_library_uses_it_also_for_more_than_it_holds(tls: bool, tmp_path: Path) -> None:
    """Each message is larger than the buffer, and those under way than what the network holds."""
    options: dict[str, object] = {}
    lines: tuple[str, ...] = ()
    if tls:
        authority = Authority(tmp_path / "ca")
        certificate, key = authority.issue("broker")
        lines = (f"cafile {authority.ca}", f"certfile {certificate}", f"keyfile {key}")
        options = {"tls": True, "tls_ca": str(authority.ca)}
    with Broker(tmp_path / "broker", *lines) as broker:
        table = MqttTable.model_validate(
            {"kind": "mqtt", "name": "broker", "host": "localhost", "port": broker.port} | options
        )
        connection = Connection(table, "cloud-1")
        connection.open()
        assert isinstance(connection._client.socket(), BufferedSocket)
        said = connection.publish([(f"big/{k}", bytes([k]) * 400_000, False) for k in range(45)])
        assert (said.error, len(said.reasons)) == ("", 45)
        connection.close(goodbye=True)
