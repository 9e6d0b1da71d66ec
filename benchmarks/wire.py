"""What crosses a device's link, counted by its interface: headers of Ethernet, IP and TCP included.

    sudo python benchmarks/wire.py --bundle build/efficientnet_lite0 [--kbps 256] [--precision int8] [--json]

Two network namespaces, real processes. Measured are

    first start   an empty cache, no --point, at --kbps each way: bytes down and seconds to the first answer, and until
                  the most accurate point answers
    update        the server comes back with a bundle in which the tables of one point changed: bytes down until the
                  client, which has the old bundle, answers at that point again
    frames        bytes a frame each way at the cheapest point, by --answers and --pack, in plaintext and under TLS: the
                  difference between a long and a short run, without what a session costs to open; beside them what
                  bitneck's model of packets says (bitneck.wire.link_bytes)

It needs root, `ip` and `tc`.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.factorized_model import FactorizedModel
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_testing.authority import Authority
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import running_server
from bitneck_testing.shaped_link import ShapedLink, ShapingUnavailable, shaped_link

SHORT, LONG, FPS = 20, 120, 5.0


def counted(device: str) -> dict[str, int]:
    """Bytes of the device's interface since it was made."""
    folder = Path(f"/sys/class/net/{device}/statistics")
    return {"down": int((folder / "rx_bytes").read_text()), "up": int((folder / "tx_bytes").read_text())}


async def start(server: str, device: str, values: dict[str, Any]) -> dict[str, Any]:
    """The device's part of a first start, inside its namespace."""
    begun, before = time.perf_counter(), counted(device)

    def passed() -> dict[str, float]:
        now = counted(device)
        return {"s": time.perf_counter() - begun} | {way: now[way] - before[way] for way in now}

    found: dict[str, Any] = {}
    async with EdgeClient(server, insecure=True, **values) as client:
        best = values.get("point") or client.bundle.manifest.ladder.best.id
        photo = sample_photo()
        while "wanted" not in found:
            answer = await client.infer(photo)
            if not found:
                found["first"] = passed() | {"point": answer.point}
            if answer.point == best:
                found["wanted"] = passed() | {"point": best}
            await asyncio.sleep(0.2)
    return found


async def frames(server: str, device: str, values: dict[str, Any], count: int, fps: float) -> dict[str, Any]:
    """The device's part of a run of frames."""
    before = counted(device)
    payload = 0
    async with EdgeClient(server, insecure=True, **values) as client:
        async for answer in client.stream(paced(sample_photo(), count, fps)):
            assert isinstance(answer, Answer), answer
            payload += answer.payload_bytes
        await asyncio.sleep(0.1)  # the last acknowledgement
        link = client.link_bytes
    now = counted(device)
    found = {way: now[way] - before[way] for way in now}
    return found | {"payload": payload / count, "model_up": link.up, "model_down": link.down}


async def paced(photo: Path, count: int, fps: float) -> AsyncGenerator[Path]:
    """The photograph again and again, so many times a second."""
    begun = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number / fps - time.perf_counter()))
        yield photo


