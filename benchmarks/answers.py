"""What subscribers and sinks cost a server: its processor time for a frame, its frames a second, a frame's round trip.

    python benchmarks/answers.py --bundle build/efficientnet_lite0 [--subscribers 10] [--sinks three] [--json]

Two servers run side by side: a bare one, and one with subscribers that read all answers, in a process of their own, and
with sinks: an MQTT broker (mosquitto), a webhook's server, each in a process of its own, and a file of JSON lines.
`--sinks three` is the default where mosquitto is installed, `two` leaves the broker out. What consumes has the lowest
priority: in use it has machines of its own, and here it must not take the server's. The servers are loaded by turns,
first as much as they take (saturation), then with half of that, at random moments: the same for both servers, others in
each round. Each second round begins with the other server. The processor time is that of a server and its worker. Each
figure is the median of the rounds' ratios, with / without, and behind it stands the median's 95 % interval (with six
rounds or more): compare within one run only, because the machines that run this are shared. A round is replaced if the
host gave others more than a hundredth of a processor; at most half as many as are wanted. `--json` has every round,
also those. Several runs can be put together if each has seeds of its own (`--first-seed`).

At the end every sink must have delivered every answer, else the exit status is 1.

`--against` compares with another environment's or checkout's server, which gets the same subscribers and sinks: before
and after a change, in one run.
"""

import argparse
import itertools
import json
import math
import os
import selectors
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from bitneck_testing.consumers.broker import MOSQUITTO, Broker
from bitneck_testing.consumers.receiver import Receiver
from bitneck_testing.measuring import processor_s, stolen_s
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import BIN, QUIET, Server, run_json, running_server, spawned_server

CLIENTS = 8
_LOWEST = 19
"""Niceness of what consumes."""
_STOLEN = 0.01
"""A round is disturbed above this: seconds of processor time that the host gave to others, a second."""


def subscribe(http: str, count: int, query: str, ready: "Queue[str]") -> None:
    """Subscribers that read everything, over plain sockets."""
    os.nice(_LOWEST)
    host, _, port = http.partition(":")
    waiting = selectors.DefaultSelector()
    for _ in range(count):
        it = socket.create_connection((host, int(port)))
        it.sendall(f"GET /v1/answers?{query} HTTP/1.1\r\nHost: {http}\r\n\r\n".encode())
        waiting.register(it, selectors.EVENT_READ)
    ready.put("")
    while True:
        for key, _ in waiting.select():
            assert isinstance(key.fileobj, socket.socket)
            if not key.fileobj.recv(1 << 16):
                return


def receive(address: "Queue[str]") -> None:
    """The webhook's server."""
    os.nice(_LOWEST)
    with Receiver().running() as running:
        address.put(running.url)
        while True:
            time.sleep(1.0)
            running.requests.clear()  # it keeps all that came


def with_sinks(which: str, folder: Path, stack: ExitStack) -> tuple[str, ...]:
    """Options of a server with sinks, whose other sides run until the stack ends."""
    if which == "none":
        return ()
    folder.mkdir()
    url = stack.enter_context(spawned_server(receive))
    tables: list[dict[str, Any]] = [
        {"kind": "jsonl", "name": "file", "path": str(folder / "answers.jsonl")},
        {"kind": "webhook", "name": "webhook", "url": url, "secret": "0123456789abcdef"},
    ]
    if which == "three":
        broker = stack.enter_context(Broker(folder / "broker", "autosave_on_changes false", "autosave_interval 1800"))
        os.setpriority(os.PRIO_PROCESS, broker.pid, _LOWEST)
        tables.append({"kind": "mqtt", "name": "broker", "host": "127.0.0.1", "port": broker.port})
    config = folder / "config.toml"
    config.write_text(tomli_w.dumps({"sinks_queue": str(folder / "queue.db"), "sinks": tables}))
    return ("--config", str(config))


def delivered(server: Server) -> list[dict[str, Any]]:
    """The sinks of a server, once they have delivered what waits for them, or do not get on."""
    while True:
        sinks: list[dict[str, Any]] = httpx.get(f"{server.http}/v1/sinks").json()
        if not any(sink["queued"] and not sink["failing"] for sink in sinks):
            return sinks
        time.sleep(0.2)


