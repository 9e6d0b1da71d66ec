"""Show the whole path on real photographs: a cloud process, edge processes, every operating point, and a rate change.

First it prints, for every photograph and operating point, bytes, label and time, beside JPEG at the lowest quality that
keeps the label. Then it changes the rate over HTTP in the middle of a running stream. Then it sends a street scene to
the second model of the same server and gets a class map back; one picture shows the photograph and the overlays. In
the end it says how to see the console, with a picture of it where a browser is installed. It exits with 0 only if all
of it happened.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from bitneck.bundle import Bundle
from bitneck.chain import SegmentChain
from bitneck.image import crop, load_photo, normalize, preprocess
from bitneck_testing.consumers.browser import BROWSER, browser
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import (
    QUIET,
    ProcessFailed,
    Server,
    child_process,
    edge_run,
    run_json,
    running_server,
    wait_for_session,
)

PHOTOS = ("camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
FPS = 20.0


class DemoError(Exception):
    """Something that the demo wants to show did not happen."""


@dataclass(frozen=True)
class Edge:
    """`bitneck-edge run` for one of the cloud's models."""

    cloud: Server
    cache: Path
    model: str

    def command(self, *arguments: str) -> list[str]:
        return edge_run(self.cloud.grpc, self.cache, "--json", "--model", self.model, *arguments)

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run it as a process of its own; its JSON document."""
        return run_json(self.command(*arguments))


def top_label(chain: SegmentChain, bundle: Bundle, image: Image.Image) -> int:
    return int(chain.run(normalize(image, bundle.manifest.input), 0, len(chain)).argmax())


def lowest_jpeg(chain: SegmentChain, bundle: Bundle, image: Image.Image, label: int) -> tuple[int, int] | None:
    """(quality, bytes) of the lowest JPEG quality that keeps the label."""
    for quality in range(1, 101):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if top_label(chain, bundle, load_photo(buffer.getvalue())) == label:
            return quality, buffer.tell()
    return None


def short(name: str) -> str:
    return name.split(",")[0]


def show_points(console: Console, bundle: Bundle, edge: Edge, photos: list[Path]) -> None:
    chain = SegmentChain(bundle)
    names = bundle.labels()
    console.print(
        f"sending {len(photos)} photographs at each of {len(bundle.manifest.ladder)} operating points, a device for "
        "each: a minute or two", highlight=False, soft_wrap=True,
    )  # fmt: skip
    runs = {p.id: edge.run("--point", p.id, *map(str, photos)) for p in bundle.manifest.ladder}
    pixels = bundle.manifest.input.pixels
    total_jpeg, totals, kept = 0, dict.fromkeys(runs, 0), dict.fromkeys(runs, 0)
    for k, photo in enumerate(photos):
        image = crop(load_photo(photo), bundle.manifest.input)
        label = top_label(chain, bundle, image)
        jpeg = lowest_jpeg(chain, bundle, image, label)
        table = Table("", "bytes", "bpp", "label", "score", "edge ms", "link ms", "cloud ms", title=photo.name)
        for column in (*table.columns[1:3], *table.columns[4:]):
            column.justify = "right"
        for point, document in runs.items():
            if document["failed"] or len(document["frames"]) != len(photos):
                raise DemoError(f"{point}: {len(document['frames'])} answers for {len(photos)} photographs")
            frame = document["frames"][k]
            ms, best = frame["ms"], frame["labels"][0]
            totals[point] += frame["payload_bytes"]
            kept[point] += best["index"] == label
            table.add_row(
                point,
                str(frame["payload_bytes"]),
                f"{frame['bpp_payload']:.4f}",
                short(best["name"]) + ("" if best["index"] == label else f"  (was {short(names[label])})"),
                f"{best['score']:.2f}",
                f"{ms['load'] + ms['preprocess'] + ms['head'] + ms['encode']:.1f}",
                f"{ms['link']:.1f}",
                f"{ms['queued'] + ms['decode'] + ms['compute']:.1f}",
            )
        if jpeg is None:
            raise DemoError(f"{photo.name}: no JPEG quality keeps the label")
        quality, size = jpeg
        total_jpeg += size
        table.add_row(
            f"JPEG q{quality}",
            str(size),
            f"{size * 8 / pixels:.4f}",
            short(names[label]),
            "",
            "",
            "",
            "",
            style="dim",
        )
        console.print(table)
    n = len(photos)
    for point, size in totals.items():
        console.print(
            f"{point}: {size / n:.0f} bytes a photograph, label kept on {kept[point]} of {n}; "
            f"JPEG that keeps every label: {total_jpeg / n:.0f} bytes, {total_jpeg / size:.0f} times as many"
        )


def show_rate_change(console: Console, bundle: Bundle, edge: Edge, photos: list[Path]) -> None:
    """Frames flow at 20 a second; the control API asks for the lowest rate, then for the most accurate point."""
    ladder = list(bundle.manifest.ladder)
    low, high = ladder[0], bundle.manifest.ladder.best
    if low.id == high.id:
        raise DemoError("the bundle has one operating point only: nothing to switch between")
    seconds = 6
    repeat = int(FPS * seconds / len(photos))
    command = edge.command("--client", "demo", "--point", high.id, "--fps", str(FPS), "--repeat", str(repeat))
    with child_process([*command, *photos], stderr=subprocess.DEVNULL) as child:
        session = wait_for_session(edge.cloud, "demo")
        time.sleep(seconds / 3)
        url = f"{edge.cloud.http}/v1/sessions/{session}/rate"
        first = httpx.put(url, json={"max_bytes_per_frame": low.payload_bytes + 1}).raise_for_status().json()
        time.sleep(seconds / 3)
        second = httpx.put(url, json={"point": high.id}).raise_for_status().json()
        out, _ = child.communicate(timeout=60)
        if child.returncode != 0:
            raise DemoError(f"the stream ended with {child.returncode}")
    document = json.loads(out)
    frames = document["frames"]
    console.print(f"\nOne stream, {FPS:.0f} frames a second, the rate changed over HTTP while it runs:")
    runs: list[list[dict[str, Any]]] = []
    for frame in frames:
        if not runs or runs[-1][0]["point"] != frame["point"]:
            runs.append([])
        runs[-1].append(frame)
    for run, asked in zip(runs, ("at the start", f"PUT {first['policy']}", f"PUT {second['policy']}"), strict=False):
        sizes = [f["payload_bytes"] for f in run]
        console.print(
            f"  frames {run[0]['seq']:>3} to {run[-1]['seq']:>3}: {run[0]['point']}, {np.mean(sizes):>6.1f} bytes "
            f"({min(sizes)} to {max(sizes)})   {asked}",
            highlight=False,
        )
    if [run[0]["point"] for run in runs] != [high.id, low.id, high.id]:
        raise DemoError(f"expected {high.id}, {low.id}, {high.id}; got {[run[0]['point'] for run in runs]}")
    if [f["seq"] for f in frames] != list(range(1, len(frames) + 1)) or document["failed"]:
        raise DemoError("a frame was lost or answered twice")
    console.print(f"  {len(frames)} frames sent, {len(frames)} answers, each once; no backbone was read again.")


def street() -> Path:
    """A street scene of CamVid's test set if BITNECK_DATA has it, else a photograph of a motorcycle."""
    scenes = sorted((Path(os.environ.get("BITNECK_DATA", "")) / "camvid" / "test" / "images").glob("*"))
    return scenes[len(scenes) // 2] if scenes else sample_photo("motorcycle_left.png")


def show_class_maps(console: Console, bundle: Bundle, edge: Edge, photo: Path, out: Path) -> None:
    """Send one photograph at every operating point, and compare the class maps with that of the whole network."""
    manifest, chain = bundle.manifest, SegmentChain(bundle)
    reference = chain.run(preprocess(load_photo(photo), manifest.input), 0, len(chain))[0].argmax(axis=0)  # (H, W)
    table = Table("", "bytes", "bpp", "map back", "as uncompressed", "largest classes", "cloud ms", title=photo.name)
    for column in (*table.columns[1:5], table.columns[6]):
        column.justify = "right"
    pictures = [load_photo(photo)]
    for point in manifest.ladder:
        document = edge.run("--point", point.id, "--out", str(out / point.id), str(photo))
        if document["failed"] or len(document["frames"]) != 1:
            raise DemoError(f"{point.id}: no class map came back: {document['failed']}")
        frame = document["frames"][0]
        ms, classes = frame["ms"], frame["classes"][:3]
        with Image.open(frame["map_file"]) as image:
            small = image.resize((manifest.input.width, manifest.input.height), Image.Resampling.NEAREST)
            same = float((np.asarray(small) == reference).mean())
        table.add_row(
            point.id,
            str(frame["payload_bytes"]),
            f"{frame['bpp_payload']:.4f}",
            f"{frame['map_bytes']} bytes",
            f"{same:.1%}",
            ", ".join(f"{c['name']} {c['share']:.0%}" for c in classes),
            f"{ms['queued'] + ms['decode'] + ms['compute']:.1f}",
        )
        if point in (next(iter(manifest.ladder)), manifest.ladder.best):
            pictures.append(load_photo(Path(frame["overlay_file"])))
    console.print(table)
    beside = Image.new("RGB", (sum(p.width for p in pictures), pictures[0].height))
    for k, picture in enumerate(pictures):
        beside.paste(picture, (sum(p.width for p in pictures[:k]), 0))
    beside.save(out / "street.png")
    console.print(
        f"{out / 'street.png'}: the photograph, then its classes at the lowest and at the most accurate point"
    )


def show_console(console: Console, edge: Edge, photos: list[Path], out: Path) -> None:
    """A picture of the console while two devices send, if there is a browser; and how to see it."""
    if None in BROWSER:
        console.print("\nNo picture of the console: chromium and chromedriver are not installed.")
    else:
        with contextlib.ExitStack() as stack:
            for name, fps in (("gate", "5"), ("yard", "2")):
                command = edge.command("--client", name, "--fps", fps, "--repeat", "1000")
                stack.enter_context(child_process([*command, *photos], stderr=subprocess.DEVNULL))
                wait_for_session(edge.cloud, name)
            window = stack.enter_context(browser(1200, 1000))
            window.open(f"{edge.cloud.http}/console/#rates")
            window.find("svg.ladder .here")
            window.picture(out / "console.png")
        console.print(f"\n{out / 'console.png'}: the server's console, while two devices send")
    console.print(
        "To see the console of a server of your own: bitneck-cloud serve --bundle build/efficientnet_lite0 "
        "--try-photos, then http://127.0.0.1:8080/console/",
        soft_wrap=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle for classification")
    parser.add_argument("--segmentation", type=Path, required=True, help="a bundle for segmentation")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the pictures of class maps")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if SIGINT was ignored at the start
    console = Console(width=max(110, Console().width), soft_wrap=False)
    photos = [sample_photo(name) for name in PHOTOS]
    bundle, scenes = Bundle.open(arguments.bundle), Bundle.open(arguments.segmentation)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        bundles = (arguments.bundle, arguments.segmentation)
        with tempfile.TemporaryDirectory() as cache, running_server(*bundles, options=QUIET) as server:
            console.print(f"cloud: gRPC {server.grpc}, control API {server.http}/docs")
            edge = Edge(server, Path(cache), bundle.manifest.name)
            show_points(console, bundle, edge, photos)
            show_rate_change(console, bundle, edge, photos)
            streets = Edge(server, Path(cache), scenes.manifest.name)
            console.print(f"\n{scenes.manifest.name}, on the same server:")
            show_class_maps(console, scenes, streets, street(), arguments.out)
            show_console(console, edge, photos, arguments.out)
    except (DemoError, ProcessFailed, httpx.HTTPError) as exc:
        sys.exit(f"demo failed: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
