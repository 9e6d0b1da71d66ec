"""``bitneck-edge doctor``: one report of what may keep a device from working, with what to do."""

import asyncio
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bitneck.settings.flags import with_settings
from bitneck_edge.cli.options import CLIENT, Json
from bitneck_edge.doctor.finding import Finding
from bitneck_edge.settings import EdgeSettings

__all__ = ["doctor", "examine", "report_lines"]

_COLUMNS, _STATE, _CHECK = 80, 9, 13
_FIRST = " " * (_STATE + _CHECK)


@with_settings(EdgeSettings, *CLIENT)
def doctor(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Cameras, videos, photographs or folders of them, to take a picture of.",
            metavar="[PHOTO|FOLDER|VIDEO|camera:N ...]",
            show_default=False,
        ),
    ] = None,
    *,
    settings: EdgeSettings,
    watch: Annotated[list[Path] | None, typer.Option(help="A folder that `run` is to watch.", metavar="FOLDER")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder that `run` is to write class maps into.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check everything between a picture and the server, and say what to do. Exit status 1 if something failed.

    It takes all flags and sources of `run`: put `doctor` in its place.
    """
    findings = asyncio.run(examine(settings, sources or (), watch or (), out))
    failed = [finding for finding in findings if finding.state == "failed"]
    if as_json:
        document = {
            "server": settings.server,
            "ok": not failed,
            "checks": [asdict(finding) for finding in findings],
        }
        print(json.dumps(document))  # noqa: T201
    else:
        print("\n".join(report_lines(findings)))  # noqa: T201
    sys.exit(1 if failed else 0)


async def examine(
    settings: EdgeSettings, sources: Sequence[str], watch: Sequence[Path] = (), out: Path | None = None
) -> list[Finding]:
    """Check the way to the server, this device, and some sources.

    Args:
        settings: of the client.
        sources: as `run` takes them; each is asked for a picture.
        watch: folders that are to be watched.
        out: folder for class maps; None if there is none.
    """
    from bitneck_edge.doctor.device import check_device
    from bitneck_edge.doctor.disks import in_time
    from bitneck_edge.doctor.network import check_network
    from bitneck_edge.doctor.sources import check_out, check_sources, check_watches
    from bitneck_edge.doctor.spool import check_spool

    network, offer = await check_network(settings)
    device = await in_time("cache", "the cache", check_device, settings, offer)
    spool = await in_time("spool", f"{settings.spool}", check_spool, settings)
    watches = await in_time("watch", ", ".join(map(str, watch)), check_watches, watch)
    maps = await in_time("out", f"{out}", check_out, out)
    return [*network, *device, *spool, *await check_sources(sources), *watches, *maps]


def report_lines(findings: Sequence[Finding]) -> list[str]:
    """The report for people, within 80 columns but for words that are longer."""
    lines = []
    for finding in findings:
        start = f"{finding.state:<{_STATE}}{finding.check:<{_CHECK}}"
        lines += _wrapped(finding.found, start)
        if finding.advice:
            lines += _wrapped(f"-> {finding.advice}", _FIRST)
    failed = sum(finding.state == "failed" for finding in findings)
    lines.append(f"{failed} of {len(findings)} checks failed" if failed else "nothing keeps this device from working")
    return lines


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=start, subsequent_indent=_FIRST, break_long_words=False, break_on_hyphens=False
    )
