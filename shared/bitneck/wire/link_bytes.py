"""Link bytes: what crosses a device's interface for the messages of a stream. A model of packets; pure.

A message costs its HTTP/2 and gRPC headers, and each packet those of Ethernet, IP and TCP. Beside the messages go

- acknowledgements: TCP acknowledges data with a packet of its own, unless data goes that way within 40 milliseconds.
  Linux waits for such data only where it has come in time lately, or if the gap before was short. Each second full
  packet is acknowledged at once, and after a silence each one;
- window updates: gRPC answers what it has read with 26 bytes, in the next packet that goes that way;
- keepalives: gRPC asks whether the server is there if nothing has come for a while.

`benchmarks/wire.py` sets the model beside the interface's counter.
"""

import math
from dataclasses import dataclass

__all__ = ["HEADERS", "SEGMENT", "USUAL_ANSWER", "LinkBytes", "LinkMeter", "beside_payload"]

HEADERS = 14 + 20 + 32
"""Of a packet: Ethernet, IPv4, TCP with timestamps."""
SEGMENT = 1448
"""Data of a full packet."""
USUAL_ANSWER = 45
"""Bytes of an answer with five labels and timings, to a client that has the labels' names."""

_IPV6 = 20
"""Bytes that a header of IPv6 is longer."""
_MESSAGE = 9 + 5
"""Headers of a message: an HTTP/2 frame, gRPC's length."""
_WINDOW_UPDATES = 2 * 13
"""One for the stream, one for the connection."""
_RECORD = 5 + 1 + 16
"""What TLS 1.3 adds to each write."""
_PING = 9 + 8
_DELAYED_ACK_S = 0.04
_LONG_GAP_S, _SILENCE_S = 0.06, 0.25
_MOST_ANSWERS = 4.0
"""Messages back for one message, that a forecast counts; more are faults, and pass."""
_SEEN, _TRIAL = 8, 24
"""Frames after which a stream is judged by its own messages, and messages of a trial."""


def beside_payload(frames: float) -> int:
    """Bytes of a frame in its message beside its payload; `frames` are in the message."""
    return 14 if frames < 2 else 8


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Bytes on the device's interface, from and to the device."""

    up: float = 0.0
    down: float = 0.0

    @property
    def busier(self) -> float:
        """Of the busier direction."""
        return max(self.up, self.down)

    def __add__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(self.up + other.up, self.down + other.down)

    def __sub__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(self.up - other.up, self.down - other.down)

    def __truediv__(self, parts: float) -> "LinkBytes":
        return LinkBytes(self.up / parts, self.down / parts)


