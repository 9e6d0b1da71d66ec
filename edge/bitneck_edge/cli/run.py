"""``bitneck-edge run``: the pictures of some sources to the cloud, the answers to the terminal and into files."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bitneck.disk_thread import DiskThread
from bitneck.errors import CallerError, InvalidConfig
from bitneck.manifest import InputSpec
from bitneck.settings.program import END_S
from bitneck.text_tables import print_table, write_rows
from bitneck.wire.messages import Answers
from bitneck_edge.answers.maps import MapWriter
from bitneck_edge.answers.results import Answer, Failure, Switch
from bitneck_edge.cli.fetch_lines import FetchLines
from bitneck_edge.cli.report import CSV_NAMES, RunSummary, csv_row, line, run_document, run_table, spool_line
from bitneck_edge.client import EdgeClient
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.sources.capture import Ahead, Capture
from bitneck_edge.sources.parse import Source
from bitneck_edge.sources.read import begun_watches, read_sources

__all__ = ["RunPlan", "run_plan"]

_SWITCH_LOG = logging.getLogger("bitneck_edge.points")

_AHEAD = 4
"""Pictures of a camera that are kept until the client is open: the newest ones."""
_PREPARE_S = 30.0
_LAST_ANSWERS_S = 2.0
"""How long to wait, after a signal, for the answers of frames that are under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What ``bitneck-edge run`` does, beside the settings of the client.

    Attributes:
        sources: of the pictures.
        repeat: how often to go through them.
        fps: at most this many pictures a second; None for no limit.
        newest: send the newest picture first, and drop those that it overtook.
        ordered: print answers in the order of the pictures; else as they come.
        out: folder for class maps; None to write none.
        output: what to print.
    """

    sources: Sequence[Source]
    repeat: int
    fps: float | None
    newest: bool
    ordered: bool
    out: Path | None
    output: Literal["json", "lines", "csv", "verbose", "table"]

    @property
    def total(self) -> int | None:
        """The number of photographs; None if it is unknown."""
        countable = all(source.photos for source in self.sources)
        return sum(len(source.photos) for source in self.sources) * self.repeat if countable else None


async def run_plan(settings: EdgeSettings, plan: RunPlan) -> int:
    """Send the pictures of the sources, and print what comes back.

    Args:
        settings: of the client.
        plan: everything else.

    Returns:
        The exit code; after a signal, 128 plus its number.

    Raises:
        InvalidConfig: the plan has a folder for class maps, and the model gives none.
        BitneckError: the session cannot be opened.
    """
    stop = asyncio.Event()
    received: list[int] = []
    _stop_on_signals(stop, received)
    errors = Console(stderr=True)
    results: list[Answer | Failure] = []
    summary = RunSummary()

    def on_switch(switch: Switch) -> None:
        if plan.output == "verbose" and not _SWITCH_LOG.isEnabledFor(logging.INFO):  # else the log says it
            print(f"       {switch.old} -> {switch.new}: {switch.reason}", flush=True)  # noqa: T201

    def take(result: Answer | Failure) -> None:
        summary.add(result)
        if plan.output in ("json", "table"):
            results.append(result.without_map() if isinstance(result, Answer) else result)
        if isinstance(result, Failure):
            if not summary.lost:  # one line for a lost server, not one for each picture that is left
                errors.print(f"error: {_about(result)}", style="red", markup=False, highlight=False, soft_wrap=True)
            if client.failure is not None:
                summary.lost += 1
        elif plan.output == "verbose":
            print(line(result), flush=True)  # noqa: T201
        if plan.output == "lines":
            if isinstance(result, Failure):
                document = {"file": result.file, "error": str(result.error)}
            else:
                document = result.to_dict()
            print(json.dumps(document), flush=True)  # noqa: T201
        elif plan.output == "csv":
            write_rows([csv_row(result)], CSV_NAMES, header=False)

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=errors, transient=True, disable=not errors.is_terminal or plan.output == "verbose",
    ) as progress:  # fmt: skip
        fetching = progress.add_task("fetching the bundle (bytes)", total=None, visible=False)

        lines = FetchLines(lambda text: errors.print(text, markup=False, highlight=False, soft_wrap=True))

        def on_fetch(done: int, size: int) -> None:
            if progress.disable:
                lines(done, size)
            progress.update(fetching, completed=done, total=size, visible=done < size)

        writer = MapWriter(plan.out) if plan.out is not None else None
        finish = writer.write if writer is not None else None
        client = EdgeClient(settings=settings, on_fetch=on_fetch, on_switch=on_switch, finish=finish, on_spooled=take)
        async with contextlib.AsyncExitStack() as stack:
            source = await _begun(stack, client, plan, settings)
            if not await _opened(client, stack, stop):
                errors.print("stopped before the session was open", highlight=False)
                return 128 + received[0]
            summary.begin()
            if plan.output == "csv":
                write_rows((), CSV_NAMES)
            if writer is not None:
                _check_writes_maps(client)
                await _prepared(writer)
            closing = asyncio.create_task(_close_after(client, stop))
            stack.callback(closing.cancel)
            sending = progress.add_task("photographs", total=plan.total, visible=(plan.total or 0) > 20)
            # Pictures that are overtaken are never written, so they get no name beforehand.
            reserve = writer.reserve if writer is not None and not plan.newest else None
            pictures = _pictures(client, plan, source, stop, reserve)
            try:
                async for result in client.stream(pictures, stop=stop, ordered=plan.ordered, newest_first=plan.newest):
                    take(result)
                    progress.update(sending, completed=summary.answers + summary.failures)
            except CallerError as exc:  # a source failed: the answers so far count
                take(Failure(_first(plan.sources), exc))
            await client.drain(stop)
            totals = summary.to_dict(client)
            document = run_document(client, results, summary)
            told = summary.line(client)
    if summary.lost:
        errors.print(
            f"error: {summary.lost} photographs have no answer, because the server was lost; run it again for these, "
            "or give --retries -1 to wait for the server however long it takes",
            style="red", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    if plan.output == "json":
        print(json.dumps(document), flush=True)  # noqa: T201
    elif plan.output == "lines":
        print(json.dumps({"summary": totals}), flush=True)  # noqa: T201
    elif plan.output == "table" and results:
        print_table(run_table(results))
    if client.spool is not None and (text := spool_line(client.spool)):
        errors.print(text, markup=False, highlight=False, soft_wrap=True)
    errors.print(told, markup=False, highlight=False, soft_wrap=True)
    return 128 + received[0] if received else summary.exit_code


def _check_writes_maps(client: EdgeClient) -> None:
    manifest = client.bundle.manifest
    if not Answers(client.settings.answers).has_map:
        raise InvalidConfig(f"--out needs class maps, and --answers {client.settings.answers} brings none")
    if manifest.task != "segmentation":
        raise InvalidConfig(f"--out is for class maps; {manifest.name} is for {manifest.task}, leave it out")


async def _prepared(writer: MapWriter) -> None:
    disk = DiskThread("bitneck-out")
    try:
        await disk.within(_PREPARE_S, writer.prepare)
    except TimeoutError as exc:
        raise InvalidConfig(
            f"--out {writer.folder}: its disk has not answered for {_PREPARE_S:.0f} s; choose another folder"
        ) from exc
    finally:
        disk.end()


def _first(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources if not source.photos) or sources[0].name


def _about(failure: Failure) -> str:
    """The message, with the photograph's name if the message does not have it."""
    text = str(failure.error)
    return text if failure.file in text else f"{failure.file}: {text}"


