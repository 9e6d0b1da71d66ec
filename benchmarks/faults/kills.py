"""Send frames while the server is killed again and again, and count how often each was answered.

    python benchmarks/faults/kills.py --bundle build/efficientnet_lite0 [--frames 500] [--kills 50] [--json]

The server is a process of its own that gets SIGKILL at random moments and is started again on the same port, with the
same key for resume tokens. One edge client sends photographs without pause all the while. Ends with status 1 if a frame
was not answered, or answered twice, or with another answer than a server gives that nobody kills.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.photographs import photo
from bitneck_testing.processes import QUIET, Server, free_port, running_server, start_server

PICTURES = 8
UP_S = (0.1, 0.8)
"""Seconds for which a server runs before it is killed."""


async def killing(bundle: Path, address: str, options: tuple[str, ...], kills: int, dice: random.Random) -> Server:
    """Kill the server so many times, and start another one each time; the last one stays."""
    server = await asyncio.to_thread(start_server, bundle, options=options, grpc=address)
    for _ in range(kills):
        await asyncio.sleep(dice.uniform(*UP_S))
        server.kill()
        server.close()
        server = await asyncio.to_thread(start_server, bundle, options=options, grpc=address)
    return server


async def run(bundle: Path, frames: int, kills: int, seed: int) -> dict[str, Any]:
    """The figures of one run."""
    dice = random.Random(seed)  # noqa: S311  a run that can be repeated
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        config, cache = Path(folder) / "cloud.toml", Path(folder) / "cache"
        config.write_text('token_key = "the same key for each of them"\n')
        options = ("--config", str(config), *QUIET)
        values: dict[str, Any] = {"cache_dir": cache, "retries": -1, "connect_timeout_s": 2.0, "similar": "on"}
        with running_server(bundle, options=options, grpc=address):
            async with EdgeClient(address, **values) as client:
                right = {k: (await client.infer(photo(k))).labels[0].index for k in range(PICTURES)}
        killer = asyncio.create_task(killing(bundle, address, options, kills, dice))
        answered: Counter[str] = Counter()
        wrong = failed = 0
        begin = time.perf_counter()

        async def pictures() -> AsyncIterator[Capture]:
            """All the while servers are killed: the last picture is sent to the last server."""
            number = 0
            while number < frames or not killer.done():
                yield Capture(photo(number % PICTURES), f"{number}")
                number += 1
                if number >= frames:
                    await asyncio.sleep(0.1)
                else:
                    await asyncio.sleep(0.05)

        try:
            async with EdgeClient(address, **values) as client:
                async for result in client.stream(pictures()):
                    if isinstance(result, Answer):
                        answered[result.file] += 1
                        wrong += result.labels[0].index != right[int(result.file) % PICTURES]
                    else:
                        failed += 1
                reconnects = client.reconnects
        finally:
            server = await killer
            server.kill()
            server.close()
    twice = sum(count > 1 for count in answered.values())
    return {
        "frames": len(answered) + failed, "answered_once": sum(count == 1 for count in answered.values()),
        "answered_twice": twice, "failed": failed, "wrong": wrong, "kills": kills, "reconnects": reconnects,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=500, help="at least so many")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    plan = parser.parse_args()
    found = asyncio.run(run(plan.bundle, plan.frames, plan.kills, plan.seed))
    print(json.dumps(found) if plan.json else "\n".join(f"{name:15} {value}" for name, value in found.items()))
    if found["failed"] or found["answered_twice"] or found["wrong"] or found["frames"] < plan.frames:
        sys.exit(1)


if __name__ == "__main__":
    main()
