"""A device with a spool, as a process that a test may kill at any moment.

    python -m bitneck_testing.devices.spooling HOST:PORT FOLDER --first 100 --count 3600 --fps 50

It captures pictures number 100, 101, ..., each with the time of capture `captured_us(number)`, and sends them through a
client with the spool FOLDER/spool and the cache FOLDER/cache. For each picture that it has captured, for each that it
has encoded, and for each answer, it prints a line of JSON; and one ten times a second, if its threads run. It ends
when all pictures are sent and the spool is empty or no server answers; with `--wait` it waits for the server.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.session import EdgeSession, Encoding
from bitneck_edge.sources.capture import Capture
from bitneck_testing.photographs import photo

__all__ = ["DeviceLog", "captured_us", "device_command"]

PICTURES = 8
_FIRST_US = 1_790_000_000_000_000
"""When the first picture was captured, microseconds since 1970."""
_POLL_S = 0.05
_ALIVE_S = 0.1


def captured_us(number: int) -> int:
    """When a picture was captured: one each second."""
    return _FIRST_US + number * 1_000_000


def device_command(server: str, folder: Path, *options: object) -> list[str]:
    """The command line of a device."""
    command = [sys.executable, "-m", "bitneck_testing.devices.spooling", server, folder, *options]
    return [str(part) for part in command]


@dataclass
class DeviceLog:
    """What devices have printed.

    Attributes:
        captured: when each picture was captured by the clock, seconds since 1970.
        encoded: when the client had the encoded frame of each picture, likewise.
        answers: how many answers each picture had.
        spooled: those of them that came from the spool.
        alive: when the event loop ran last before the thread of the spool's files did, seconds since 1970.
        wrong_times: answers with another time of capture than the picture's.
        failures: what was no answer.
    """

    captured: dict[int, float] = field(default_factory=dict)
    encoded: dict[int, float] = field(default_factory=dict)
    answers: Counter[int] = field(default_factory=Counter)
    spooled: Counter[int] = field(default_factory=Counter)
    alive: float = 0.0
    wrong_times: int = 0
    failures: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def encoded_before(self, seconds: float) -> set[int]:
        """The pictures that were encoded so long before the device's event loop and its spool's thread ran last.

        A machine that is so busy that a device that is ready to run does not run keeps it from writing, too.
        """
        return {number for number, at in self.encoded.items() if at < self.alive - seconds}

    def read(self, lines: Iterable[str]) -> None:
        """Read a device's lines; the last one may be cut off."""
        for line in lines:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if "captured" in said:
                self.captured[said["captured"]] = said["at"]
            elif "encoded" in said:
                self.encoded[said["encoded"]] = said["at"]
            elif "alive" in said:
                self.alive = said["alive"]
            elif "answered" in said:
                self.answers[said["answered"]] += 1
                self.spooled[said["answered"]] += said["spooled"]
                self.wrong_times += said["spooled"] and said["captured_us"] != captured_us(said["answered"])
            elif "failed" in said:
                self.failures.append(said["failed"])
            elif "counts" in said:
                self.counts = said["counts"]


def _say(**said: Any) -> None:
    print(json.dumps(said), flush=True)  # noqa: T201


def _tell(result: Answer | Failure) -> None:
    if isinstance(result, Failure):
        _say(failed=f"{result.file}: {result.error}")
        return
    number = int(result.file.partition("#")[2])
    _say(answered=number, spooled=bool(result.spool), captured_us=result.captured_unix_us, seq=result.seq)


def _tell_encoded() -> None:
    """From now on each session of this process says when it has the encoded frame of a picture."""
    begin = EdgeSession.begin

    def told(session: EdgeSession, capture: Capture, interval_s: float) -> Encoding:
        encoding = begin(session, capture, interval_s)
        number = int(capture.name.partition("#")[2])
        encoding.photo.add_done_callback(lambda _photo: _say(encoded=number, at=time.time()))
        return encoding

    setattr(EdgeSession, "begin", told)  # noqa: B010  its `self` has another name here


async def _live(client: EdgeClient) -> None:
    while True:
        if client._spooling is not None:
            ran = time.time()  # what was due by then is with the thread, and in front of this
            await client._spooling._files.run(lambda: None)
            _say(alive=ran)
        await asyncio.sleep(_ALIVE_S)


async def _device(plan: argparse.Namespace) -> None:
    async def pictures() -> AsyncIterator[Capture]:
        for number in range(plan.first, plan.first + plan.count):
            _say(captured=number, at=time.time())
            yield Capture(photo(number % PICTURES), f"camera#{number}", unix_us=captured_us(number))
            await asyncio.sleep(1 / plan.fps)

    _tell_encoded()
    client = EdgeClient(
        plan.server, spool=plan.folder / "spool", cache_dir=plan.folder / "cache", threads=1,
        connect_timeout_s=plan.connect_timeout,
        spool_age=1e5, on_spooled=_tell, similar="off",
    )  # fmt: skip
    async with client:
        _say(ready=True)
        living = asyncio.create_task(_live(client))
        async for result in client.stream(pictures(), ordered=False):
            _tell(result)
        while plan.wait and client.spool is not None and client.spool.kept:  # noqa: ASYNC110  many things change it
            await asyncio.sleep(_POLL_S)
        await client.drain(asyncio.Event())
        living.cancel()
    counts = client.spool
    assert counts is not None
    _say(counts={"kept": counts.kept, "dropped": counts.dropped, "damaged": counts.damaged})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--fps", type=float, default=50.0)
    parser.add_argument("--connect-timeout", type=float, default=1.0)
    parser.add_argument("--wait", action="store_true")
    asyncio.run(_device(parser.parse_args()))


if __name__ == "__main__":
    main()
