"""What subscribers cost a server: its processor time for a frame, its frames a second, and a frame's round trip.

    python benchmarks/answers.py --bundle build/efficientnet_lite0 [--subscribers 10] [--option=--FLAG ...] [--json]

Two servers run side by side: one without subscribers, and one with subscribers that read all answers, in a process of
their own, and with further options, such as a file that sets sinks up. They are loaded by turns, first as much as they
take (saturation), then with half of that. Each figure is the median of the rounds' ratios, with / without: compare
within one run only, because the machines that run this are shared.
"""

import argparse
import json
import os
import selectors
import socket
import statistics
import tempfile
import time
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import httpx

from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import BIN, QUIET, Server, run_json, running_server, spawned_server

CLIENTS = 8


def subscribe(http: str, count: int, query: str, ready: "Queue[str]") -> None:
    """Subscribers that read everything, over plain sockets."""
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


def processor_s(server: Server) -> float:
    """Processor time of a server so far, seconds. Linux only."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def answered(server: Server) -> float:
    """Frames that a server has answered so far."""
    lines = httpx.get(f"{server.http}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("bitneck_published_answers_total{"))


def load(server: Server, photo: Path, cache: Path, options: argparse.Namespace, fps: float) -> dict[str, float]:
    """One round on one server: processor ms a frame, frames a second, p99 of the round trip in ms."""
    frames, spent = answered(server), processor_s(server)
    document = run_json(
        [BIN / "bitneck-edge", "load", photo, "--server", server.grpc, "--cache-dir", cache, "--clients", CLIENTS,
         "--seconds", options.seconds, "--fps", fps / CLIENTS, "--point", options.point, "--json"]
    )  # fmt: skip
    frames, spent = answered(server) - frames, processor_s(server) - spent
    if document["failed"]:
        raise SystemExit(f"{document['failed']} frames failed: {document['failures']}")
    return {
        "processor_ms": spent / frames * 1e3,
        "frames_per_s": document["frames_per_s"],
        "p99_ms": document["ms"]["round_trip"]["p99"],
    }


def rounds(servers: list[Server], photo: Path, folder: Path, options: argparse.Namespace, fps: float) -> dict[str, Any]:
    """Medians of each server, and of the ratios of the rounds."""
    found = [[load(it, photo, folder, options, fps) for it in servers] for _ in range(options.rounds)]
    result: dict[str, Any] = {}
    for key in found[0][0]:
        result[key] = [statistics.median(pair[k][key] for pair in found) for k in range(2)]
        result[f"{key}_ratio"] = statistics.median(pair[1][key] / pair[0][key] for pair in found)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--subscribers", type=int, default=10)
    parser.add_argument("--query", default="", help="of the subscribers, such as map=png")
    parser.add_argument("--option", action="append", default=[], help="of the server with subscribers")
    parser.add_argument("--point", default="s1-r3")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = sample_photo()
        with (
            running_server(options.bundle, options=QUIET) as bare,
            running_server(options.bundle, options=(*QUIET, *options.option)) as busy,
            spawned_server(subscribe, busy.http.removeprefix("http://"), options.subscribers, options.query),
        ):
            servers = [bare, busy]
            for server in servers:
                load(server, photo, folder, argparse.Namespace(**vars(options) | {"seconds": 1.0}), 0.0)
            time.sleep(1.0)
            saturated = rounds(servers, photo, folder, options, 0.0)
            half = rounds(servers, photo, folder, options, saturated["frames_per_s"][0] / 2)
    if options.json:
        print(json.dumps({"subscribers": options.subscribers, "saturation": saturated, "half": half}, indent=1))
        return
    for text, result in (("saturation", saturated), ("half of it", half)):
        print(f"{text}: without / with {options.subscribers} subscribers, ratio")
        for key, unit in (("processor_ms", "ms of the processor a frame"), ("frames_per_s", "frames a second"),
                          ("p99_ms", "ms round trip, p99")):  # fmt: skip
            without, busy_one = result[key]
            print(f"  {without:8.2f} {busy_one:8.2f}  {result[f'{key}_ratio']:.2f}  {unit}")


if __name__ == "__main__":
    main()
