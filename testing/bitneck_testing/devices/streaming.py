"""Devices that send without a pause while something is changed on the server, and all answers that it has given."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from bitneck_edge.answers.results import Answer, Failure
from bitneck_edge.client import EdgeClient
from bitneck_edge.sources.capture import Capture
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server
from bitneck_testing.streams import edge_client

__all__ = ["PHOTOS", "Device", "documents", "until"]

PHOTOS = 4
"""Different pictures that a device sends, one after the other."""
_LIMIT_S = 60.0
_PAUSE_S = 0.002


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, at most a minute."""
    async with asyncio.timeout(_LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def documents(server: Server, number: int) -> list[dict[str, Any]]:
    """All answers that the server has given since its start, which must be so many, or more."""
    found: list[dict[str, Any]] = []
    async with (
        asyncio.timeout(_LIMIT_S),
        httpx.AsyncClient(base_url=server.http) as http,
        http.stream("GET", "/v1/answers", params={"after": "0"}) as events,
    ):
        async for line in events.aiter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) >= number and line == "":
                return found
    raise AssertionError("the stream of answers ended")


class Device:
    """A client that sends picture after picture until it is stopped, each with a time of capture of its own.

    Attributes:
        client: the client.
        results: what it has got so far.
        taken: pictures that were taken.
    """

    def __init__(self, client: EdgeClient) -> None:
        self.client = client
        self.results: list[Answer | Failure] = []
        self.taken = 0
        self._stop = asyncio.Event()

    @property
    def bundle_id(self) -> str:
        """Of the bundle that it uses."""
        return self.client.bundle.bundle_id

    async def _pictures(self) -> AsyncIterator[Capture]:
        while not self._stop.is_set():
            yield Capture(photo(self.taken % PHOTOS), str(self.taken), unix_us=1 + self.taken)
            self.taken += 1
            await asyncio.sleep(_PAUSE_S)

    @classmethod
    @contextlib.asynccontextmanager
    async def sending(cls, address: str, folder: Path, name: str, **values: Any) -> "AsyncIterator[Device]":
        """A device for the length of a block; at its end, all that it has taken is answered."""
        async with edge_client(address, folder / name, client=name, **values) as client:
            device = cls(client)

            async def send() -> None:
                async for result in client.stream(device._pictures()):
                    device.results.append(result)

            task = asyncio.create_task(send())
            try:
                await until(lambda: len(device.results) > 10 or task.done())
                yield device
            finally:
                device._stop.set()
                await asyncio.wait_for(task, _LIMIT_S)

    async def has(self, bundle_id: str) -> None:
        """Wait until it uses a bundle and has had some answers with it."""
        await until(lambda: self.bundle_id == bundle_id)
        count = len(self.results)
        await until(lambda: len(self.results) > count + 40)
