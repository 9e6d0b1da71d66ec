"""Messages to an MQTT broker: QoS 1, in order, each acknowledged before it leaves the queue.

One connection is used until it fails. The next one begins clean, and with the first answer that was not acknowledged:
the client library keeps nothing that it would send again by itself, in another order.
"""

import json
import secrets
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from bitneck_cloud.answers.sinks.maps import with_map
from bitneck_cloud.answers.sinks.settings import MqttTable, secret_of
from bitneck_cloud.answers.sinks.state import Attempt, ClientState, Queued
from bitneck_cloud.answers.sinks.topics import topic_of

__all__ = ["MqttSink"]

_BATCH, _BATCH_BYTES = 100, 1 << 20
_KEEPALIVE_S = 30
_IN_FLIGHT = 20
"""Messages without an acknowledgement, at most; fewer where the broker says so."""
_GOODBYE_S = 2.0
_MOST_CLIENTS = 10_000
_STATES_AT_ONCE = 200
_PACKET_OVERHEAD = 256
"""Bytes of a message beside its topic and its payload, at most: header, number, properties."""
_REFUSED = 0x80
_PASSING = frozenset({0x80, 0x83, 0x97})
"""Reasons after which the same message may pass later: unspecified, the implementation's own, a quota."""


class _Failed(Exception):
    """The connection is of no use any more."""


