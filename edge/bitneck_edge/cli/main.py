"""The command line ``bitneck-edge``."""

import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bitneck.bundle import Bundle
from bitneck.errors import InvalidConfig
from bitneck.image import find_photos
from bitneck.settings.flags import with_settings
from bitneck.settings.program import END_S, make_app, run_app
from bitneck.wire.frames import crc32c_hex, seal_frame
from bitneck_edge.cli.doctor import doctor
from bitneck_edge.cli.options import ACCESS, CLIENT, Csv, Json, accepting
from bitneck_edge.link.wire import frame_bytes
from bitneck_edge.settings import AUTO, EdgeSettings

__all__ = ["app", "main"]

_MAX_LOAD_PHOTOS = 64
"""Photographs that `load` encodes beforehand; more would tell nothing new about a server."""

app = make_app("Run the first part of a split network here, send a few hundred bytes, get the answer.")


@app.command()
@with_settings(EdgeSettings, *CLIENT)
def run(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Photographs, folders of them, video files, URLs of video streams, camera:N, or - for paths on "
            "standard input.",
            metavar="[PHOTO|FOLDER|VIDEO|camera:N|- ...]",
            show_default=False,
        ),
    ] = None,
    *,
    settings: EdgeSettings,
    origins: dict[str, str],
    watch: Annotated[
        list[Path] | None,
        typer.Option(
            help="After the sources: send each photograph that appears in this folder, when it is complete.",
            metavar="FOLDER",
        ),
    ] = None,
    existing: Annotated[
        bool, typer.Option("--existing", help="With --watch: begin with what is in the folder, the oldest first.")
    ] = False,
    poll: Annotated[
        bool,
        typer.Option("--poll", help="With --watch: list the folder each second. \\[default: on network filesystems]"),
    ] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Send the photographs this many times.")] = 1,
    fps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Send at most this many frames a second; a video then plays in time."),
    ] = None,
    newest: Annotated[
        bool | None,
        typer.Option("--newest/--every", help="Drop pictures that newer ones overtake.  \\[default: cameras and URLs]"),
    ] = None,
    as_they_come: Annotated[
        bool, typer.Option("--as-they-come", help="Answers as they come, not in the order of the pictures.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Segmentation: write each class map and an overlay into this folder.", metavar="DIR"),
    ] = None,
    as_json: Json = False,
    json_lines: Annotated[
        bool,
        typer.Option("--json-lines", help="Print a line of JSON for each answer, and the summary as the last one."),
    ] = False,
    as_csv: Csv = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for each answer as it comes.")] = False,
) -> None:
    """Send pictures through the split network and print the answers."""
    from bitneck_edge.cli.log import log_to_stderr
    from bitneck_edge.cli.run import RunPlan, run_plan
    from bitneck_edge.sources.parse import parse_sources
    from bitneck_edge.sources.watch import Watch

    log_to_stderr("INFO" if verbose else "WARNING")
    settings.log_foreign_variables()
    for name in ("latency_ms", "max_edge_ms"):
        if name in origins and settings.point != AUTO:
            logging.warning("%s has no effect without --point auto", origins[name])
    if (existing or poll) and not watch:
        raise InvalidConfig("--existing and --poll say how a folder is watched: name it with --watch")
    parsed = parse_sources(sources or (), watch or (), Watch(existing=existing, poll=poll))
    if settings.similar == "auto" and not any(source.video for source in parsed):
        settings = settings.model_copy(update={"similar": "off"})  # the server need not keep anything for us
    live = any(source.live for source in parsed)
    endless = any(source.endless for source in parsed)
    if as_json + json_lines + as_csv > 1:
        raise InvalidConfig(
            "--json prints one document at the end, --json-lines and --csv a line for each picture: give one"
        )
    if as_json and endless:
        raise InvalidConfig("--json prints one document at the end; for pictures without an end use --json-lines")
    plan = RunPlan(
        sources=parsed,
        repeat=repeat,
        fps=fps,
        newest=live if newest is None else newest,
        ordered=not as_they_come,
        out=out,
        output="json"
        if as_json
        else "lines"
        if json_lines
        else "csv"
        if as_csv
        else "verbose"
        if verbose or endless
        else "table",
    )
    sys.exit(asyncio.run(run_plan(settings, plan)))


app.command()(accepting(run)(doctor))