async def _opened(client: EdgeClient, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> bool:
    """Open the client's session; False if `stop` is set before it is open."""
    opening = asyncio.create_task(stack.enter_async_context(client))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            return True
        return False
    finally:
        opening.cancel()
        stopping.cancel()
        await asyncio.gather(opening, stopping, return_exceptions=True)


async def _close_after(client: EdgeClient, stop: asyncio.Event) -> None:
    """Close the client a few seconds after `stop` is set; frames that have no answer by then fail."""
    await stop.wait()
    await asyncio.sleep(_LAST_ANSWERS_S)
    await client.close()


def _stop_on_signals(stop: asyncio.Event, received: list[int]) -> None:
    """The first signal ends the sending, the second one the program."""
    loop = asyncio.get_running_loop()

    def handle(signum: int) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        stop.set()
        last = threading.Timer(END_S, os._exit, (128 + signum,))
        last.daemon = True
        last.start()

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, handle, signum)


async def _begun(
    stack: contextlib.AsyncExitStack, client: EdgeClient, plan: RunPlan, settings: EdgeSettings
) -> AsyncGenerator[Capture]:
    """The pictures of the plan, at their pace, unless the client has failed. The client is not open yet.

    Files wait until they are read. Folders are watched from now on. With a spool, which makes the client wait for its
    first bundle, a camera or stream is read from now on, too.
    """

    def spec() -> InputSpec | None:
        """What pictures of videos need not be finer than, once that is known."""
        return client.bundle.manifest.input if client.opened and plan.out is None and not settings.exact else None

    def drop(_capture: Capture) -> None:
        client.dropped += 1

    pictures = read_sources(
        plan.sources, repeat=plan.repeat, fps=plan.fps, retries=settings.retries,
        hurry=lambda: client.failure is not None, spec=spec,
        watches=await stack.enter_async_context(begun_watches(plan.sources)),
    )  # fmt: skip
    if settings.spool is None or not plan.sources[0].live:
        return pictures
    ahead = Ahead(pictures, _AHEAD, drop)
    stack.push_async_callback(ahead.close)
    return ahead.pictures()


async def _pictures(
    client: EdgeClient,
    plan: RunPlan,
    pictures: AsyncGenerator[Capture],
    stop: asyncio.Event,
    announce: Callable[[str], None] | None,
) -> AsyncGenerator[Capture]:
    """The pictures of the plan until `stop` is set. `announce` learns the name of each picture, in order."""
    stopping = asyncio.create_task(stop.wait())
    try:
        while True:
            following = asyncio.ensure_future(anext(pictures, None))
            await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                return
            picture = following.result()
            if picture is None or stop.is_set():
                return
            if announce is not None:
                announce(picture.name)
            yield picture
            if client.failure is not None and any(not source.photos for source in plan.sources):
                return  # an endless source would give failures without end
    finally:
        stopping.cancel()
        with contextlib.suppress(RuntimeError):
            await pictures.aclose()
