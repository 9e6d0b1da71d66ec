"""Messages to an MQTT broker: QoS 1, in order, each acknowledged before it leaves the queue.

One connection is used until it fails. The next one begins clean, and with the first answer that was not acknowledged:
the client library keeps nothing that it would send again by itself, in another order.

Some brokers end the connection at a message that they do not want, such as one that is too large. A message at which
the connection ended is sent alone the next time, once the broker has shown that it answers. If the connection ends
there again and again, the message is to blame, and it is set aside.
"""

import json
import logging
import secrets
import ssl
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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

_LOG = logging.getLogger(__name__)
_BATCH, _BATCH_BYTES = 100, 1 << 20
_KEEPALIVE_S = 30
_IN_FLIGHT = 20
"""Messages without an acknowledgement, at most; fewer where the broker says so."""
_GOODBYE_S = 2.0
_MOST_CLIENTS = 10_000
_STATES_AT_ONCE = 200
_PACKET_OVERHEAD = 256
"""Bytes of a message beside its topic and its payload, at most: header, number, properties."""
_MOST_LOSSES = 3
"""Connections in a row that may end at one message. Twice as many for each one that was set aside before it, unless the
broker has acknowledged one meanwhile: else a broker that wants none of them would cost them all."""
_MOST_DOUBLINGS = 12
_NO_TOPIC = "bitneck/no-such-topic"
_CUT = f"the connection ended {_MOST_LOSSES} times in a row when it was sent, or more; is it too large for the broker?"
_REFUSED = 0x80
_PASSING = frozenset({0x80, 0x83, 0x97})
"""Reasons after which the same message may pass later: unspecified, the implementation's own, a quota."""