@app.command()
@with_settings(EdgeSettings, "bundle", *ACCESS, "point", "precision")
def encode(
    photo: Annotated[Path, typer.Argument(help="A photograph.")],
    *,
    settings: EdgeSettings,
    origins: dict[str, str],
    out: Annotated[Path, typer.Option(help="Write the frame here.")],
    symbols: Annotated[Path | None, typer.Option(help="Write the symbols here, as .npy.")] = None,
    as_json: Json = False,
) -> None:
    """Encode one photograph to a file: the edge's half, without a stream. `bitneck-cloud decode` reads it."""
    from bitneck_edge.encoder import EdgeEncoder

    opened = _opened(settings, origins)
    encoder = EdgeEncoder(opened)
    if settings.point == AUTO:
        raise InvalidConfig(f"{origins.get('point', 'point')}: 'auto' needs a link to measure; name an operating point")
    chosen = settings.point or encoder.ladder.best.id
    result = encoder.encode(photo, chosen)
    frame = seal_frame(seq=1, point=chosen, payload=result.encoded.payload)
    try:
        out.write_bytes(frame_bytes(frame))
        if symbols is not None:
            with symbols.open("wb") as file:
                np.save(file, result.encoded.symbols)
    except OSError as exc:
        raise InvalidConfig(f"{exc.filename}: cannot write it ({exc.strerror})") from exc
    document = {
        "file": str(photo),
        "out": str(out),
        "bundle_id": opened.bundle_id,
        "point": chosen,
        "split": result.split,
        "payload_bytes": len(result.encoded.payload),
        "bpp_payload": len(result.encoded.payload) * 8 / opened.manifest.input.pixels,
        "ideal_bytes": encoder.point_encoder(chosen).codec.ideal_bits(result.encoded.symbols) / 8,
        "payload_crc32c": crc32c_hex(result.encoded.payload),
        "symbols_crc32c": crc32c_hex(result.encoded.symbols.astype("<i4").tobytes()),
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(f"{out}: {chosen}, {document['payload_bytes']} bytes, {document['bpp_payload']:.4f} bpp")  # noqa: T201


@app.command()
@with_settings(EdgeSettings, *ACCESS, "deadline_ms", "answer_timeout_s", "retries", "precision")
def load(
    photos: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="PHOTO|FOLDER ...")],
    *,
    settings: EdgeSettings,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="Sessions at once.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long, after a second of warm-up.")] = 10.0,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point; repeatable, the clients share them.  \\[default: all]")
    ] = None,
    fps: Annotated[
        float,
        typer.Option(
            min=0,
            help="Frames a second of each client, at random moments; 0 sends the next frame when one is answered.",
        ),
    ] = 0.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Unanswered frames of each client, without --fps.")] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of the random moments, with --fps; the same seed gives the same.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Load a server with many sessions and tell how long it took. The photographs are encoded once, beforehand."""
    from bitneck.text_tables import print_table
    from bitneck_edge.cli.report import load_table
    from bitneck_edge.measure.load_generator import LoadPlan, run_load, summarize

    paths: list[Path] = [path for source in photos for path in find_photos(source)][:_MAX_LOAD_PHOTOS]
    plan = LoadPlan(
        clients=clients, seconds=seconds, points=tuple(point or ()), fps=fps, in_flight=in_flight, seed=seed
    )
    document = summarize(asyncio.run(run_load(settings, paths, plan)))
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        offered = f" of {document['offered_per_s']:.1f} offered" if "offered_per_s" in document else ""
        print(  # noqa: T201
            f"{document['frames']} frames of {clients} clients, {document['frames_per_s']:.1f} a second{offered}, "
            f"{document['failed']} failed, {document['reconnects']} reconnects, "
            f"{document.get('batch_mean', 0):.1f} frames a pass"
        )
        print_table(load_table(document))
    if document["failed"] or not document["frames"]:
        sys.exit(1)


@app.command()
@with_settings(EdgeSettings, "bundle", *ACCESS, "threads", "precision", "exact")
def bench(
    photos: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="PHOTO|FOLDER ...")],
    *,
    settings: EdgeSettings,
    origins: dict[str, str],
    frames: Annotated[int, typer.Option(min=1, help="Frames of each split point.")] = 50,
    as_json: Json = False,
) -> None:
    """Measure what a frame costs this device at every split point: time per stage, processor time, memory, link."""
    from bitneck.text_tables import print_table
    from bitneck_edge.cli.report import bench_table, link_table
    from bitneck_edge.measure.bench import bench as measure

    opened = _opened(settings, origins)
    paths: list[Path] = [path for source in photos for path in find_photos(source)]
    document = measure(opened, paths, frames=frames, threads=settings.threads, exact=settings.exact)
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print_table(bench_table(document))
        print(f"{document['precision']}, peak of resident memory: {document['peak_mb']:.0f} MiB")  # noqa: T201
        print_table(link_table(document))


