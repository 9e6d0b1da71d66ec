"""Messages to an MQTT broker: QoS 1, in order, each acknowledged before it leaves the queue.

One connection is used until it fails. The next one begins clean, and with the first answer that was not acknowledged:
the client library keeps nothing that it would send again by itself, in another order.

Some brokers end the connection at a message that they do not want, such as one that is too large, or never acknowledge
it. A message that is lost so is sent alone the next time, once the broker has shown that it answers. If it is lost
again and again, the message is to blame, and it is set aside.

A message that a broker refuses for the moment stays the first one, alone. After some refusals one of those behind it
goes along: if the broker takes that one, the refusal is meant for the first, which is set aside. If it refuses both,
nothing is lost, however long that takes.
"""

import json
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace

from paho.mqtt.reasoncodes import ReasonCode

from bitneck_cloud.answers.document import document_of
from bitneck_cloud.answers.sinks.maps import with_map
from bitneck_cloud.answers.sinks.mqtt.connection import Connection, Failed, Said
from bitneck_cloud.answers.sinks.settings import MqttTable
from bitneck_cloud.answers.sinks.state import (
    BATCH,
    BATCH_BYTES,
    MOST_CLIENTS,
    TRIES,
    Attempt,
    ClientState,
    Queued,
    tries,
)
from bitneck_cloud.answers.sinks.topics import topic_of

__all__ = ["MqttSink"]

_LOG = logging.getLogger(__name__)
_STATES_AT_ONCE = 200
_PACKET_OVERHEAD = 256
"""Bytes of a message beside its topic and its payload, at most: header, number, properties."""
_CUT = f"the connection ended {TRIES} times in a row when it was sent, or more; is it too large for the broker?"
_UNANSWERED = f"the broker answers, but did not acknowledge it {TRIES} times in a row, or more"
_STATE_PAUSE_S = 3600.0
"""The states of a client are not told for so long once one of them was given up: the next would hold answers up too."""
_REFUSED = 0x80
_PASSING = frozenset({0x80, 0x83, 0x97})
"""Reasons after which the same message may pass later: unspecified, the implementation's own, a quota."""


