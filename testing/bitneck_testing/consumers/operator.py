"""An operator: calls of the control API, and canaries of the tests' model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from bitneck_testing.processes import Server, running_server

__all__ = ["CANARY", "MARK", "begin", "call", "serving"]

MARK = {"X-Bitneck-Request": "1"}
CANARY = "/v1/models/tiny/canary"
_LIMIT_S = 60.0


@contextlib.contextmanager
def serving(folder: Path, candidates: Path, *options: object, **more: Any) -> Iterator[Server]:
    """A server of a bundle's folder with a folder of candidates."""
    flags = ("--candidates", candidates, *options)
    with running_server(folder, options=[str(flag) for flag in flags], **more) as server:
        yield server


async def call(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What a call gives that must succeed."""
    async with httpx.AsyncClient(base_url=server.http, headers=MARK, timeout=_LIMIT_S) as http:
        answer = await http.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def begin(server: Server, clients: str = "cam-*", bundle: str = "new") -> dict[str, Any]:
    """Begin a canary."""
    begun: dict[str, Any] = await call(server, "POST", CANARY, {"bundle": bundle, "clients": clients})
    return begun
