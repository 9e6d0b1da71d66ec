"""The command line ``bitneck-edge``."""

import asyncio
import io
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import bitneck
from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.frames import crc32c_hex, seal_frame
from bitneck.image import find_photos
from bitneck_edge.link.wire import frame_bytes
from bitneck_edge.settings import AUTO, EdgeSettings

__all__ = ["app", "main"]

_MAX_LOAD_PHOTOS = 64
"""Photographs that `load` encodes beforehand; more would tell nothing new about a server."""

app = typer.Typer(
    help="Run the first part of a split network here, send a few hundred bytes, get the answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Server = Annotated[str | None, typer.Option(help="HOST:PORT of the cloud.  [default: 127.0.0.1:50051]")]
Model = Annotated[str | None, typer.Option(help="Which of the server's models; not needed if it has one.")]
Point = Annotated[str | None, typer.Option(help="Operating point to begin with; else the cloud's wish or the best.")]
PointOrAuto = Annotated[
    str | None, typer.Option(help="Operating point to begin with, or 'auto'; else the cloud's wish or the best.")
]
Tls = Annotated[bool | None, typer.Option("--tls", help="Encrypt the link.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authorities of the server's certificate; else the system's.")]
TlsCert = Annotated[Path | None, typer.Option(help="This device's PEM certificate.")]
TlsKey = Annotated[Path | None, typer.Option(help="Its PEM key.")]
Token = Annotated[str | None, typer.Option(help="This device's bearer token; better in BITNECK_EDGE_TOKEN.")]
Pin = Annotated[str | None, typer.Option(help="Refuse a server with any other bundle (sha256:...).")]
Cache = Annotated[Path | None, typer.Option(help="Where bundles are kept; else the user's cache folder.")]
Threads = Annotated[int | None, typer.Option(help="ONNX Runtime threads; 0 for every core.  [default: 0]")]
Connect = Annotated[float | None, typer.Option(help="Seconds for one attempt to connect.  [default: 3]")]
Retries = Annotated[int | None, typer.Option(help="Attempts after the first; -1 for no end.  [default: 3]")]
Overdue = Annotated[float | None, typer.Option(help="Seconds until an answer is overdue.  [default: 15]")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings.", envvar="BITNECK_EDGE_CONFIG")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
BundleDir = Annotated[Path | None, typer.Option("--bundle", help="A bundle's folder, in place of a server.")]


@app.command()
def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Photographs, folders of them, video files, URLs of video streams, camera:N, or - for paths on "
            "standard input.",
            metavar="PHOTO|FOLDER|VIDEO|camera:N|- ...",
        ),
    ],
    server: Server = None,
    model: Model = None,
    point: PointOrAuto = None,
    latency_ms: Annotated[
        int | None, typer.Option(help="With --point auto: from a picture to its answer.  [default: 300]")
    ] = None,
    max_edge_ms: Annotated[
        float | None,
        typer.Option(help="With --point auto: head and encoder may take so long; decides the split point."),
    ] = None,
    bundle_id: Pin = None,
    client: Annotated[str | None, typer.Option(help="This device's name in the cloud's lists.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Of a frame, from its receipt; 0 for none.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Send the photographs this many times.")] = 1,
    fps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Send at most this many frames a second; a video then plays in time."),
    ] = None,
    newest: Annotated[
        bool | None,
        typer.Option("--newest/--every", help="Drop pictures that newer ones overtake.  [default: cameras and URLs]"),
    ] = None,
    as_they_come: Annotated[
        bool, typer.Option("--as-they-come", help="Answers as they come, not in the order of the pictures.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Segmentation: write each class map and an overlay into this folder.", metavar="DIR"),
    ] = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    cache_dir: Cache = None,
    threads: Threads = None,
    workers: Annotated[
        int | None, typer.Option(help="Pictures that are encoded at once; 0 for two.  [default: 0]")
    ] = None,
    in_flight: Annotated[
        int | None, typer.Option(help="Frames that may be unanswered; 0 for what the server grants.  [default: 0]")
    ] = None,
    similar: Annotated[
        Literal["auto", "on", "off"] | None,
        typer.Option(help="Code a picture against one before it.  [default: auto, for videos and cameras]"),
    ] = None,
    key_every: Annotated[
        int | None, typer.Option(help="Of so many frames one is then coded by itself.  [default: 100]")
    ] = None,
    connect_timeout_s: Connect = None,
    answer_timeout_s: Overdue = None,
    retries: Retries = None,
    config: Config = None,
    as_json: Json = False,
    json_lines: Annotated[
        bool,
        typer.Option("--json-lines", help="Print a line of JSON for each answer, and the summary as the last one."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each answer as it comes.")] = False,
) -> None:
    """Send pictures through the split network and print the answers."""
    from bitneck_edge.cli.run import RunPlan, run_plan
    from bitneck_edge.sources.parse import parse_sources

    logging.basicConfig(level="INFO" if verbose else "WARNING", stream=sys.stderr, format="%(levelname)s: %(message)s")
    settings = EdgeSettings.load(
        {
            "server": server, "model": model, "point": point, "bundle_id": bundle_id, "client": client,
            "deadline_ms": deadline_ms, "cache_dir": cache_dir, "threads": threads, "retries": retries,
            "connect_timeout_s": connect_timeout_s, "answer_timeout_s": answer_timeout_s,
            "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key, "token": token,
            "latency_ms": latency_ms, "max_edge_ms": max_edge_ms, "workers": workers, "in_flight": in_flight,
            "similar": similar, "key_every": key_every,
        },
        config,
    )  # fmt: skip
    parsed = parse_sources(sources)
    if settings.similar == "auto" and not any(source.video for source in parsed):
        settings = settings.model_copy(update={"similar": "off"})  # the server need not keep anything for us
    live = any(source.live for source in parsed)
    endless = live or any(source.stdin for source in parsed)
    if as_json and (json_lines or endless):
        raise InvalidConfig("--json prints one document at the end; for pictures without an end use --json-lines")
    plan = RunPlan(
        sources=parsed,
        repeat=repeat,
        fps=fps,
        newest=live if newest is None else newest,
        ordered=not as_they_come,
        out=out,
        output="json" if as_json else "lines" if json_lines else "verbose" if verbose or endless else "table",
    )
    sys.exit(asyncio.run(run_plan(settings, plan)))


@app.command()
def encode(
    photo: Annotated[Path, typer.Argument(help="A photograph.")],
    out: Annotated[Path, typer.Option(help="Write the frame here.")],
    bundle: BundleDir = None,
    server: Server = None,
    model: Model = None,
    point: Point = None,
    symbols: Annotated[Path | None, typer.Option(help="Write the symbols here, as .npy.")] = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    cache_dir: Cache = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Encode one photograph to a file: the edge's half, without a stream. `bitneck-cloud decode` reads it."""
    from bitneck_edge.encoder import EdgeEncoder

    settings, opened = _opened(
        bundle, config, server=server, model=model, cache_dir=cache_dir, point=point, tls=tls, tls_ca=tls_ca,
        tls_cert=tls_cert, tls_key=tls_key, token=token,
    )  # fmt: skip
    encoder = EdgeEncoder(opened)
    chosen = settings.point if settings.point not in ("", AUTO) else encoder.ladder.best.id
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
        "ideal_bytes": encoder.point_encoder(chosen).codec.tables.ideal_bits(result.encoded.symbols) / 8,
        "payload_crc32c": crc32c_hex(result.encoded.payload),
        "symbols_crc32c": crc32c_hex(result.encoded.symbols.astype("<i4").tobytes()),
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(f"{out}: {chosen}, {document['payload_bytes']} bytes, {document['bpp_payload']:.4f} bpp")  # noqa: T201


@app.command()
def load(
    photos: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="PHOTO|FOLDER ...")],
    server: Server = None,
    model: Model = None,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="Sessions at once.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long, after a second of warm-up.")] = 10.0,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point; repeatable, the clients share them.  [default: all]")
    ] = None,
    fps: Annotated[
        float, typer.Option(min=0, help="Frames a second of each client, at random moments; 0: when one is answered.")
    ] = 0.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Unanswered frames of each client, without --fps.")] = 1,
    deadline_ms: Annotated[int | None, typer.Option(help="Of a frame, from its receipt; 0 for none.")] = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    cache_dir: Cache = None,
    answer_timeout_s: Overdue = None,
    retries: Retries = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Load a server with many sessions and tell how long it took. The photographs are encoded once, beforehand."""
    from bitneck_edge.cli.report import load_table
    from bitneck_edge.measure.load_generator import LoadPlan, run_load, summarize

    settings = EdgeSettings.load(
        {
            "server": server, "model": model, "deadline_ms": deadline_ms, "cache_dir": cache_dir, "retries": retries,
            "answer_timeout_s": answer_timeout_s, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert,
            "tls_key": tls_key, "token": token,
        },
        config,
    )  # fmt: skip
    paths: list[Path] = [path for source in photos for path in find_photos(source)][:_MAX_LOAD_PHOTOS]
    plan = LoadPlan(clients=clients, seconds=seconds, points=tuple(point or ()), fps=fps, in_flight=in_flight)
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
        Console().print(load_table(document))
    if document["failed"] or not document["frames"]:
        sys.exit(1)


@app.command()
def bench(
    photos: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="PHOTO|FOLDER ...")],
    bundle: BundleDir = None,
    server: Server = None,
    model: Model = None,
    frames: Annotated[int, typer.Option(min=1, help="Of each split point.")] = 50,
    threads: Threads = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    cache_dir: Cache = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure what this device needs for a frame: time per stage, processor time, memory, for every split point."""
    from bitneck_edge.cli.report import bench_table
    from bitneck_edge.measure.bench import bench as measure

    settings, opened = _opened(
        bundle, config, server=server, model=model, cache_dir=cache_dir, threads=threads, tls=tls, tls_ca=tls_ca,
        tls_cert=tls_cert, tls_key=tls_key, token=token,
    )  # fmt: skip
    paths: list[Path] = [path for source in photos for path in find_photos(source)]
    document = measure(opened, paths, frames=frames, threads=settings.threads)
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        Console().print(bench_table(document))
        print(f"peak of resident memory: {document['peak_mb']:.0f} MiB")  # noqa: T201