class MqttSink:
    """See `bitneck_cloud.answers.sinks.state.Sink`.

    Args:
        table: its settings.
        server: name of this server.
    """

    most, most_bytes = BATCH, BATCH_BYTES

    def __init__(self, table: MqttTable, server: str) -> None:
        self._table, self._server = table, server
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._states: OrderedDict[str, bytes] = OrderedDict()
        self._untold: OrderedDict[str, None] = OrderedDict()
        self._suspect: int | str | None = None  # id of the answer, or the client, whose message was lost, or refused
        self._losses = self._refusals = 0  # of it, in a row
        self._quiet_until: OrderedDict[str, float] = OrderedDict()  # clients whose states are not told, monotonic clock
        self._states_failed = False
        self._set_aside: Counter[type] = Counter()  # answers, and states, since the broker acknowledged one

    def restless(self) -> bool:
        """Whether it has to connect, or to tell the state of a client."""
        return self._connection is None or not self._connection.usable() or bool(self._untold)

    def tell(self, state: ClientState) -> None:
        """Keep the newest state of a client to be published."""
        if not self._table.state_topic or self._quiet_until.get(state.client, 0.0) > time.monotonic():
            return
        payload = {"version": 1, "server": self._server} | asdict(state)
        with self._lock:
            self._states[state.client] = json.dumps(payload, separators=(",", ":")).encode()
            self._states.move_to_end(state.client)
            self._untold[state.client] = None
            while len(self._states) > MOST_CLIENTS:
                gone, _ = self._states.popitem(last=False)
                self._untold.pop(gone, None)

    def send(self, batch: Sequence[Queued]) -> Attempt:
        """Publish a batch, and states of clients."""
        attempt, answers_first = Attempt(), self._states_failed  # a state that does not pass must not hold answers up
        try:
            connection = self._connected()
            if not answers_first:
                self._tell_states(connection)
            if batch:
                attempt = self._publish(connection, batch)
            if answers_first and not attempt.error:
                self._tell_states(connection)
        except Failed as exc:
            attempt = replace(attempt, error=str(exc))
        if attempt.error:
            self._drop_connection(goodbye=False)
        return attempt

    def close(self) -> None:
        """Tell the broker that this server goes."""
        self._drop_connection(goodbye=True)

    def _connected(self) -> Connection:
        if self._connection is not None and self._connection.usable():
            return self._connection
        self._drop_connection(goodbye=False)
        self._connection = Connection(self._table, self._server)
        self._connection.open()
        with self._lock:  # the broker may have lost what it kept
            self._untold = OrderedDict.fromkeys(self._states)
        return self._connection

    def _drop_connection(self, *, goodbye: bool) -> None:
        if self._connection is not None:
            self._connection.close(goodbye=goodbye)
            self._connection = None

    def _tell_states(self, connection: Connection) -> None:
        with self._lock:
            clients = sorted(self._untold, key=lambda client: client != self._suspect)[:_STATES_AT_ONCE]
            payloads = [self._states[client] for client in clients]
            for client in clients:
                del self._untold[client]
        topics = [topic_of(self._table.state_topic, {"client": c, "server": self._server}) for c in clients]
        said = self._say(connection, clients, [(*pair, True) for pair in zip(topics, payloads, strict=True)])
        self._states_failed = bool(said.error)
        if said.error:
            left = clients[len(said.reasons) :]
            with self._lock:
                if said.blamed:
                    self._give_up_state(left.pop(0), said.blamed)
                self._untold.update(dict.fromkeys(left))
            raise Failed(said.error)

    def _give_up_state(self, client: str, why: str) -> None:
        """Tell no state of a client for a while, not even one that came meanwhile. The caller holds the lock."""
        _LOG.warning("sink %s: the state of client %r is not told: %s", self._table.name, client, why)
        self._states.pop(client, None)
        self._untold.pop(client, None)
        self._quiet_until[client] = time.monotonic() + _STATE_PAUSE_S
        self._quiet_until.move_to_end(client)
        while len(self._quiet_until) > MOST_CLIENTS:
            self._quiet_until.popitem(last=False)

    def _publish(self, connection: Connection, batch: Sequence[Queued]) -> Attempt:
        messages = [self._message(each) for each in batch]
        limit = connection.max_packet
        too_large = [
            bool(limit) and len(topic.encode(errors="replace")) + len(body) + _PACKET_OVERHEAD > limit
            for topic, body, _ in messages
        ]
        fitting = [k for k, big in enumerate(too_large) if not big]
        said = self._say(connection, [batch[k].id for k in fitting], [messages[k] for k in fitting])
        error, lost = said.error, False
        settled: list[str] = []
        reasons, final = iter(said.reasons), said.outvoted
        for big in too_large:
            if big:
                settled.append(f"the broker takes packets of {limit} bytes")
                continue
            reason = next(reasons, None)
            if reason is None:
                if said.blamed:
                    settled.append(said.blamed)
                    lost = said.lost
                break
            if reason.value in _PASSING and not final:
                error = error or f"the broker refuses for the moment: {reason}"
                break
            final = False
            settled.append(f"the broker refuses: {reason}" if reason.value >= _REFUSED else "")
        return Attempt(tuple(settled), error, cut=lost)

    def _say(
        self, connection: Connection, keys: Sequence[int | str], messages: Sequence[tuple[str, bytes, bool]]
    ) -> Said:
        """Publish, and remember which message is lost, or which answer is refused for the moment."""
        if not keys:
            return Said([])
        suspected = keys[0] == self._suspect
        said = self._say_alone(connection, messages) if suspected else connection.publish(messages)
        told, kind = len(said.reasons), type(keys[0])
        if told:
            del self._set_aside[kind]
        refused = _first_refused(said.reasons) if kind is int else None
        if refused is not None and not said.outvoted:
            again = suspected and refused == 0
            self._suspect, self._losses, self._refusals = keys[refused], 0, self._refusals + 1 if again else 1
        elif said.lost:
            again = suspected and told == 0
            self._suspect, self._losses, self._refusals = keys[told], self._losses + 1 if again else 1, 0
            if self._losses >= tries(self._set_aside[kind]):
                self._suspect = None
                self._set_aside[kind] += 1
                return replace(said, blamed=_CUT if connection.ended else _UNANSWERED)
        elif suspected and told:
            self._suspect = None
        return said

    def _say_alone(self, connection: Connection, messages: Sequence[tuple[str, bytes, bool]]) -> Said:
        """Publish the suspect, and the others when it has passed; after some refusals, one of them all the same."""
        connection.check()
        said = connection.publish(messages[:1])
        if said.error:
            return said
        if _first_refused(said.reasons) is None:
            rest = connection.publish(messages[1:])
            return replace(rest, reasons=said.reasons + rest.reasons)
        turn = self._refusals + 1 - TRIES
        if turn >= 0 and len(messages) > 1:
            place = 1 + turn % (len(messages) - 1)  # another one each time: several may be refused like the first
            another = connection.publish(messages[place : place + 1])
            if another.reasons and another.reasons[0].value < _REFUSED:
                return Said(said.reasons + another.reasons[: place == 1], outvoted=True)
        return said

    def _message(self, queued: Queued) -> tuple[str, bytes, bool]:
        document = document_of(queued.body)
        values = {name: str(document.get(name) or "") for name in ("client", "model", "point", "session", "server")}
        return topic_of(self._table.topic, values), with_map(queued.body, self._table.maps), False


def _first_refused(reasons: Sequence[ReasonCode]) -> int | None:
    """Place of the first message that is refused for the moment; None if there is none."""
    return next((place for place, reason in enumerate(reasons) if reason.value in _PASSING), None)