class _Failed(Exception):
    """The connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class _Said:
    """What became of messages.

    Attributes:
        reasons: what the broker says of them, from the first one up to the first without an acknowledgement.
        error: why that one has none; empty if all of them have one.
        cut: whether the connection ended while that one was under way.
        blamed: whether that was so often enough that the message is to blame.
    """

    reasons: list[ReasonCode]
    error: str = ""
    cut: bool = False
    blamed: bool = False


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
        self._echoed = False
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
        client.on_unsubscribe = self._on_unsubscribe
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
            said = self.publish([(self._will_topic, self._greeting(online=True), True)])
            if said.error:
                raise _Failed(said.error)

    def usable(self) -> bool:
        """Whether messages can be sent."""
        return self._connected and not self._ended

    def check(self) -> None:
        """Ask the broker for any answer at all.

        Raises:
            _Failed: there is none.
        """
        self._echoed = False
        self._client.unsubscribe(_NO_TOPIC)  # needs no right and changes nothing, and every broker acknowledges it
        with self._changed:
            self._changed.wait_for(lambda: self._echoed or self._ended, self._table.timeout_s)
            if not self._echoed:
                raise _Failed(self._ended or f"no answer within {self._table.timeout_s:g} s")

    def publish(self, messages: Sequence[tuple[str, bytes, bool]]) -> _Said:
        """Send messages and wait for their acknowledgements.

        Args:
            messages: topic, payload, and whether the broker keeps it.
        """
        numbers: list[int] = []
        reasons: list[ReasonCode] = []
        for place in range(len(messages)):
            while len(numbers) < min(len(messages), place + self._window):
                topic, payload, retain = messages[len(numbers)]
                try:
                    info = self._client.publish(topic, payload, qos=1, retain=retain, properties=self._properties)
                except ValueError as exc:  # too long for the protocol itself
                    return _Said(reasons, f"a message cannot be sent: {exc}")
                if info.rc != paho.MQTT_ERR_SUCCESS:
                    break
                numbers.append(info.mid)
            if place == len(numbers):
                return _Said(reasons, self._ended or paho.error_string(info.rc))
            with self._changed:
                number = numbers[place]
                self._changed.wait_for(lambda: number in self._acks or self._ended, self._table.timeout_s)  # noqa: B023
                if number not in self._acks:
                    cut = bool(self._ended)
                    return _Said(reasons, self._ended or f"no acknowledgement within {self._table.timeout_s:g} s", cut)
                reasons.append(self._acks.pop(number))
        return _Said(reasons)

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

    def _on_unsubscribe(self, *_: Any) -> None:
        with self._changed:
            self._echoed = True
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
        self._cut_at: int | str | None = None  # id of the answer, or the client, at whose message the connection ended
        self._cuts = 0
        self._set_aside: Counter[type] = Counter()  # answers, and states, since the broker acknowledged one

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
            clients = sorted(self._untold, key=lambda client: client != self._cut_at)[:_STATES_AT_ONCE]
            payloads = [self._states[client] for client in clients]
            for client in clients:
                del self._untold[client]
        topics = [topic_of(self._table.state_topic, {"client": c, "server": self._server}) for c in clients]
        said = self._say(connection, clients, [(*pair, True) for pair in zip(topics, payloads, strict=True)])
        if said.error:
            left = clients[len(said.reasons) :]
            with self._lock:
                if said.blamed:
                    _LOG.warning("sink %s: the state of client %r is not told: %s", self._table.name, left[0], _CUT)
                    self._states.pop(left[0], None)
                    del left[0]
                self._untold.update(dict.fromkeys(left))
            raise _Failed(said.error)

    def _publish(self, connection: _Connection, batch: Sequence[Queued]) -> Attempt:
        messages = [self._message(each) for each in batch]
        limit = connection.max_packet
        too_large = [
            bool(limit) and len(topic.encode(errors="replace")) + len(body) + _PACKET_OVERHEAD > limit
            for topic, body, _ in messages
        ]
        fitting = [k for k, big in enumerate(too_large) if not big]
        said = self._say(connection, [batch[k].id for k in fitting], [messages[k] for k in fitting])
        error, cut = said.error, False
        settled: list[str] = []
        reasons = iter(said.reasons)
        for big in too_large:
            if big:
                settled.append(f"the broker takes packets of {limit} bytes")
                continue
            reason = next(reasons, None)
            if reason is None:
                if cut := said.blamed:
                    settled.append(_CUT)
                break
            if reason.value in _PASSING:
                error = error or f"the broker refuses for the moment: {reason}"
                break
            settled.append(f"the broker refuses: {reason}" if reason.value >= _REFUSED else "")
        return Attempt(tuple(settled), error, cut=cut)

    def _say(
        self, connection: _Connection, keys: Sequence[int | str], messages: Sequence[tuple[str, bytes, bool]]
    ) -> _Said:
        """Publish, and remember at which message the connection ends."""
        suspected = bool(keys) and keys[0] == self._cut_at
        if suspected:
            connection.check()
            said = connection.publish(messages[:1])
            if not said.error:
                self._cut_at, self._cuts = None, 0
                rest = connection.publish(messages[1:])
                said = _Said(said.reasons + rest.reasons, rest.error, rest.cut)
        else:
            said = connection.publish(messages)
        if said.reasons:
            del self._set_aside[type(keys[0])]
        if said.cut:
            key = keys[len(said.reasons)]
            self._cuts = self._cuts + 1 if key == self._cut_at else 1
            self._cut_at = key
            if self._cuts >= _MOST_LOSSES << min(self._set_aside[type(key)], _MOST_DOUBLINGS):
                self._cut_at, self._cuts = None, 0
                self._set_aside[type(key)] += 1
                return replace(said, blamed=True)
        return said

    def _message(self, queued: Queued) -> tuple[str, bytes, bool]:
        document = json.loads(queued.body)
        values = {name: str(document.get(name) or "") for name in ("client", "model", "point", "session", "server")}
        return topic_of(self._table.topic, values), with_map(queued.body, self._table.maps), False