@app.command()
@with_settings(EdgeSettings, "bundle", *ACCESS)
def points(
    *,
    settings: EdgeSettings,
    origins: dict[str, str],
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """List the operating points of a bundle or a server, lowest rate first."""
    from bitneck.text_tables import print_table, write_rows
    from bitneck_edge.bundles.fetch import manifest_of
    from bitneck_edge.cli.report import points_table

    if as_json and as_csv:
        raise InvalidConfig("--json and --csv both write to stdout: give one")
    if _is_local(settings, origins):
        opened = _opened(settings, origins)
        bundle_id, manifest = opened.bundle_id, opened.manifest
    else:
        bundle_id, manifest = asyncio.run(manifest_of(settings))
    ladder = manifest.ladder
    entries: list[dict[str, Any]] = [
        {
            "id": p.id,
            "split": p.split,
            "payload_bytes": p.payload_bytes or None,  # not measured
            "bpp_payload": p.bpp_payload if p.payload_bytes else None,
            "accuracy": p.accuracy if p.payload_bytes else None,
        }
        for p in ladder
    ]
    if as_csv:
        write_rows(entries, ("id", "split", "payload_bytes", "bpp_payload", "accuracy"))
    elif as_json:
        document = {"model": manifest.name, "bundle_id": bundle_id, "points": entries}
        print(json.dumps(document))  # noqa: T201
    else:
        print_table(points_table(ladder))


@app.command()
@with_settings(EdgeSettings, *ACCESS, "point", "precision", "answer_timeout_s", "retries")
def fetch(
    *,
    settings: EdgeSettings,
    origins: dict[str, str],
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of a bundle, for example on a stick, to take the files from.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a server's bundle to this device ahead of time: all of it, or with --point what that one needs."""
    from bitneck_edge.bundles.fetch import take_bundle

    if settings.point == AUTO:
        raise InvalidConfig(f"{origins.get('point', 'point')}: 'auto' is no operating point; leave it out for all")
    points = [settings.point] if settings.point else None
    bundle = take_bundle(source, settings, points) if source is not None else _fetched(settings, points)
    manifest = bundle.manifest
    chosen = points or [point.id for point in manifest.ladder]
    files = {path for point in chosen for path in manifest.files_of(point, bundle.precision)}
    document = {
        "model": manifest.name,
        "bundle_id": bundle.bundle_id,
        "precision": bundle.precision,
        "points": chosen,
        "files": len(files),
        "bytes": sum(manifest.files[path].size for path in files),
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(  # noqa: T201
            f"{manifest.name}: {len(files)} files, {document['bytes']} bytes, {bundle.precision}, are on this device"
        )


def _is_local(settings: EdgeSettings, origins: Mapping[str, str]) -> bool:
    """Whether the bundle of a folder is meant, and not a server's.

    Raises:
        InvalidConfig: both are named.
    """
    from_flag = {name for name, origin in origins.items() if origin == settings.flag(name)}
    if {"bundle", "server"} <= from_flag:
        raise InvalidConfig("give --bundle or --server, not both")
    return settings.bundle is not None and "server" not in from_flag


def _opened(settings: EdgeSettings, origins: Mapping[str, str]) -> Bundle:
    """The bundle of a folder, or of the server; with a point in the settings, what that needs of it."""
    from bitneck_edge.bundles.precision import choose_precision
    from bitneck_edge.bundles.store import default_cache_dir

    if not _is_local(settings, origins):
        return _fetched(settings, [settings.point] if settings.point not in ("", AUTO) else None)
    assert settings.bundle is not None
    bundle = Bundle.open(settings.bundle, side="edge")
    cache_dir = settings.cache_dir or default_cache_dir()
    bundle.precision = choose_precision(settings.precision, bundle.manifest, cache_dir)
    return bundle


def _fetched(settings: EdgeSettings, points: Sequence[str] | None) -> Bundle:
    """The server's bundle, with a bar that shows how long it takes; lines where there is no terminal."""
    from bitneck_edge.bundles.fetch import fetch_bundle
    from bitneck_edge.cli.fetch_lines import FetchLines

    if not sys.stderr.isatty():
        lines = FetchLines(lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        return asyncio.run(fetch_bundle(settings, lines, points=points))

    with Progress(
        TextColumn("fetching the bundle"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)

        def on_bytes(done: int, size: int) -> None:
            progress.update(task, completed=done, total=size)

        return asyncio.run(fetch_bundle(settings, on_bytes, points=points))


def main() -> None:
    """Run the command line; see `run_app`."""
    run_app(app, end_s=END_S)
