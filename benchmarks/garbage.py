"""How long Python's searches for unreachable objects hold a server's frames up, with bitneck's setting and Python's.

    python benchmarks/garbage.py --bundle build/efficientnet_lite0 [--rounds 6] [--seconds 10] [--fps 300]
        [--failing FRAMES] [--json]

Two servers run side by side, one with the product's setting, one with Python's. They are loaded by turns with random
moments, each round with new sessions. For each: how often Python looked, the milliseconds of that together and at most,
and the objects that it freed. With --failing FRAMES, single frames that fail (`Infer`) come before that, each with a
payload of 200 kB: what they leave waits to be found. `mib` is the server's memory after these.
Searches in that time and at the server's end count too.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from bitneck.bundle import Bundle
from bitneck.v2 import inference_pb2 as pb
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import BIN, QUIET, Server, run_json, running_server
from bitneck_testing.streams import sealed, stub

POINT, CLIENTS, PAYLOAD_BYTES = "s1-r3", 8, 200_000
PROGRAM = """#!{python}
import atexit, gc, json, sys, time

found, began = [], [0.0]

def noted(phase, info):
    if phase == "start":
        began[0] = time.perf_counter()
    else:
        found.append((1e3 * (time.perf_counter() - began[0]), info["collected"]))

def frozen():
    freeze()
    gc.callbacks.append(noted)  # from here on frames come

freeze, gc.freeze = gc.freeze, frozen
if {pythons}:
    gc.set_threshold = lambda *_: None
atexit.register(lambda: open({out!r}, "w").write(json.dumps(found)))

from bitneck.commands import cloud

sys.exit(cloud())
"""
"""A server that notes when Python looks for unreachable objects."""


def program(folder: Path, name: str, *, pythons: bool) -> Path:
    """The command of a server; it writes what it noted beside itself."""
    path = folder / name
    path.write_text(PROGRAM.format(python=sys.executable, pythons=pythons, out=str(folder / f"{name}.json")))
    path.chmod(0o755)
    return path


async def fail(server: Server, bundle_id: str, count: int) -> None:
    """Frames that are too long."""
    frame = sealed(seq=1, point=POINT, payload=bytes(PAYLOAD_BYTES))
    async with stub(server.grpc) as calls:
        for _ in range(count):
            try:
                await calls.Infer(pb.InferRequest(bundle_id=bundle_id, frame=frame))
            except grpc.aio.AioRpcError as exc:
                if exc.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
            else:
                raise SystemExit("a frame that is too long was answered")


def load(server: Server, folder: Path, options: argparse.Namespace, seed: int) -> int:
    """One round; its frames."""
    document = run_json(
        [BIN / "bitneck-edge", "load", sample_photo(), "--server", server.grpc, "--cache-dir", folder / "cache",
         "--clients", CLIENTS, "--seconds", options.seconds, "--fps", options.fps / CLIENTS, "--point", POINT,
         "--seed", seed, "--json"]
    )  # fmt: skip
    if document["failed"]:
        raise SystemExit(f"{document['failed']} frames failed: {document['failures']}")
    return int(document["frames"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--fps", type=float, default=300.0, help="frames a second, of all clients together")
    parser.add_argument("--failing", type=int, default=0, metavar="FRAMES")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ExitStack() as stack:
            servers = {
                label: stack.enter_context(
                    running_server(options.bundle, options=QUIET, program=program(folder, label, pythons=pythons))
                )
                for label, pythons in (("python", True), ("bitneck", False))
            }
            for label, server in servers.items():
                asyncio.run(fail(server, Bundle.open(options.bundle).bundle_id, options.failing))
                figures[label] = {"mib": round(server.resident_mib), "frames": 0}
            for seed in range(options.rounds):
                for label in list(servers)[:: -1 if seed % 2 else 1]:
                    figures[label]["frames"] += load(servers[label], folder, options, seed)
        for label, figure in figures.items():
            found = json.loads((folder / f"{label}.json").read_text())
            times_ms = [ms for ms, _ in found]
            figure |= {
                "looked": len(found),
                "together_ms": round(sum(times_ms), 1),
                "longest_ms": round(max(times_ms, default=0.0), 1),
                "freed": sum(count for _, count in found),
            }
    if options.json:
        print(json.dumps(figures))
    for label, figure in () if options.json else figures.items():
        print(f"{label}: {figure}")


if __name__ == "__main__":
    main()