def answered(server: Server) -> float:
    """Frames that a server has answered so far."""
    lines = httpx.get(f"{server.http}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("bitneck_published_answers_total{"))


def load(
    server: Server, photo: Path, cache: Path, options: argparse.Namespace, fps: float, seed: int
) -> dict[str, float]:
    """One round on one server: processor ms a frame, frames a second, p50 and p99 of the round trip in ms."""
    begin = time.monotonic()
    frames, spent, stolen = answered(server), processor_s(server.process.pid), stolen_s()
    document = run_json(
        [BIN / "bitneck-edge", "load", photo, "--server", server.grpc, "--cache-dir", cache, "--clients", CLIENTS,
         "--seconds", options.seconds, "--fps", fps / CLIENTS, "--point", options.point, "--seed", seed, "--json"]
    )  # fmt: skip
    frames, spent = answered(server) - frames, processor_s(server.process.pid) - spent
    if document["failed"]:
        raise SystemExit(f"{document['failed']} frames failed: {document['failures']}")
    return {
        "processor_ms": spent / frames * 1e3,
        "frames_per_s": document["frames_per_s"],
        "p50_ms": document["ms"]["round_trip"]["p50"],
        "p99_ms": document["ms"]["round_trip"]["p99"],
        "stolen": (stolen_s() - stolen) / (time.monotonic() - begin),
        "seed": seed,
    }


def rounds(servers: list[Server], photo: Path, folder: Path, options: argparse.Namespace, fps: float) -> dict[str, Any]:
    """Medians of each server and of the rounds' ratios, and the interval of the latter."""
    found: list[list[dict[str, float]]] = []
    disturbed: list[list[dict[str, float]]] = []
    for seed in itertools.count(options.first_seed):
        order = slice(None, None, -1 if seed % 2 else 1)
        pair = [load(each, photo, folder, options, fps, seed) for each in servers[order]][order]
        is_disturbed = max(each["stolen"] for each in pair) > _STOLEN
        (disturbed if is_disturbed and 2 * len(disturbed) < options.rounds else found).append(pair)
        if len(found) >= options.rounds:
            break
    result: dict[str, Any] = {"rounds": found, "disturbed": disturbed}
    for key in ("processor_ms", "frames_per_s", "p50_ms", "p99_ms"):
        result[key] = [statistics.median(pair[k][key] for pair in found) for k in range(2)]
        ratios = [pair[1][key] / pair[0][key] for pair in found]
        result[f"{key}_ratio"] = statistics.median(ratios)
        result[f"{key}_interval"] = interval(ratios)
    return result


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the median of endlessly many rounds would lie, with 95 %: between two of the ratios (binomial)."""
    count, out = len(ratios), 0  # that many lie outside at each end
    while 2 * sum(math.comb(count, k) for k in range(out + 2)) <= 0.05 * 2**count:
        out += 1
    return sorted(ratios)[out], sorted(ratios)[-1 - out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--subscribers", type=int, default=10)
    parser.add_argument("--query", default="", help="of the subscribers, such as map=png")
    parser.add_argument(
        "--sinks", choices=["three", "two", "none"], default="three" if MOSQUITTO is not None else "two"
    )
    parser.add_argument("--option", action="append", default=[], help="of the server with subscribers")
    parser.add_argument("--against", type=Path, help="the command of the other server, which is not bare then")
    parser.add_argument("--point", default="s1-r3")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="of the random moments; other ones for another run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        photo = sample_photo()

        def server(name: str, program: Path, *, bare: bool) -> Server:
            more = () if bare else (*options.option, *with_sinks(options.sinks, folder / name, stack))
            running = stack.enter_context(running_server(options.bundle, options=(*QUIET, *more), program=program))
            if not bare and options.subscribers:
                http = running.http.removeprefix("http://")
                stack.enter_context(spawned_server(subscribe, http, options.subscribers, options.query))
            return running

        command = BIN / "bitneck-cloud"
        servers = [
            server("one", options.against or command, bare=options.against is None),
            server("other", command, bare=False),
        ]
        for each in servers:
            load(each, photo, folder, argparse.Namespace(**vars(options) | {"seconds": 1.0}), 0.0, 0)
        time.sleep(1.0)
        saturated = rounds(servers, photo, folder, options, 0.0)
        half = rounds(servers, photo, folder, options, saturated["frames_per_s"][0] / 2)
        sinks = delivered(servers[1])
        missing = [it["name"] for it in sinks if it["delivered"] < answered(servers[1]) or any(it["dropped"].values())]
    if options.json:
        document = {"subscribers": options.subscribers, "sinks": options.sinks, "saturation": saturated, "half": half}
        print(json.dumps(document | {"delivered": {it["name"]: it["delivered"] for it in sinks}}, indent=1))
    for text, result in () if options.json else (("saturation", saturated), ("half of it", half)):
        other = "without" if options.against is None else str(options.against)
        print(f"{text}: {other} / with {options.subscribers} subscribers and {options.sinks} sinks, ratio (95 %)")
        for key, unit in (("processor_ms", "ms of the processor a frame"), ("frames_per_s", "frames a second"),
                          ("p50_ms", "ms round trip, p50"), ("p99_ms", "ms round trip, p99")):  # fmt: skip
            without, busy_one = result[key]
            least, most = result[f"{key}_interval"]
            print(f"  {without:8.2f} {busy_one:8.2f}  {result[f'{key}_ratio']:.2f}  {unit} ({least:.2f} to {most:.2f})")
        print(f"  rounds left out: {len(result['disturbed'])}")
    if missing:
        raise SystemExit(f"not every answer was delivered to: {', '.join(missing)}")


if __name__ == "__main__":
    main()