class _Connection:
    """One connection, from its beginning to its end. Callbacks come from the library's thread.

    Args:
        table: the sink's settings.
        server: name of this server.
    """

    def __init__(self, table: MqttTable, server: str) -> None:
        self._table = table
        self._changed = threading.Condition()
        self._connected = False
        self._ended = ""
        self._window = _IN_FLIGHT
        self._acks: dict[int, ReasonCode] = {}
        self.max_packet = 0
        self._will_topic = topic_of(table.server_topic, {"server": server}) if table.server_topic else ""
        self._server = server
        five = table.protocol == "5"
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=table.client_id or f"bitneck-{table.name[:32]}-{secrets.token_hex(4)}",
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            clean_session=None if five else True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = table.timeout_s
        client.on_connect, client.on_disconnect, client.on_publish = self._on_connect, self._on_disconnect, self._on_ack
        self._properties: Properties | None = None
        if five:
            self._properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            self._properties.ContentType = "application/json"

    def open(self) -> None:
        """Connect and sign in.

        Raises:
            _Failed: there is no broker, or it refuses.
            InvalidConfig: the password's file cannot be read.
        """
        table, client = self._table, self._client
        port = table.port or (8883 if table.tls else 1883)
        if table.username:
            client.username_pw_set(table.username, secret_of(table.password, table.password_file))
        if self._will_topic:
            client.will_set(self._will_topic, self._greeting(online=False), qos=1, retain=True)
        try:
            if table.tls:
                context = ssl.create_default_context(cafile=table.tls_ca)
                if table.tls_cert is not None:
                    context.load_cert_chain(table.tls_cert, table.tls_key, password=lambda: "")
                client.tls_set_context(context)
            client.connect(table.host, port, keepalive=_KEEPALIVE_S)
        except (OSError, ValueError) as exc:
            raise _Failed(f"no connection to {table.host}:{port}: {exc}") from exc
        client.loop_start()
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._ended, table.timeout_s)
            if self._ended or not self._connected:
                raise _Failed(f"{table.host}:{port}: {self._ended or 'the broker does not answer'}")
        if self._will_topic:
            _, error = self.publish([(self._will_topic, self._greeting(online=True), True)])
            if error:
                raise _Failed(error)

    def usable(self) -> bool:
        """Whether messages can be sent."""
        return self._connected and not self._ended

    def publish(self, messages: Sequence[tuple[str, bytes, bool]]) -> tuple[list[ReasonCode], str]:
        """Send messages and wait for their acknowledgements.

        Args:
            messages: topic, payload, and whether the broker keeps it.

        Returns:
            What the broker says of the messages, from the first one up to the first without an acknowledgement; and
            why that one has none.
        """
        numbers: list[int] = []
        answers: list[ReasonCode] = []
        for place in range(len(messages)):
            while len(numbers) < min(len(messages), place + self._window):
                topic, payload, retain = messages[len(numbers)]
                try:
                    info = self._client.publish(topic, payload, qos=1, retain=retain, properties=self._properties)
                except ValueError as exc:  # too long for the protocol itself
                    return answers, f"a message cannot be sent: {exc}"
                if info.rc != paho.MQTT_ERR_SUCCESS:
                    return answers, self._ended or paho.error_string(info.rc)
                numbers.append(info.mid)
            with self._changed:
                number = numbers[place]
                self._changed.wait_for(lambda: number in self._acks or self._ended, self._table.timeout_s)  # noqa: B023
                if number not in self._acks:
                    return answers, self._ended or f"no acknowledgement within {self._table.timeout_s:g} s"
                answers.append(self._acks.pop(number))
        return answers, ""

    def close(self, *, goodbye: bool) -> None:
        """End the connection.

        Args:
            goodbye: tell the broker that this server is not online any more.
        """
        if goodbye and self.usable():
            if self._will_topic:
                info = self._client.publish(self._will_topic, self._greeting(online=False), qos=1, retain=True)
                deadline = time.monotonic() + _GOODBYE_S
                with self._changed:
                    while info.mid not in self._acks and not self._ended and time.monotonic() < deadline:
                        self._changed.wait(0.1)
            self._client.disconnect()
        else:
            self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message")
                                    if self._properties is not None else None)  # fmt: skip
        self._client.loop_stop()

    def _greeting(self, *, online: bool) -> bytes:
        return json.dumps({"version": 1, "server": self._server, "online": online}).encode()

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        with self._changed:
            if reason.is_failure:
                self._ended = f"the broker refuses: {reason}"
            else:
                self.max_packet = getattr(properties, "MaximumPacketSize", 0)
                self._window = min(_IN_FLIGHT, getattr(properties, "ReceiveMaximum", _IN_FLIGHT))
                self._connected = True
            self._changed.notify_all()

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        with self._changed:
            self._ended = self._ended or f"the connection ended: {reason}"
            self._changed.notify_all()

    def _on_ack(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        with self._changed:
            self._acks[mid] = reason
            self._changed.notify_all()


class MqttSink:
    """See `bitneck_cloud.answers.sinks.state.Sink`.

    Args:
        table: its settings.
        server: name of this server.
    """

    most, most_bytes = _BATCH, _BATCH_BYTES

    def __init__(self, table: MqttTable, server: str) -> None:
        self._table, self._server = table, server
        self._connection: _Connection | None = None
        self._lock = threading.Lock()
        self._states: OrderedDict[str, bytes] = OrderedDict()
        self._untold: OrderedDict[str, None] = OrderedDict()

    def restless(self) -> bool:
        """Whether it has to connect, or to tell the state of a client."""
        return self._connection is None or not self._connection.usable() or bool(self._untold)

    def tell(self, state: ClientState) -> None:
        """Keep the newest state of a client to be published."""
        if not self._table.state_topic:
            return
        payload = {"version": 1, "server": self._server} | asdict(state)
        with self._lock:
            self._states[state.client] = json.dumps(payload, separators=(",", ":")).encode()
            self._states.move_to_end(state.client)
            self._untold[state.client] = None
            while len(self._states) > _MOST_CLIENTS:
                gone, _ = self._states.popitem(last=False)
                self._untold.pop(gone, None)

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Publish a batch, and states of clients."""
        try:
            connection = self._connected()
            self._tell_states(connection)
            attempt = self._publish(connection, batch) if batch else Attempt()
        except _Failed as exc:
            attempt = Attempt(error=str(exc))
        if attempt.error:
            self._drop_connection(goodbye=False)
        return attempt

    def close(self) -> None:
        """Tell the broker that this server goes."""
        self._drop_connection(goodbye=True)

    def _connected(self) -> _Connection:
        if self._connection is not None and self._connection.usable():
            return self._connection
        self._drop_connection(goodbye=False)
        self._connection = _Connection(self._table, self._server)
        self._connection.open()
        with self._lock:  # the broker may have lost what it kept
            self._untold = OrderedDict.fromkeys(self._states)
        return self._connection

    def _drop_connection(self, *, goodbye: bool) -> None:
        if self._connection is not None:
            self._connection.close(goodbye=goodbye)
            self._connection = None

    def _tell_states(self, connection: _Connection) -> None:
        with self._lock:
            clients = list(self._untold)[:_STATES_AT_ONCE]
            payloads = [self._states[client] for client in clients]
            for client in clients:
                del self._untold[client]
        topics = [topic_of(self._table.state_topic, {"client": c, "server": self._server}) for c in clients]
        answers, error = connection.publish([(*pair, True) for pair in zip(topics, payloads, strict=True)])
        if error:
            with self._lock:
                self._untold.update(dict.fromkeys(clients[len(answers) :]))
            raise _Failed(error)

    def _publish(self, connection: _Connection, batch: Sequence[Queued]) -> Attempt:
        messages = [self._message(each) for each in batch]
        limit = connection.max_packet
        too_large = [
            bool(limit) and len(topic.encode(errors="replace")) + len(body) + _PACKET_OVERHEAD > limit
            for topic, body, _ in messages
        ]
        answers, error = connection.publish([m for m, big in zip(messages, too_large, strict=True) if not big])
        settled: list[str] = []
        said = iter(answers)
        for big in too_large:
            if big:
                settled.append(f"the broker takes packets of {limit} bytes")
                continue
            reason = next(said, None)
            if reason is None:
                break
            if reason.value in _PASSING:
                error = error or f"the broker refuses for the moment: {reason}"
                break
            settled.append(f"the broker refuses: {reason}" if reason.value >= _REFUSED else "")
        return Attempt(tuple(settled), error)

    def _message(self, queued: Queued) -> tuple[str, bytes, bool]:
        document = json.loads(queued.body)
        values = {name: str(document.get(name) or "") for name in ("client", "model", "point", "session", "server")}
        return topic_of(self._table.topic, values), with_map(queued.body, self._table.maps), False
