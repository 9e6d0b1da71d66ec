"""What attacks on a server cost a well-behaved client of another address.

    python benchmarks/strangers/attacks.py --bundle BUNDLE [--only NAME ...] [--seconds 8] [--point ID] [--json]

For each attack, in one run: the round trip of clean frames, 20 a second, before, during and after it (p50 and p99, ms);
how many of them failed; and the server's memory before and after. The attacker is a process of its own with another
loopback address, and does without pause what its name says:

- busy: computes and sends nothing, for comparison: so much costs that the machine is shared;
- http-silent: keeps 1,050 connections to the control API, and says nothing;
- http-half: the same with half a request;
- grpc-silent: keeps 1,050 connections to gRPC, and says nothing;
- opens: opens sessions and abandons them;
- unread-opened: opens sessions and lets the server write nothing;
- no-open: begins streams and sends nothing;
- watches: begins health watches;
- unread-files: asks for files and reads nothing;
- empty: sends frames without payload, on a stream and alone;
- reset: begins calls and resets them at once;
- greedy: 80 sessions with 16 frames each on their way, always.

Compare timings within one run only, because the machines that run this are shared.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.events
from grpc_health.v1 import health_pb2
from h2.exceptions import ProtocolError

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import seal_frame
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.link.wire import client_message
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.http2 import BareClient
from bitneck_testing.measuring import p50_and_p99
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import QUIET, Server, child_process, running_server

ATTACKER = "127.0.0.66"
FRAMES_PER_S = 20
CONNECTIONS, GREEDY_SESSIONS, WINDOW = 1050, 80, 16
HEALTH = "/grpc.health.v1.Health/"


class Target:
    """What an attacker knows of the server."""

    def __init__(self, document: dict[str, str]) -> None:
        self.grpc, self.http = document["grpc"], document["http"]
        self.bundle_id, self.path = document["bundle_id"], document["path"]
        self.point, self.payload = document["point"], bytes.fromhex(document["payload"])

    @property
    def opening(self) -> pb.ClientMessage:
        return pb.ClientMessage(open=pb.Open(bundle_id=self.bundle_id, client="attacker"))

    def frame(self, seq: int, payload: bytes) -> pb.ClientMessage:
        return client_message(seal_frame(seq=seq, point=self.point, payload=payload))

    @contextlib.contextmanager
    def client(self, window: int = 65535) -> Iterator[BareClient]:
        with BareClient(self.grpc, window=window, source=ATTACKER, heeds_limit=False) as client:
            yield client


def hold(address: str, first: bytes) -> None:
    """Keep connections open, and open another one for each that the server closes."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    held: list[socket.socket] = []
    while True:
        for connection in list(held):
            try:
                if not connection.recv(4096):
                    held.remove(connection)
            except BlockingIOError:
                pass
            except OSError:
                held.remove(connection)
        for _ in range(CONNECTIONS - len(held)):
            try:
                connection = socket.create_connection((host, int(port)), 1.0, (ATTACKER, 0))
                connection.sendall(first)
            except OSError:
                break
            connection.setblocking(False)
            held.append(connection)
        time.sleep(0.02)


def busy(_target: Target) -> None:
    """See the module."""
    while True:
        sum(range(10_000))


def http_silent(target: Target) -> None:
    """See the module."""
    hold(target.http, b"")


def http_half(target: Target) -> None:
    """See the module."""
    hold(target.http, b"PUT /v1/rate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{")


def grpc_silent(target: Target) -> None:
    """See the module."""
    hold(target.grpc, b"")


def flood(target: Target, begin: Callable[[BareClient], None], *, window: int = 65535, calls: int = 200) -> None:
    """Begin calls on one connection after another; a few hundred connections stay open."""
    with contextlib.ExitStack() as kept:
        while True:
            try:
                client = kept.enter_context(target.client(window))
                for _ in range(calls):
                    begin(client)
                client.flush()
            except (OSError, ProtocolError):
                time.sleep(0.05)


def opens(target: Target) -> None:
    """See the module."""
    while True:
        with contextlib.suppress(OSError, ProtocolError), target.client() as client:
            for _ in range(100):
                client.call("Stream", target.opening)
            client.flush()
            client.events()


def unread_opened(target: Target) -> None:
    """See the module."""
    flood(target, lambda client: void(client.call("Stream", target.opening)), window=0)


def no_open(target: Target) -> None:
    """See the module."""
    flood(target, lambda client: void(client.call("Stream")))


def watches(target: Target) -> None:
    """See the module."""
    request = health_pb2.HealthCheckRequest()
    flood(target, lambda client: void(client.call("Watch", request, end=True, service=HEALTH)))


def unread_files(target: Target) -> None:
    """See the module."""
    request = pb.FetchFileRequest(bundle_id=target.bundle_id, path=target.path)
    flood(target, lambda client: void(client.call("FetchFile", request, end=True)), window=0)


def void(_: object) -> None:
    """Nothing."""


def empty(target: Target) -> None:
    """See the module."""
    seq = 0
    while True:
        with contextlib.suppress(OSError, ProtocolError), target.client() as client:
            stream = client.call("Stream", target.opening)
            client.flush()
            while True:
                seq += 1
                client.send(stream, target.frame(seq, b""))
                frame = target.frame(seq, b"").frame
                client.call("Infer", pb.InferRequest(bundle_id=target.bundle_id, frame=frame), end=True)
                client.flush()
                for event in client.events():
                    if isinstance(event, h2.events.DataReceived):
                        client.take(event)


