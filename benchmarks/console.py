"""The console with many clients: its first view, its size, and whether it grows.

    python benchmarks/console.py --bundle build/efficientnet_lite0 [--clients 500] [--minutes 5] [--json]

A process of its own opens the sessions, and sends a frame of each every ten seconds. Chromium opens the page *Fleet*.
Prints:
- milliseconds from the navigation until all clients stand in the table, with an empty cache, the best of three;
- bytes that the page loaded, its documents of clients and sessions apart;
- JavaScript's memory and the number of nodes, garbage collected before: after a minute, and then after each tenth of
  the given minutes. Growth shows as numbers that go on rising.

It needs Chromium and its driver (Debian: chromium-driver).
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bitneck.bundle import Bundle
from bitneck_testing.consumers.browser import BROWSER, Browser, browser
from bitneck_testing.processes import QUIET, child_process, running_server
from bitneck_testing.streams import Frames, open_stream, sealed, stub

EVERY_S = 10.0
OF_A_CONNECTION = 16
SAMPLES = 10

_WHEN_COMPLETE = """
const [wanted, done] = arguments;
const rows = () => document.querySelectorAll("tbody tr").length;
const look = () => rows() >= wanted ? done(performance.now()) : setTimeout(look, 5);
look();
"""
_LOADED = """
return performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
  .map(entry => [new URL(entry.name).pathname, entry.transferSize]);
"""


async def send(address: str, root: Path, clients: int) -> None:
    """Open the sessions, say so on standard output, and send for ever."""
    frames = Frames(Bundle.open(root))
    point = next(iter(frames.bundle.manifest.ladder)).id
    payload = frames.payload(point, 0)
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for number in range(clients):
            if number % OF_A_CONNECTION == 0:
                cloud = await stack.enter_async_context(stub(address))
            streams.append(await open_stream(cloud, frames.bundle.bundle_id, client=f"camera-{number:04d}"))
        print("ready", flush=True)
        seq = 0
        while True:
            seq += 1
            for stream in streams:
                await stream.ask(sealed(seq=seq, point=point, payload=payload))
                await asyncio.sleep(EVERY_S / clients)


def heap(window: Browser) -> dict[str, float]:
    """MiB of JavaScript's heap, and DOM nodes, after collecting garbage."""
    driver: Any = window.driver
    driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    used = driver.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"]
    nodes = driver.execute_cdp_cmd("Memory.getDOMCounters", {})["nodes"]
    return {"heap_mib": used / 2**20, "nodes": nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-clients", help=argparse.SUPPRESS)
    plan = parser.parse_args()
    if plan.as_clients:
        asyncio.run(send(plan.as_clients, plan.bundle, plan.clients))
        return
    if None in BROWSER:
        parser.error("chromium and chromedriver are not installed (Debian: chromium-driver)")
    options = (*QUIET, "--max-sessions-per-caller", "0", "--max-calls-per-caller", "0")
    result: dict[str, Any] = {"clients": plan.clients, "minutes": plan.minutes}
    with running_server(plan.bundle, options=options) as server:
        command = [sys.executable, __file__, "--bundle", plan.bundle, "--clients", plan.clients,
                   "--as-clients", server.grpc]  # fmt: skip
        with child_process(command) as clients:
            assert clients.stdout is not None
            assert clients.stdout.readline() == "ready\n"
            first = []
            for _ in range(3):
                with browser() as window:
                    window.open(f"{server.http}/console/#fleet")
                    first.append(window.driver.execute_async_script(_WHEN_COMPLETE, plan.clients))  # type: ignore[no-untyped-call]
                    loaded = window.run(_LOADED)
            result["first_view_ms"] = min(first)
            result["page_bytes"] = sum(size for path, size in loaded if path.startswith("/console"))
            result["documents_bytes"] = max(size for path, size in loaded if path.startswith("/v1/"))
            with browser() as window:
                window.open(f"{server.http}/console/#fleet")
                time.sleep(60)
                result["memory"] = [heap(window)]
                for _ in range(SAMPLES):
                    time.sleep(60 * plan.minutes / SAMPLES)
                    result["memory"].append(heap(window))
    if plan.json:
        print(json.dumps(result))
        return
    print(f"{plan.clients} clients: first view after {result['first_view_ms']:.0f} ms")
    print(
        f"the page: {result['page_bytes'] / 1e3:.0f} kB; its largest document {result['documents_bytes'] / 1e3:.0f} kB"
    )
    for number, sample in enumerate(result["memory"]):
        minutes = 1 + number * plan.minutes / SAMPLES
        print(f"after {minutes:5.1f} minutes: {sample['heap_mib']:.2f} MiB, {sample['nodes']:.0f} nodes")


if __name__ == "__main__":
    main()
