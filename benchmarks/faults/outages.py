"""Send frames while the sinks' other sides are down, and the server is killed in between; then count what came.

    python benchmarks/faults/outages.py --bundle build/efficientnet_lite0 [--minutes 10] [--fps 20] [--json]

An MQTT broker (mosquitto) and a webhook's server get SIGKILL and stay down for so many minutes. Halfway the cloud's
server gets SIGKILL too, and is started again on the same port, with the same queue and the same key for resume tokens.
A file of JSON lines is a third sink. One edge client sends frames all the while. When all is up again and the queue is
empty, each sink must have every answer that the device got. An answer may have come twice, under its old number. Those
that came for the first time must be in the order of their numbers. Ends with status 1 if that is not so.
"""

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.consumers.broker import Broker, Subscriber
from bitneck_testing.consumers.receiver import Receiver, Reply, Request
from bitneck_testing.photographs import photo
from bitneck_testing.processes import QUIET, Server, free_port, start_server

PICTURES = 8
CALM_S = 3.0
"""Seconds for which everything runs, before and after the outage."""
DRAIN_S = 300.0
"""Seconds that the sinks may take, once all is up again: they wait up to a minute after many failures."""

Frame = tuple[str, int]
"""Session and number of a frame."""


def receive(port: int, file: Path, up: Any) -> None:
    """The webhook's server: it writes down what it takes, before it says so."""
    receiver = Receiver()

    def write_down(request: Request) -> Reply | None:
        with file.open("ab", buffering=0) as lines:  # in one go: a kill leaves no half line
            lines.write(b"".join(json.dumps(answer).encode() + b"\n" for answer in request.answers))
        receiver.requests.clear()
        return None

    receiver.replies = write_down
    with receiver.running(port=port):
        up.set()
        time.sleep(1e9)


class Webhook:
    """That server as a process that can be killed and started again.

    Args:
        file: where it writes documents.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.port = file, free_port()
        self._context = multiprocessing.get_context("spawn")
        self.start()

    def start(self) -> None:
        up = self._context.Event()
        self._process = self._context.Process(target=receive, args=(self.port, self.file, up), daemon=True)
        self._process.start()
        if not up.wait(60.0):
            raise SystemExit("the webhook's server did not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def judge(documents: list[dict[str, Any]], answered: set[Frame]) -> dict[str, int]:
    """What came to a sink, against what the device got."""
    numbers: dict[Frame, int] = {}
    repeats = renumbered = disordered = newest = 0
    for document in documents:
        frame = (document["session"], document["seq"])
        if frame in numbers:
            repeats += 1
            renumbered += document["number"] != numbers[frame]
        else:
            numbers[frame] = document["number"]
            disordered += document["number"] <= newest
            newest = max(newest, document["number"])
    return {
        "answers": len(numbers),
        "missing": len(answered - numbers.keys()),
        "repeats": repeats,
        "renumbered": renumbered,
        "disordered": disordered,
    }


async def until(true: Callable[[], bool], limit_s: float) -> bool:
    """Wait until something is true; whether it came true."""
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.2)
    return True


async def run(options: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The figures of one run."""
    broker = stack.enter_context(Broker(folder / "broker"))
    subscriber = stack.enter_context(Subscriber.running(broker.port, "bitneck/#"))
    webhook = Webhook(folder / "webhook.jsonl")
    stack.callback(webhook.kill)
    file = folder / "answers.jsonl"
    config = folder / "cloud.toml"
    tables = [
        {"kind": "mqtt", "name": "mqtt", "host": "127.0.0.1", "port": broker.port},
        {
            "kind": "webhook",
            "name": "webhook",
            "url": f"http://127.0.0.1:{webhook.port}/",
            "secret": "0123456789abcdef",
        },
        {"kind": "jsonl", "name": "jsonl", "path": str(file), "keep": 0},
    ]
    key, queue = "the same key for each of them", str(folder / "queue.db")
    config.write_text(tomli_w.dumps({"token_key": key, "server_name": "here", "sinks_queue": queue, "sinks": tables}))
    flags, address = ("--config", str(config), *QUIET), f"127.0.0.1:{free_port()}"
    servers: list[Server] = [start_server(options.bundle, options=flags, grpc=address)]
    stack.callback(lambda: list(map(Server.close, servers)))
    over = asyncio.Event()

    def sinks() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{servers[-1].http}/v1/sinks").json()
        return found

    async def outage() -> dict[str, int]:
        """Everything that happens to the servers; what waited at the end of the outage."""
        await asyncio.sleep(CALM_S)
        broker.kill()
        webhook.kill()
        await asyncio.sleep(options.minutes * 30)
        servers[-1].kill()
        servers.append(await asyncio.to_thread(start_server, options.bundle, options=flags, grpc=address))
        await asyncio.sleep(options.minutes * 30)
        waited = {sink["name"]: sink["queued"] for sink in await asyncio.to_thread(sinks)}
        await asyncio.to_thread(broker.start)
        await asyncio.to_thread(webhook.start)
        await asyncio.sleep(CALM_S)
        over.set()
        return waited

    async def pictures() -> AsyncIterator[Capture]:
        number, begin = 0, time.monotonic()
        while not over.is_set():
            yield Capture(photo(number % PICTURES), f"{number}")
            number += 1
            await asyncio.sleep(max(0.0, begin + number / options.fps - time.monotonic()))

    happening = asyncio.create_task(outage())
    answered: set[Frame] = set()
    failed = 0
    async with EdgeClient(
        address, cache_dir=folder / "cache", retries=-1, connect_timeout_s=2.0, client="camera-1"
    ) as client:
        async for answer in client.stream(pictures()):
            if isinstance(answer, Answer):
                answered.add((client.session_id, answer.seq))
            else:
                failed += 1
    waited = await happening
    drained = await until(lambda: not any(sink["queued"] for sink in sinks()), DRAIN_S)
    dropped = {sink["name"]: sum(sink["dropped"].values()) + sink["refused"] for sink in sinks()}
    for server in servers[-1:]:
        server.stop()
    found = {
        "mqtt": [document for topic, document, _ in subscriber.messages if topic.startswith("bitneck/")],
        "webhook": [json.loads(line) for line in webhook.file.read_text().splitlines()],
        "jsonl": [json.loads(line) for line in file.read_text().splitlines()],
    }
    return {
        "minutes": options.minutes,
        "frames": len(answered),
        "failed": failed,
        "drained": drained,
        "sinks": {
            name: {"waited": waited[name], **judge(documents, answered), "dropped": dropped[name]}
            for name, documents in found.items()
        },
    }


def main() -> None:
    """Run, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the outage")
    parser.add_argument("--fps", type=float, default=20.0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = asyncio.run(run(options, folder, stack))
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        columns = list(result["sinks"]["mqtt"])
        print(f"{result['frames']} frames were answered in and around {options.minutes:g} minutes without broker and "
              f"webhook; {result['failed']} failed")  # fmt: skip
        print("  ".join(f"{name:>10}" for name in ("sink", *columns)))
        for name, figures in result["sinks"].items():
            print("  ".join(f"{value:>10}" for value in (name, *(figures[column] for column in columns))))
    bad = ("missing", "renumbered", "disordered", "dropped")
    wrong = [name for name, figures in result["sinks"].items() if any(figures[key] for key in bad)]
    if wrong or not result["drained"] or result["failed"] or not result["frames"]:
        sys.exit(f"not as it should be: {', '.join(wrong) or 'see above'}")


if __name__ == "__main__":
    main()