def inside(
    link: ShapedLink, part: str, server: str, values: dict[str, Any], count: int = 0, fps: float = FPS
) -> dict[str, Any]:
    """Run the device's part in its namespace."""
    child = json.dumps([part, server, link.device, values, count, fps])
    done = subprocess.run(
        [*link.inside, sys.executable, __file__, "--child", child], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def child(text: str) -> None:
    """Do the device's part and print what was counted."""
    part, server, device, values, count, fps = json.loads(text)
    work = start(server, device, values) if part == "start" else frames(server, device, values, count, fps)
    print(json.dumps(asyncio.run(work)))


def with_other_tables(bundle: Bundle, point: str, out: Path) -> Bundle:
    """The bundle with other tables of one operating point: those of one photograph more."""
    manifest = bundle.manifest
    tables = bundle.tables(point)
    changed = [row.copy() for row in tables.counts]
    largest = changed[0].argmax()
    changed[0][largest] -= 1
    changed[0][(largest + 1) % len(changed[0])] += 1
    path = manifest.point(point).tables
    with BundleWriter(out) as writer:
        for name, entry in manifest.files.items():
            data = bundle.path(name).read_bytes()
            if name == path:
                data = FactorizedModel(tables.lo, changed).to_npz()
            if name not in manifest.point(point).coding_files[1:]:
                writer.add(name, data, entry.role)
        return writer.finish(manifest.model_copy(update={"files": writer.files}))


def measured(
    bundle: Bundle, link: ShapedLink, kbps: int, precision: str, folder: Path, parts: Sequence[str]
) -> dict[str, Any]:
    """The measurements."""
    values: dict[str, Any] = {"cache_dir": str(folder / "cache"), "precision": precision, "threads": 1}
    ladder = bundle.manifest.ladder
    best = ladder.best.id
    address = f"{link.host}:0"
    options = ("--insecure",)
    found: dict[str, Any] = {"precision": precision, "kbps": kbps}
    if "start" in parts:
        link.set_rate(kbps * 1000)
        link.set_rate_in(kbps * 1000)
        with running_server(bundle.root, options=options, grpc=address) as server:
            found["first_start"] = inside(link, "start", server.grpc, values)
        changed = with_other_tables(bundle, best, folder / "changed")
        with running_server(changed.root, options=options, grpc=address) as server:
            found["update"] = inside(link, "start", server.grpc, values | {"point": best})["wanted"]
    if "frames" in parts:
        found["frames"] = all_frames(bundle, link, values, folder)
    return found


def all_frames(bundle: Bundle, link: ShapedLink, values: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Bytes of a frame at the cheapest point, each way, by what comes back and how frames are sent."""
    link.set_rate(10_000_000)
    link.set_rate_in(10_000_000)
    at = values | {"point": bundle.manifest.ladder.measured[0].id}
    tasks = ("all", "map/4", "shares", "none") if bundle.manifest.task == "segmentation" else ("all", "labels", "none")
    ways: list[tuple[str, dict[str, Any], float]] = [(f"--answers {name}", {"answers": name}, FPS) for name in tasks]
    ways.append(("--pack 10", {"pack": 10}, FPS))
    ways.append(("--pack 10 --answers none", {"pack": 10, "answers": "none"}, FPS))
    ways += [(f"{fps:g} a second", {}, fps) for fps in (1.0, 30.0)]
    rows = []
    authority = Authority(folder / "tls")
    cert, key = authority.issue("server", hosts=(link.host,))
    secured = "--tls-cert", str(cert), "--tls-key", str(key)
    for options, further in ((("--insecure",), {}), (secured, {"tls_ca": str(authority.ca)})):
        with running_server(bundle.root, options=options, grpc=f"{link.host}:0") as server:
            for name, change, fps in ways if not further else ways[:-2]:
                row = per_frame(link, server.grpc, at | change | further, fps)
                rows.append(row | {"way": name, "tls": bool(further)})
    return rows


def per_frame(link: ShapedLink, server: str, values: dict[str, Any], fps: float) -> dict[str, Any]:
    """Bytes of a frame: the difference between a long and a short run."""
    inside(link, "frames", server, values, 2, 10.0)
    short, long = (inside(link, "frames", server, values, count, fps) for count in (SHORT, LONG))
    counts = ("up", "down", "model_up", "model_down")
    frame = {name: (long[name] - short[name]) / (LONG - SHORT) for name in counts}
    return frame | {
        "fps": fps, "point": values["point"], "payload": long["payload"],
        "session": {way: short[way] - SHORT * frame[way] for way in ("up", "down")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--kbps", type=int, default=256)
    parser.add_argument("--precision", choices=("int8", "float32"), default="int8")
    parser.add_argument("--part", choices=("start", "frames"), help="only this one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    bundle = Bundle.open(arguments.bundle)
    parts = (arguments.part,) if arguments.part else ("start", "frames")
    try:
        with shaped_link() as link, tempfile.TemporaryDirectory() as folder:
            found = measured(bundle, link, arguments.kbps, arguments.precision, Path(folder), parts)
    except ShapingUnavailable as exc:
        sys.exit(f"links cannot be shaped here: {exc}")
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    if "first_start" in found:
        table = Table("what", "point", "bytes down", "bytes up", "seconds", title=f"{found['kbps']} kbit/s each way")
        rows = {"first answer": found["first_start"]["first"], "best point": found["first_start"]["wanted"]}
        for name, row in (rows | {"after one point's tables changed": found["update"]}).items():
            table.add_row(name, row["point"], f"{row['down']:,}", f"{row['up']:,}", f"{row['s']:.1f}")
        Console().print(table)
    if "frames" in found:
        first = found["frames"][0]
        table = Table(
            "how", "TLS", "a second", "up", "down", "model up", "model down", "session up", "session down",
            title=f"bytes of a frame at {first['point']}, of which {first['payload']:.0f} are payload",
        )  # fmt: skip
        for row in found["frames"]:
            table.add_row(
                row["way"], "yes" if row["tls"] else "", f"{row['fps']:g}", f"{row['up']:.0f}", f"{row['down']:.0f}",
                *(f"{row[f'model_{way}']:.0f} ({row[f'model_{way}'] / row[way] - 1:+.1%})" for way in ("up", "down")),
                *(f"{row['session'][way]:,.0f}" for way in ("up", "down")),
            )  # fmt: skip
        Console().print(table)


if __name__ == "__main__":
    main()