class _Side:
    """What one end of a connection has sent, and what it owes.

    data comes --(waits)--> owes_ack_since --40 ms--> a packet, acks_at_once
               `--(acks_at_once, and the gap was long)--> a packet
    data goes within 40 ms --> nothing is owed, waits again
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.messages = 0
        self.message_bytes = 0
        self.heard_at = -math.inf
        self.owes_ack_since: float | None = None
        self.acks_at_once = False  # after a long gap
        self.owes_window_updates = False


class LinkMeter:
    """Counts the bytes of one stream as its messages go by. Either end may do so; times are on any one clock.

    Args:
        tls: whether the connection is encrypted.
        ipv6: whether it goes over IPv6.
        keepalive_s: seconds without a message from the cloud after which gRPC sends a ping.
    """

    def __init__(self, *, tls: bool = False, ipv6: bool = False, keepalive_s: float = math.inf) -> None:
        self._headers = HEADERS + (_IPV6 if ipv6 else 0)
        self._record = _RECORD if tls else 0
        self._keepalive_s = keepalive_s
        self._device, self._cloud = _Side(), _Side()
        self._heard_at = math.inf
        self._frames = 0

    def sent(self, message_bytes: int, at: float, frames: int = 1) -> None:
        """The device sends a message to the cloud.

        Args:
            message_bytes: of the protobuf message.
            at: when, seconds.
            frames: in it.
        """
        self._frames += frames
        self._pings(at)
        self._message(self._device, self._cloud, message_bytes, at)

    def received(self, message_bytes: int, at: float) -> None:
        """The cloud sends a message to the device."""
        self._pings(at)
        self._heard_at = at
        self._message(self._cloud, self._device, message_bytes, at)

    def total(self, now: float) -> LinkBytes:
        """Everything up to now."""
        self._pings(now)
        for side in (self._device, self._cloud):
            self._acknowledge(side, now)
        return LinkBytes(self._device.bytes, self._cloud.bytes)

    @property
    def message_bytes(self) -> LinkBytes:
        """What gRPC was given."""
        return LinkBytes(self._device.message_bytes, self._cloud.message_bytes)

    def expected(self, payload_bytes: float, interval_s: float) -> LinkBytes:
        """For one frame and its share of the answers, if many are sent in the way of those before.

        Args:
            payload_bytes: of the frame.
            interval_s: between frames.
        """
        sent, came = self._device.messages, self._cloud.messages
        frames, answers, answer = 1.0, 1.0, float(USUAL_ANSWER)
        if sent > 1 and self._frames >= _SEEN:
            frames, answers = max(1.0, self._frames / sent), min(came / sent, _MOST_ANSWERS)
            answer = self._cloud.message_bytes / came if came else 0.0
        frame_bytes = payload_bytes + beside_payload(frames)
        trial = LinkMeter(tls=bool(self._record), ipv6=self._headers > HEADERS, keepalive_s=self._keepalive_s)
        begun, owed, gap_s = LinkBytes(), 0.0, interval_s * frames
        for number in range(_TRIAL + 1):
            at = number * gap_s
            if number == 1:
                begun = trial.total(at)
            trial.sent(round(frame_bytes * frames), at)
            owed += answers
            while owed >= 1.0:
                owed -= 1.0
                trial.received(round(answer), at)
        return (trial.total((_TRIAL + 1) * gap_s) - begun) / (_TRIAL * frames)

    def _message(self, source: _Side, target: _Side, message_bytes: int, at: float) -> None:
        for side in (source, target):
            self._acknowledge(side, at)
        source.messages += 1
        source.message_bytes += message_bytes
        data = _MESSAGE + message_bytes
        if source.owes_window_updates:
            data += _WINDOW_UPDATES
        self._data(source, target, data, at)
        target.owes_window_updates = True

    def _data(self, source: _Side, target: _Side, data: int, at: float) -> None:
        """Bytes in as many packets as they need; they acknowledge what came before."""
        data += self._record
        packets = -(-data // SEGMENT)
        source.bytes += data + packets * self._headers
        source.owes_ack_since, source.owes_window_updates = None, False
        if at - source.heard_at < _DELAYED_ACK_S:
            source.acks_at_once = False
        heard_before, target.heard_at = target.heard_at, at
        long_silence = at - heard_before >= _SILENCE_S
        target.bytes += (packets - 1 if long_silence else (packets - 1) // 2) * self._headers
        if target.acks_at_once and at - heard_before >= _LONG_GAP_S:
            target.bytes += self._headers
        elif target.owes_ack_since is None:
            target.owes_ack_since = at

    def _acknowledge(self, side: _Side, now: float) -> None:
        """The packet that TCP sends if no data has gone that way for too long."""
        if side.owes_ack_since is not None and now - side.owes_ack_since >= _DELAYED_ACK_S:
            side.bytes += self._headers
            side.owes_ack_since, side.acks_at_once = None, True

    def _pings(self, now: float) -> None:
        """Keepalives since the cloud was last heard: a ping, its answer, and two acknowledgements."""
        if now - self._heard_at >= self._keepalive_s:
            pings = int((now - self._heard_at) // self._keepalive_s)
            for side in (self._device, self._cloud):
                self._acknowledge(side, now)
                side.bytes += pings * (2 * self._headers + _PING + self._record)
            self._heard_at += pings * self._keepalive_s
