"""What a client tells of itself while it is open, as its settings ask: a page of metrics, reports to the server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from bitneck.wire.messages import Device
from bitneck_edge.observe.state import ClientState, Report

__all__ = ["metrics_page", "reports"]


@contextlib.asynccontextmanager
async def metrics_page(address: str, state: Callable[[], ClientState]) -> AsyncIterator[None]:
    """Serve metrics for Prometheus for the length of a block; with an empty address nothing happens.

    Raises:
        InvalidConfig: nothing can listen there.
    """
    if not address:
        yield
        return
    from bitneck_edge.observe.http import serve_page
    from bitneck_edge.observe.metrics import Exposition

    async with serve_page(address, Exposition(state).render):
        yield


@contextlib.asynccontextmanager
async def reports(
    every_s: float, state: Callable[[], ClientState], send: Callable[[Device], Awaitable[None]]
) -> AsyncIterator[None]:
    """Send the server how the device is, at once and then at intervals, for the length of a block.

    Args:
        every_s: between two reports; 0 sends none.
        state: of the client.
        send: sends a report, if a connection is up.
    """
    if not every_s:
        yield
        return
    report = Report()

    async def run() -> None:
        while True:
            await send(report.device(state()))
            await asyncio.sleep(every_s)

    task = asyncio.create_task(run(), name="bitneck-reports")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
