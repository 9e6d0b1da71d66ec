"""One connection to an MQTT broker, driven by the thread that uses it: nothing happens between its calls."""

import json
import secrets
import select
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from bitneck_cloud.answers.sinks.mqtt.buffered import BufferedClient
from bitneck_cloud.answers.sinks.settings import MqttTable, secret_of
from bitneck_cloud.answers.sinks.topics import topic_of

__all__ = ["Connection", "Failed", "Said"]

_KEEPALIVE_S = 30
_IN_FLIGHT = 20
"""Messages without an acknowledgement, at most; fewer where the broker says so."""
_GOODBYE_S = 2.0
_TURN_S = 1.0
"""Seconds after which the connection is kept alive, where nothing comes."""
_TOGETHER_S = 0.002
"""Seconds from the first acknowledgement to reading: each one read alone would take more of the processor."""
_NO_TOPIC = "bitneck/no-such-topic"


class Failed(Exception):
    """The connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Said:
    """What became of messages.

    Attributes:
        reasons: what the broker says of them, from the first one up to the first without an acknowledgement.
        error: why that one has none; empty if all of them have one.
        lost: whether the connection ended while that one was under way, or the broker answered something else.
        blamed: why that message is to blame; empty if it is not.
        outvoted: whether the first one is to blame for its refusal: the broker takes another one.
    """

    reasons: list[ReasonCode]
    error: str = ""
    lost: bool = False
    blamed: str = ""
    outvoted: bool = False


class _OfAnAnswer(Properties):
    """The properties of every answer, written once: the library would write them anew for each."""

    def __init__(self) -> None:
        super().__init__(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        self.ContentType = "application/json"
        written: bytes = super().pack()  # type: ignore[no-untyped-call]
        object.__setattr__(self, "pack", lambda: written)


class Connection:
    """One connection, from its beginning to its end, for one thread.

    The library's own thread would cost a switch for each acknowledgement.

    Args:
        table: the sink's settings.
        server: name of this server.
    """

    def __init__(self, table: MqttTable, server: str) -> None:
        self._table = table
        self._connected = False
        self._ended = ""
        self._window = _IN_FLIGHT
        self._acks: dict[int, ReasonCode] = {}
        self._echoed = 0
        self.max_packet = 0
        self._will_topic = topic_of(table.server_topic, {"server": server}) if table.server_topic else ""
        self._server = server
        five = table.protocol == "5"
        self._client = client = BufferedClient(
            CallbackAPIVersion.VERSION2,
            client_id=table.client_id or f"bitneck-{table.name[:32]}-{secrets.token_hex(4)}",
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            clean_session=None if five else True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = table.timeout_s
        client.on_connect, client.on_disconnect, client.on_publish = self._on_connect, self._on_disconnect, self._on_ack
        client.on_unsubscribe = self._on_unsubscribe
        self._properties = _OfAnAnswer() if five else None

    def open(self) -> None:
        """Connect and sign in.

        Raises:
            Failed: there is no broker, or it refuses.
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
            raise Failed(f"no connection to {table.host}:{port}: {exc}") from exc
        if not self._came(lambda: self._connected):
            raise Failed(f"{table.host}:{port}: {self._ended or 'the broker does not answer'}")
        if self._will_topic:
            said = self.publish([(self._will_topic, self._greeting(online=True), True)])
            if said.error:
                raise Failed(said.error)

    @property
    def ended(self) -> bool:
        """Whether the connection has ended."""
        return bool(self._ended)

    def usable(self) -> bool:
        """Whether messages can be sent. Ask it every few seconds: between answers, this keeps the connection alive."""
        if self._connected and not self._ended:
            self._turn(0.0)
        return self._connected and not self._ended

    def check(self) -> None:
        """Ask the broker for any answer at all.

        Raises:
            Failed: there is none.
        """
        if not self._answers():
            raise Failed(self._ended or f"no answer within {self._table.timeout_s:g} s")

    def publish(self, messages: Sequence[tuple[str, bytes, bool]]) -> Said:
        """Send messages and wait for their acknowledgements.

        Args:
            messages: topic, payload, and whether the broker keeps it.
        """
        numbers: list[int] = []
        reasons: list[ReasonCode] = []
        impossible, cut = "", False
        for place in range(len(messages)):
            room = min(len(messages), place + self._window)
            while len(numbers) < room and not impossible and not self._ended:
                topic, payload, retain = messages[len(numbers)]
                try:
                    info = self._client.publish(topic, payload, qos=1, retain=retain, properties=self._properties)
                except ValueError as exc:  # too long for the protocol itself; those before it are under way
                    impossible = f"it cannot be sent: {exc}"
                    break
                if info.rc != paho.MQTT_ERR_SUCCESS:  # also if it was sent, and the connection ended at once
                    self._ended, cut = self._ended or paho.error_string(info.rc), True
                    break
                numbers.append(info.mid)
            if place == len(numbers):
                return Said(reasons, impossible or self._ended, lost=cut, blamed=impossible)
            reason, answers = self._acknowledgement(numbers[place])
            if reason is None:
                error = self._ended or f"no acknowledgement within {self._table.timeout_s:g} s"
                return Said(reasons, error, lost=self.ended or answers)
            reasons.append(reason)
        return Said(reasons)

    def _acknowledgement(self, number: int) -> tuple[ReasonCode | None, bool]:
        """What the broker says of a message; if it says nothing, whether it answers something else.

        A broker that is slow with everything is waited for twice: its next answer is that to the message.
        """
        answers = not self._came(lambda: number in self._acks) and self._answers(number)
        return self._acks.pop(number, None), answers

    def _answers(self, number: int = 0) -> bool:
        """Ask the broker for any answer, and wait for that, or for the acknowledgement of a message."""
        # This needs no right and changes nothing, and every broker acknowledges it.
        _, echo = self._client.unsubscribe(_NO_TOPIC)
        return self._came(lambda: number in self._acks or self._echoed == echo)

    def _came(self, what: Callable[[], bool], within_s: float | None = None) -> bool:
        """Wait for something to come, unless the connection ends, or the time is up."""
        end = time.monotonic() + (self._table.timeout_s if within_s is None else within_s)
        while not what() and not self._ended and (left := end - time.monotonic()) > 0:
            self._turn(min(left, _TURN_S))
        return what()

    def _turn(self, wait_s: float) -> None:
        """Read and write what can be, after a wait for that, and keep the connection alive."""
        client, connected = self._client, self._client.socket()
        if connected is None:
            self._ended = self._ended or "the connection ended"
            return
        client.flush()
        pending = client.pending
        waiting = select.poll()
        waiting.register(connected, select.POLLIN | (select.POLLOUT if client.unsent else 0))
        found = dict(waiting.poll(0 if pending else 1e3 * wait_s)).get(connected.fileno(), 0)
        if wait_s and found & select.POLLIN:
            client.hurry()  # the first acknowledgement came alone, and the broker keeps the others until then
            time.sleep(_TOGETHER_S)
        failed = client.loop_read() if pending or found & ~select.POLLOUT else paho.MQTT_ERR_SUCCESS
        if not failed and found & select.POLLOUT:
            failed = client.loop_write()
        failed = failed or client.loop_misc()
        client.flush()
        if failed:
            self._ended = self._ended or f"the connection ended: {paho.error_string(failed)}"

    def close(self, *, goodbye: bool) -> None:
        """End the connection.

        Args:
            goodbye: tell the broker that this server is not online any more.
        """
        if goodbye and self.usable():
            if self._will_topic:
                info = self._client.publish(self._will_topic, self._greeting(online=False), qos=1, retain=True)
                self._came(lambda: info.mid in self._acks, _GOODBYE_S)
            self._client.disconnect()
        else:
            self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message")
                                    if self._properties is not None else None)  # fmt: skip
        if (left := self._client.socket()) is not None:  # the broker does not even take the farewell
            left.close()

    def _greeting(self, *, online: bool) -> bytes:
        return json.dumps({"version": 1, "server": self._server, "online": online}).encode()

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            self._ended = f"the broker refuses: {reason}"
        else:
            self.max_packet = getattr(properties, "MaximumPacketSize", 0)
            self._window = min(_IN_FLIGHT, getattr(properties, "ReceiveMaximum", _IN_FLIGHT))
            self._connected = True

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._ended = self._ended or f"the connection ended: {reason}"

    def _on_ack(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._acks[mid] = reason

    def _on_unsubscribe(self, _client: Any, _data: Any, mid: int, _reasons: Any, _properties: Any) -> None:
        self._echoed = mid
