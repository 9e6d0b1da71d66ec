"""The command line ``bitneck-cloud``."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import bitneck
from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.frames import crc32c_hex
from bitneck.messages import CodedMap
from bitneck_cloud.api.wire import parse_frame
from bitneck_cloud.observe.logs import configure_logging
from bitneck_cloud.settings import CloudSettings

__all__ = ["app", "main"]

app = typer.Typer(
    help="Serve split networks: decode what edges send, finish the computation, answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def serve(
    bundle: Annotated[list[Path], typer.Option(help="A bundle's folder; repeatable, one for each model.")],
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT where edges connect.  [default: 127.0.0.1:50051]")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the control API.  [default: 127.0.0.1:8080]")] = None,
    http_token: Annotated[str | None, typer.Option(help="Bearer token that the control API asks for.")] = None,
    device_token: Annotated[str | None, typer.Option(help="Bearer token that gRPC asks devices for.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate, for gRPC and HTTP.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM authority of the devices' certificates.")] = None,
    http_tls_client_ca: Annotated[Path | None, typer.Option(help="Likewise for the control API.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="ONNX Runtime execution provider; repeatable.  [default: CPU]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="ONNX Runtime threads; 0 for every core.  [default: 0]")] = None,
    traces: Annotated[str | None, typer.Option(help="URL of an OpenTelemetry collector (OTLP, gRPC).")] = None,
    trace_ratio: Annotated[float | None, typer.Option(help="Share of the frames traced.  [default: 0.01]")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Threads that decode meanwhile.  [default: 1]")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Frames in one pass.  [default: 16]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Frames that may wait.  [default: 1024]")] = None,
    window: Annotated[int | None, typer.Option(help="Unanswered frames of a session.  [default: 16]")] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Sessions kept.  [default: 1024]")] = None,
    max_bytes_per_s: Annotated[
        float | None, typer.Option(help="Payload of a session; 0 for any.  [default: 0]")
    ] = None,
    similar_bytes: Annotated[
        int | None, typer.Option(help="Symbols kept of a session for similar frames; 0 for none.  [default: 262144]")
    ] = None,
    idle_s: Annotated[float | None, typer.Option(help="Seconds until a silent stream ends.  [default: 900]")] = None,
    resume_s: Annotated[float | None, typer.Option(help="Seconds to resume a session.  [default: 60]")] = None,
    drain_s: Annotated[float | None, typer.Option(help="Seconds to finish when stopped.  [default: 10]")] = None,
    drain_delay_s: Annotated[
        float | None, typer.Option(help="Seconds between not ready and the drain.  [default: 0]")
    ] = None,
    assumed_fps: Annotated[float | None, typer.Option(help="Frame rate before one is seen.  [default: 10]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of these settings.", envvar="BITNECK_CLOUD_CONFIG")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="When ready, print one JSON document on stdout.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Serve bundles until SIGTERM or Ctrl-C. Settings may also come from BITNECK_CLOUD_* or a file."""
    from bitneck_cloud.server import Ready
    from bitneck_cloud.server import serve as run

    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise InvalidConfig(f"--log-level {log_level!r}: use debug, info, warning or error")
    if log_format not in ("text", "json"):
        raise InvalidConfig(f"--log-format {log_format!r}: use text or json")
    configure_logging(log_level.upper(), "json" if log_format == "json" else "text")
    flags: dict[str, Any] = {
        "grpc": grpc, "http": http, "http_token": http_token, "device_token": device_token, "tls_cert": tls_cert,
        "tls_key": tls_key, "tls_client_ca": tls_client_ca, "http_tls_client_ca": http_tls_client_ca,
        "providers": provider or None, "threads": threads, "decode_threads": decode_threads, "max_batch": max_batch,
        "max_queue": max_queue, "window": window, "max_sessions": max_sessions, "max_bytes_per_s": max_bytes_per_s,
        "similar_bytes": similar_bytes, "idle_s": idle_s, "resume_s": resume_s, "drain_s": drain_s,
        "drain_delay_s": drain_delay_s,
        "assumed_fps": assumed_fps, "traces": traces, "trace_ratio": trace_ratio,
    }  # fmt: skip
    settings = CloudSettings.load(flags, config)

    def announce(ready: Ready) -> None:
        if as_json:
            models = [
                {"name": m.name, "bundle_id": m.bundle.bundle_id, "points": [p.id for p in m.ladder]}
                for m in ready.models.values()
            ]
            print(json.dumps({"grpc": ready.grpc, "http": ready.http, "models": models}), flush=True)  # noqa: T201
        else:
            names = ", ".join(f"{m.name} ({len(m.ladder)} points)" for m in ready.models.values())
            print(f"serving {names}: gRPC {ready.grpc}, control API http://{ready.http}/docs", flush=True)  # noqa: T201

    asyncio.run(run(settings, bundle, announce))


@app.command()
def decode(
    frame: Annotated[Path, typer.Argument(help="A frame that `bitneck-edge encode` wrote.")],
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    symbols: Annotated[Path | None, typer.Option(help="Write the symbols here, as .npy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Decode one frame from a file and answer it: the cloud's half, without a server."""
    from bitneck_cloud.engine.served_model import ServedModel

    try:
        data = frame.read_bytes()
    except OSError as exc:
        raise InvalidConfig(f"{frame}: cannot read it ({exc.strerror})") from exc
    parsed = parse_frame(data, str(frame))
    model = ServedModel(Bundle.open(bundle))
    model.check(parsed)
    codec = model.decoders[parsed.point].codec
    s = codec.decode(parsed.payload)
    (output,) = model.compute([parsed.point], [model.decode(parsed.point, parsed.payload)])
    if isinstance(output, BitneckError):
        raise output
    if symbols is not None:
        np.save(symbols, s)
    answer: dict[str, Any]
    if isinstance(output, CodedMap):
        shares = [{"index": x.index, "name": x.name, "share": x.share} for x in output.classes]
        answer = {"classes": shares, "map_bytes": len(output.map)}
        lines = [f"  {x['share']:.3f}  {x['name']}" for x in shares]
    else:
        labels = [{"index": x.index, "name": x.name, "score": x.score} for x in output.labels]
        answer = {"labels": labels}
        lines = [f"  {x['score']:.3f}  {x['name']}" for x in labels]
    document = {
        "file": str(frame),
        "bundle_id": model.bundle.bundle_id,
        "point": parsed.point,
        "payload_bytes": len(parsed.payload),
        "ideal_bytes": codec.tables.ideal_bits(s) / 8,
        "symbols_crc32c": crc32c_hex(s.astype("<i4").tobytes()),
        **answer,
    }
    if as_json:
        print(json.dumps(document))  # noqa: T201
    else:
        print(f"{parsed.point}: {len(parsed.payload)} bytes, ideal {document['ideal_bytes']:.1f}")  # noqa: T201
        for line in lines:
            print(line)  # noqa: T201


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(bitneck.__version__)  # noqa: T201
        raise typer.Exit


def main() -> None:
    """Run the command line; a `BitneckError` becomes one line on stderr and its exit code."""
    try:
        app()
    except BitneckError as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        sys.exit(exc.exit_code)
