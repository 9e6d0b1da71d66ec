"""The command line ``bitneck-cloud``."""

import asyncio
import gc
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, InvalidConfig
from bitneck.settings.flags import with_settings
from bitneck.settings.program import make_app, run_app
from bitneck.wire.frames import crc32c_hex
from bitneck.wire.messages import Classification, CodedMap
from bitneck_cloud.abandoned import end_beside_abandoned
from bitneck_cloud.api.wire import parse_frame
from bitneck_cloud.observe.logs import configure_logging
from bitneck_cloud.settings import CloudSettings

__all__ = ["app", "main"]

app = make_app("Serve split networks: decode what edges send, finish the computation, answer.")


@app.command()
@with_settings(CloudSettings, *CloudSettings.flagged())
def serve(
    *,
    settings: CloudSettings,
    as_json: Annotated[bool, typer.Option("--json", help="When ready, print one JSON document on stdout.")] = False,
) -> None:
    """Serve bundles until SIGTERM or Ctrl-C."""
    from bitneck_cloud.server import Ready
    from bitneck_cloud.server import serve as run

    if not settings.bundle:
        raise InvalidConfig(
            f"no bundle to serve: give --bundle FOLDER, {settings.variable('bundle')}, or bundle in the config file"
        )
    configure_logging(settings.log_level.upper(), settings.log_format)
    settings.log_foreign_variables()

    def announce(ready: Ready) -> None:
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it now and then would hold all frames up
        if as_json:
            models = [
                {"name": m.name, "bundle_id": m.bundle.bundle_id, "points": [p.id for p in m.ladder]}
                for m in ready.models.values()
            ]
            print(json.dumps({"grpc": ready.grpc, "http": ready.http, "models": models}), flush=True)  # noqa: T201
        else:
            names = ", ".join(f"{m.name} ({len(m.ladder)} points)" for m in ready.models.values())
            scheme = "https" if settings.tls_cert is not None else "http"
            print(f"serving {names}: gRPC {ready.grpc}, control API {scheme}://{ready.http}/docs", flush=True)  # noqa: T201

    asyncio.run(run(settings, settings.bundle, announce))
    end_beside_abandoned()


@app.command()
@with_settings(CloudSettings, "http", "tls_cert", "tls_key")
def health(
    *,
    settings: CloudSettings,
    live: Annotated[bool, typer.Option("--live", help="Ask whether it lives, not whether it takes work.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds for the whole check.", min=0.1, max=60)] = 3.0,
) -> None:
    """Ask the server of this machine whether it is ready: a health check for containers. Ends with 1 if it is not."""
    from bitneck_cloud.health import check_health

    print(check_health(settings, live=live, timeout_s=timeout_s))  # noqa: T201


@app.command()
@with_settings(CloudSettings, "bundle")
def decode(
    frame: Annotated[Path, typer.Argument(help="A frame that `bitneck-edge encode` wrote.")],
    *,
    settings: CloudSettings,
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
    if len(settings.bundle) != 1:
        raise InvalidConfig(f"one bundle decodes a frame, got {len(settings.bundle)}: give --bundle FOLDER")
    model = ServedModel(Bundle.open(settings.bundle[0]))
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
        assert isinstance(output, Classification)
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


def main() -> None:
    """Run the command line; see `run_app`."""
    run_app(app)
