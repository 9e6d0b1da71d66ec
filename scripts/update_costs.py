"""Measure what a device pays, and write docs/costs.md's table and docs/costs/link.png.

    python scripts/update_costs.py [--bundle build/efficientnet_lite0] [--wire wire.json]

Times and files are measured anew with --bundle, bytes on the link taken from --wire, which
`python benchmarks/wire.py ... --json` writes. What is not given stays as it is in docs/costs/costs.json.
Image codecs at equal top-1 come from docs/results/baselines.json.
"""

import argparse
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, SegmentChain
from bitneck.errors import BitneckError
from bitneck.image import crop, load_photo, preprocess
from bitneck.ladder import most_accurate
from bitneck.manifest import Precision
from bitneck.runtime import ModulePool
from bitneck_edge.encoder import EdgeEncoder
from bitneck_testing.photographs import sample_photo

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "docs" / "costs" / "costs.json"
PAGE = ROOT / "docs" / "costs.md"
CHART = ROOT / "docs" / "costs" / "link.png"
RTT_S = 0.05
"""Round trip of the link, beside the time that bytes take."""
MARKED = re.compile(r"(<!-- costs: begin -->\n).*?(<!-- costs: end -->)", re.DOTALL)
CODECS = {"jpeg": {"format": "JPEG", "quality": 50}, "avif": {"format": "AVIF", "quality": 50}}


def least_ms(run: Callable[[], object], rounds: int = 15) -> float:
    """Milliseconds, the least of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        best = min(best, (time.perf_counter() - begun) * 1e3)
    return best


def measure(bundle: Bundle) -> dict[str, Any]:
    """Times of device and cloud at the best point of each split point, on one thread; bytes of files."""
    manifest, pool = bundle.manifest, ModulePool()
    ladder, photo = manifest.ladder, sample_photo()
    x = preprocess(load_photo(photo), manifest.input)
    chain = SegmentChain(bundle, threads=1, pool=pool)
    precisions: tuple[Precision, ...] = ("float32", "int8") if manifest.has_int8 else ("float32",)
    rows = []
    for split in manifest.split_points:
        point = most_accurate(p for p in ladder if p.split == split.name)
        row: dict[str, Any] = {
            "split": split.name, "point": point.id, "payload_bytes": point.payload_bytes, "top1": point.accuracy
        }  # fmt: skip
        for precision in precisions:
            bundle.precision = precision
            encoder = EdgeEncoder(bundle, threads=1)
            payload = encoder.encode(photo, point.id).encoded.payload
            row[f"device_ms_{precision}"] = least_ms(lambda e=encoder, p=point.id: e.encode(photo, p))
            files = manifest.files_of(point.id, precision)
            row[f"files_{precision}"] = sum(manifest.files[path].size for path in files)
        decoder = PointDecoder(bundle, point, pool=pool)
        head = chain.head_length(split.name)

        def cloud(d: PointDecoder = decoder, data: bytes = payload, start: int = head) -> None:
            chain.run(d.decode(d.dequantize(data)[None]), start, len(chain))

        row["cloud_ms"] = least_ms(cloud)
        rows.append(row)
    seen = crop(load_photo(photo), manifest.input)
    codecs = {}
    for name, options in CODECS.items():
        codecs[name] = least_ms(lambda o=options: seen.save(io.BytesIO(), **o))
    return {
        "points": rows,
        "whole_network_ms": least_ms(lambda: chain.run(x, 0, len(chain))),
        "picture_ms": least_ms(lambda: preprocess(load_photo(photo), manifest.input)),
        "codec_ms": codecs,
        "uncompressed": manifest.uncompressed_accuracy,
    }


def of_the_link(wire: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks/wire.py` counted, and from that what a frame costs beside its payload."""
    first = wire["frames"][0]
    return {"overhead_up": first["up"] - first["payload"], "down": first["down"], "wire": wire}


def codec_bytes(name: str, top1: float) -> float | None:
    """The fewest bytes of an image codec that reach a top-1; None if none does."""
    rows = json.loads((ROOT / "docs" / "results" / "baselines.json").read_text())["baselines"]
    enough = [row["bytes_mean"] for row in rows if row["codec"] == name and row["top1"] >= top1]
    return min(enough) if enough else None


def seconds(bytes_up: float, costs: dict[str, Any], device_ms: float, cloud_ms: float, kbps: np.ndarray) -> Any:
    """From a picture to its answer over a link of these kilobits a second each way."""
    link = (bytes_up + costs["overhead_up"] + costs["down"]) * 8 / (kbps * 1000)
    return RTT_S + (device_ms + cloud_ms) / 1e3 + link