def reset(target: Target) -> None:
    """See the module."""
    while True:
        with contextlib.suppress(OSError, ProtocolError), target.client() as client:
            client.socket.setblocking(True)
            while True:
                for _ in range(100):
                    client.reset(client.call("Infer"))
                client.flush()


def greedy(target: Target) -> None:
    """See the module."""
    clients: list[tuple[BareClient, dict[int, Greed]]] = []
    while (missing := GREEDY_SESSIONS - sum(len(streams) for _, streams in clients)) > 0:
        client = BareClient(target.grpc, source=ATTACKER)
        client.socket.settimeout(0.002)
        clients.append(
            (client, {client.call("Stream", target.opening): Greed() for _ in range(client.most_calls)[:missing]})
        )
    while True:
        for client, streams in clients:
            for stream, greed in streams.items():
                while greed.sent < greed.answered + WINDOW and client.room(stream) > len(target.payload) + 100:
                    greed.sent += 1
                    client.send(stream, target.frame(greed.sent, target.payload))
            client.flush()
            with contextlib.suppress(TimeoutError):
                for event in client.events():
                    if isinstance(event, h2.events.DataReceived):
                        assert event.stream_id is not None
                        client.take(event)
                        streams[event.stream_id].answered += 1


@dataclass(slots=True)
class Greed:
    """Frames of one session of `greedy`."""

    sent: int = 0
    answered: int = 0


ATTACKS: dict[str, Callable[[Target], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        busy, http_silent, http_half, grpc_silent, opens, unread_opened, no_open, watches, unread_files, empty, reset,
        greedy,
    )
}  # fmt: skip


class Clean:
    """A client that sends a frame 20 times a second and notes each round trip."""

    def __init__(self, server: Server, cache: Path, point: str) -> None:
        self._server = server
        self._wanted = point
        self._settings = EdgeSettings.load({"server": server.grpc, "cache_dir": cache, "retries": 20})
        self.failed = 0

    async def prepare(self) -> tuple[Bundle, str, bytes]:
        self._bundle = await fetch_bundle(self._settings)
        encoder = EdgeEncoder(self._bundle)
        point = encoder.ladder[self._wanted].id if self._wanted else encoder.ladder.best.id
        self._point, self._payload = point, encoder.encode(sample_photo(), point).encoded.payload
        return self._bundle, point, self._payload

    async def run(self, seconds: float) -> list[float]:
        """Round trips in ms, on a session of its own that is opened now."""
        s = self._settings
        link = Link(
            LinkSettings(
                access=s.access, model="", bundle_id=self._bundle.bundle_id, client="clean", retries=s.retries,
                connect_timeout_s=s.connect_timeout_s, answer_timeout_s=s.answer_timeout_s,
            ),
            lambda _point, _reason: None,
        )  # fmt: skip
        await link.open()
        trips: list[float] = []

        async def one() -> None:
            begin = time.perf_counter()
            try:
                await (await link.send(self._point, self._payload)).answer
                trips.append((time.perf_counter() - begin) * 1e3)
            except BitneckError:
                self.failed += 1

        tasks = []
        for _ in range(round(seconds * FRAMES_PER_S)):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(1 / FRAMES_PER_S)
        await asyncio.gather(*tasks)
        await link.close()
        return trips


async def measure(name: str, bundle: Path, seconds: float, point_id: str) -> dict[str, Any]:
    """One attack on a server of its own."""
    with tempfile.TemporaryDirectory() as cache, running_server(bundle, options=QUIET) as server:
        clean = Clean(server, Path(cache), point_id)
        opened, point, payload = await clean.prepare()
        await clean.run(1.0)
        before, memory = p50_and_p99(await clean.run(seconds)), server.resident_mib
        path = next(name for name, entry in opened.manifest.files.items() if entry.role != "cloud" and entry.size > 1e6)
        target = {
            "grpc": server.grpc, "http": server.http, "bundle_id": opened.bundle_id, "path": path, "point": point,
            "payload": payload.hex(),
        }  # fmt: skip
        command = [sys.executable, __file__, "--bundle", bundle, "--as-attacker", name]
        with child_process([*command, "--target", json.dumps(target)]):
            await asyncio.sleep(1.5)
            during, at_work = p50_and_p99(await clean.run(seconds)), server.resident_mib
        await asyncio.sleep(2.0)
        after = p50_and_p99(await clean.run(seconds))
        return {
            "before": before, "during": during, "after": after, "failed": clean.failed,
            "memory_mib": {"before": memory, "during": at_work, "after": server.resident_mib},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--point", default="", help="operating point of all frames; the most accurate one without it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-attacker", choices=sorted(ATTACKS), help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    plan = parser.parse_args()
    if plan.as_attacker:
        ATTACKS[plan.as_attacker](Target(json.loads(plan.target)))
        return
    results = {}
    for name in plan.only:
        found = results[name] = asyncio.run(measure(name, plan.bundle, plan.seconds, plan.point))
        if not plan.json:
            trips = "  ".join(
                f"{when} {found[when]['p50_ms']:.1f} / {found[when]['p99_ms']:.1f}"
                for when in ("before", "during", "after")
            )
            memory = " -> ".join(f"{found['memory_mib'][when]:.0f}" for when in ("before", "during", "after"))
            print(f"{name:14} ms p50 / p99: {trips}  failed {found['failed']}  MiB {memory}", flush=True)
    if plan.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