@app.command()
def points(
    bundle: BundleDir = None,
    server: Server = None,
    model: Model = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token: Token = None,
    cache_dir: Cache = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List the operating points of a bundle or a server, lowest rate first."""
    from bitneck_edge.cli.report import points_table

    _, opened = _opened(
        bundle, config, server=server, model=model, cache_dir=cache_dir, tls=tls, tls_ca=tls_ca,
        tls_cert=tls_cert, tls_key=tls_key, token=token,
    )  # fmt: skip
    ladder = opened.manifest.ladder
    if as_json:
        entries: list[dict[str, Any]] = [
            {
                "id": p.id,
                "split": p.split,
                "payload_bytes": p.payload_bytes,
                "bpp_payload": p.bpp_payload,
                "accuracy": p.accuracy,
            }
            for p in ladder
        ]
        document = {"model": opened.manifest.name, "bundle_id": opened.bundle_id, "points": entries}
        print(json.dumps(document))  # noqa: T201
    else:
        Console().print(points_table(ladder))


def _opened(bundle: Path | None, config: Path | None, **flags: Any) -> tuple[EdgeSettings, Bundle]:
    """The settings, and a bundle from a folder or from their server."""
    from bitneck_edge.bundles.fetch import fetch_bundle

    settings = EdgeSettings.load(flags, config)
    if bundle is not None:
        if flags["server"] is not None:
            raise InvalidConfig("give --bundle or --server, not both")
        return settings, Bundle.open(bundle, side="edge")
    with Progress(
        TextColumn("fetching the bundle"), BarColumn(), DownloadColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)
        fetched = asyncio.run(
            fetch_bundle(settings, lambda done, size: progress.update(task, completed=done, total=size))
        )
    return settings, fetched


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(bitneck.__version__)  # noqa: T201
        raise typer.Exit


def main() -> None:
    """Run the command line; a `BitneckError` becomes one line on stderr and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text, nor stdout hold any text
    try:
        app()
    except BitneckError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_code)