def draw(costs: dict[str, Any]) -> None:
    """Seconds to an answer over the link's rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    kbps = np.geomspace(2, 20_000, 200)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axis = figure.subplots()
    for k, row in enumerate(costs["points"]):
        device = row.get("device_ms_int8", row["device_ms_float32"])
        label = f"{row['point']}, {row['top1']:.1%} top-1"
        y = seconds(row["payload_bytes"], costs, device, row["cloud_ms"], kbps)
        axis.plot(kbps, y, label=label, color=f"C{k}")
    best = max(costs["points"], key=lambda row: row["top1"])
    for name, style in (("jpeg", "--"), ("avif", ":")):
        size = codec_bytes(name, best["top1"])
        if size is not None:
            device = costs["picture_ms"] + costs["codec_ms"][name]
            y = seconds(size, costs, device, costs["whole_network_ms"], kbps)
            axis.plot(kbps, y, style, color="0.3", label=f"{name.upper()} to a server, {size:,.0f} bytes, as accurate")
    alone = (costs["picture_ms"] + costs["whole_network_ms"]) / 1e3
    label = f"whole network on the device, {costs['uncompressed']:.1%}"
    axis.axhline(alone, color="black", linestyle="-.", linewidth=1, label=label)
    axis.set(xscale="log", yscale="log", xlabel="link, kbit/s each way", ylabel="seconds from a picture to its answer")
    axis.grid(visible=True, which="both", color="0.9", linewidth=0.5)
    axis.legend(fontsize=8)
    figure.savefig(CHART, dpi=110)


def table(costs: dict[str, Any]) -> str:
    """The table of the page, Markdown."""
    lines = [
        "| split | point | top-1 | payload | device, float32 | device, int8 | cloud | files, float32 | files, int8 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in costs["points"]:
        int8 = f"{row['device_ms_int8']:.1f} ms" if "device_ms_int8" in row else ""
        files = f"{row['files_int8'] / 1e6:.2f} MB" if "files_int8" in row else ""
        lines.append(
            f"| {row['split']} | `{row['point']}` | {row['top1']:.2%} | {row['payload_bytes']:.0f} B | "
            f"{row['device_ms_float32']:.1f} ms | {int8} | {row['cloud_ms']:.1f} ms | "
            f"{row['files_float32'] / 1e6:.2f} MB | {files} |".replace("%", " %")
        )
    w = costs["wire"]
    first, best, update = w["first_start"]["first"], w["first_start"]["wanted"], w["update"]
    lines += [
        "",
        f"Whole network on the device: {costs['whole_network_ms']:.1f} ms. Decoding and resizing the picture, in full: "
        f"{costs['picture_ms']:.1f} ms.",
        "",
        f"| on the interface, {w['kbps']} kbit/s each way, {w['precision']} | bytes down | seconds |",
        "|---|---:|---:|",
        *starts(first, best),
        f"| the tables of one point changed | {update['down']:,} | {update['s']:.1f} |",
        "",
        *frames(w["frames"]),
    ]
    return "\n".join(lines) + "\n"


def starts(first: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """The rows of a start with an empty cache: one if the first answer comes from the most accurate point already."""
    if first["point"] == best["point"]:
        what = {"first answer, of the most accurate point already": first}
    else:
        what = {"first answer": first, "the most accurate point answers": best}
    return [
        f"| empty cache, {text} (`{row['point']}`) | {row['down']:,} | {row['s']:.1f} |" for text, row in what.items()
    ]


def frames(rows: list[dict[str, Any]]) -> list[str]:
    """The bytes of a frame, Markdown."""
    first = rows[0]
    lines = [
        f"| a frame at `{first['point']}`, {first['payload']:.0f} bytes of payload | a second | up | down | model up | "
        "model down | TLS: up | TLS: down |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    secured = {row["way"]: row for row in rows if row["tls"]}
    for row in rows:
        if row["tls"]:
            continue
        other = secured.get(row["way"])
        model = (f"{row[f'model_{way}'] / row[way] - 1:+.1%}".replace("%", " %") for way in ("up", "down"))
        cells = [f"{row['fps']:g}", f"{row['up']:.0f}", f"{row['down']:.0f}", *model]
        cells += [f"{other['up']:.0f}", f"{other['down']:.0f}"] if other else ["", ""]
        way = row["way"] if row["way"].startswith("--") else "--answers all"
        lines.append(f"| `{way}` | {' | '.join(cells)} |")
    opening = (f"{first['session'][way]:,.0f} bytes {way}" for way in ("up", "down"))
    lines += ["", f"To open a session with a manifest costs {' and '.join(opening)} in plaintext."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--wire", type=Path)
    arguments = parser.parse_args()
    costs = json.loads(COSTS.read_text())
    try:
        if arguments.bundle:
            costs |= measure(Bundle.open(arguments.bundle))
        if arguments.wire:
            costs |= of_the_link(json.loads(arguments.wire.read_text()))
    except (BitneckError, OSError, ValueError) as exc:
        parser.error(str(exc))
    except KeyError as exc:
        parser.error(f"{arguments.wire} is no document of benchmarks/wire.py --json: it has no {exc}")
    COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    draw(costs)
    PAGE.write_text(MARKED.sub(lambda match: match[1] + table(costs) + match[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
