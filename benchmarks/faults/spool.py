"""Kill a device with a spool again and again; then an hour without a link, in shortened time.

    python benchmarks/faults/spool.py --bundle BUNDLE [--kills 100] [--frames 3600] [--fps 50] [--json]

Kills: no server is there, also when the device starts. It captures pictures and gets SIGKILL at a random moment, and
the next one goes on with its spool. Then a server starts, and a device sends what is there.

Hour: a device sends through a link that is cut. It captures `--frames` pictures whose times of capture are a second
apart, and is started again twice. Then the link is mended. A device with live pictures sends what is there, and the
server is killed and started again in the middle of it.

Ends with status 1 if a picture that was encoded a second before a kill has no answer, if one has two, or another time
of capture than its own. The second counts from the last moment in which the device's event loop ran, ten times a second
on a machine that lets it: `longest_standstill_s` says how long before a kill that was. Pictures that were captured that
long before a kill, and were not encoded, are counted too.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitneck_testing.devices.spooling import DeviceLog, device_command
from bitneck_testing.links import Proxy
from bitneck_testing.processes import QUIET, free_port, running_server, start_server

LOSS_S = 1.0
UP_S = (0.05, 2.5)
"""Seconds for which a device runs before it is killed."""
LIVE = 100
_KEY = 'token_key = "the same key for each of them"\n'


@dataclass
class _Kill:
    """What a kill may not have lost, which pictures it came too early for, and when the device ran last before it."""

    safe: set[int]
    late: set[int]
    standstill_s: float


def _killed_device(command: list[str], seconds: float, log: DeviceLog) -> _Kill:
    """Run a device for some seconds and kill it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        while '"ready"' not in (line := child.stdout.readline()):
            if not line:
                sys.exit("the device ended before it was ready")
        time.sleep(seconds)
        killed = time.time()
        child.kill()
        before = set(log.captured)
        log.read(child.stdout.read().splitlines())
    unencoded = set(log.captured) - before - set(log.encoded)
    late = {number for number in unencoded if log.captured[number] < log.alive - LOSS_S}
    return _Kill(log.encoded_before(LOSS_S) - before, late, max(0.0, killed - log.alive))


def _whole_device(command: list[str], log: DeviceLog, **options: Any) -> set[int]:
    """Run a device to its end; its pictures."""
    before = set(log.captured)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, **options)
    log.read(done.stdout.splitlines())
    return set(log.captured) - before


def _found(log: DeviceLog, safe: set[int], late: set[int] | None = None) -> dict[str, Any]:
    late = late or set()
    return {
        "captured": len(log.captured),
        "answered_once": sum(count == 1 for count in log.answers.values()),
        "answered_twice": sum(count > 1 for count in log.answers.values()),
        "from_the_spool": sum(count > 0 for count in log.spooled.values()),
        "lost_of_the_last_second": len(set(log.captured) - safe - set(log.answers) - late),
        "lost_not_encoded_in_a_second": len(late - set(log.answers)),
        "lost": len(safe - set(log.answers)),
        "wrong_times": log.wrong_times,
        "failed": len(log.failures),
        "damaged_places_at_the_last_start": log.counts.get("damaged", 0),
        "kept": log.counts.get("kept", 0),
    }


def kills(bundle: Path, folder: Path, count: int, fps: float, dice: random.Random) -> dict[str, Any]:
    """SIGKILL at random moments."""
    log, address, found = DeviceLog(), f"127.0.0.1:{free_port()}", list[_Kill]()
    with running_server(bundle, options=QUIET, grpc=address):
        safe = _whole_device(device_command(address, folder, "--count", 4), log)
    for turn in range(count):
        command = device_command(address, folder, "--first", 10_000 * (turn + 1), "--count", 10_000, "--fps", fps)
        found.append(_killed_device(command, dice.uniform(*UP_S), log))
    with running_server(bundle, options=QUIET, grpc=address):
        _whole_device(device_command(address, folder, "--wait"), log)
    safe |= set[int]().union(*(kill.safe for kill in found))
    late = set[int]().union(*(kill.late for kill in found))
    longest = max(kill.standstill_s for kill in found)
    return {"kills": count, "longest_standstill_s": round(longest, 2), **_found(log, safe, late)}


async def hour(bundle: Path, folder: Path, frames: int, fps: float) -> dict[str, Any]:
    """A cut link, two restarts of the device, one of the server."""
    log, address = DeviceLog(), f"127.0.0.1:{free_port()}"
    config = folder / "cloud.toml"
    config.write_text(_KEY)
    options = ("--config", str(config), *QUIET)
    server = await asyncio.to_thread(start_server, bundle, options=options, grpc=address)
    try:
        async with Proxy(server.grpc) as link:
            safe = await asyncio.to_thread(_whole_device, device_command(link.address, folder, "--count", 4), log)
            link.cut()
            third = frames // 3
            for turn in range(3):  # each ends with an unsent spool, and the next one goes on with it
                count = third if turn < 2 else frames - 2 * third
                command = device_command(
                    link.address, folder, "--first", 1000 + turn * third, "--count", count, "--fps", fps
                )
                safe |= await asyncio.to_thread(_whole_device, command, log)
            link.mend()
            begun = time.perf_counter()
            command = device_command(link.address, folder, "--first", 900_000, "--count", LIVE, "--fps", 5, "--wait")
            last = asyncio.create_task(asyncio.to_thread(_whole_device, command, log, timeout=3600))
            await asyncio.sleep(4.0)
            server.kill()
            server.close()
            server = await asyncio.to_thread(start_server, bundle, options=options, grpc=address)
            safe |= await last
            seconds = time.perf_counter() - begun
    finally:
        server.kill()
        server.close()
    return {"frames_spooled": frames, "live": LIVE, "seconds_until_all_were_answered": seconds, **_found(log, safe)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--frames", type=int, default=3600)
    parser.add_argument("--fps", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    plan = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        dice = random.Random(plan.seed)  # noqa: S311  a run that can be repeated
        if plan.kills:
            found["kills"] = kills(plan.bundle, Path(one), plan.kills, plan.fps, dice)
        if plan.frames:
            found["hour"] = asyncio.run(hour(plan.bundle, Path(two), plan.frames, plan.fps))
    if plan.json:
        print(json.dumps(found))
    else:
        for name, figures in found.items():
            print(name, *(f"  {what:32} {value}" for what, value in figures.items()), sep="\n")
    if any(f[what] for f in found.values() for what in ("lost", "answered_twice", "wrong_times", "failed", "kept")):
        sys.exit(1)


if __name__ == "__main__":
    main()
