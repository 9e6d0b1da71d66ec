"""What changes cost while frames flow: rate switches, reloads, many operating points in memory, and a long soak.

    python benchmarks/operation.py --bundle build/efficientnet_lite0 [--soak 30] [--json]

Prints:
- switch: the p99 of the round trip while every frame has another operating point than the one before and the control
  API is asked for another rate 20 times a second, divided by the p99 with one operating point;
- reload: the p99 of the frames sent in the second after a reload begins, divided by the p99 of the second before; how
  long a reload takes; and how many frames failed;
- memory: resident memory of the server with every operating point loaded, divided by that with one;
- with --soak MINUTES, only this: resident memory at the end divided by that after the warm-up, under load with clients
  that leave and come back.

Compare timings within one run only, because the machines that run this are shared.
"""

import argparse
import asyncio
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bitneck.bundle import Bundle, BundleWriter
from bitneck.errors import BitneckError
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.measuring import p50_and_p99
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import QUIET, Server, running_server

CLIENTS, SECONDS, RELOADS = 4, 6.0, 6


def subset(bundle: Bundle, out: Path, keep: Sequence[str]) -> Bundle:
    """A copy of the bundle with only some of its operating points."""
    manifest = bundle.manifest
    points = [entry for entry in manifest.points if entry.id in keep]
    units = [unit for unit in manifest.units if any(entry.unit == unit.id for entry in points)]
    wanted = {path for unit in units for path in (*unit.encoder_files, unit.decoder)}
    wanted |= {path for entry in points for path in entry.coding_files}
    wanted |= {manifest.labels, *(segment.file for segment in manifest.segments)}
    with BundleWriter(out) as writer:
        for name, entry in bundle.manifest.files.items():
            if name in wanted:
                writer.add(name, bundle.path(name).read_bytes(), entry.role)
        return writer.finish(
            manifest.model_copy(
                update={"points": tuple(points), "units": tuple(units), "retired": {}, "files": writer.files}
            )
        )


class Cameras:
    """Clients that send frames encoded in advance, each one frame at a time, and note the round trips."""

    def __init__(self, server: Server, cache: Path) -> None:
        self.settings = EdgeSettings.load({"server": server.grpc, "cache_dir": cache, "retries": 10})
        self.rows: list[tuple[float, float]] = []  # (sent, milliseconds)
        self.failed = 0

    async def prepare(self) -> None:
        self.bundle = await fetch_bundle(self.settings)
        encoder = EdgeEncoder(self.bundle)
        self.payloads = {p.id: encoder.encode(sample_photo(), p.id).encoded.payload for p in encoder.ladder}

    def link(self, name: str) -> Link:
        s = self.settings
        settings = LinkSettings(
            access=s.access, model="", bundle_id=self.bundle.bundle_id, client=name, retries=s.retries,
            connect_timeout_s=s.connect_timeout_s, answer_timeout_s=s.answer_timeout_s,
        )  # fmt: skip
        return Link(settings, lambda _point, _reason: None)

    async def run(self, points: Sequence[str], seconds: float, *, reconnect_s: float = 0.0) -> None:
        """Send for a while. With `reconnect_s`, each client leaves and comes back about that often."""
        end = time.perf_counter() + seconds

        async def one(k: int) -> None:
            order = itertools.cycle(points[k % len(points) :] + points[: k % len(points)])
            dice = random.Random(k)  # noqa: S311  a load that can be repeated, no secret
            while time.perf_counter() < end:
                link = self.link(f"camera-{k}")
                leave = min(end, time.perf_counter() + dice.uniform(0.5, 1.5) * reconnect_s) if reconnect_s else end
                await link.open()
                try:
                    while time.perf_counter() < leave:
                        begin = time.perf_counter()
                        point = next(order)
                        try:
                            sent = await link.send(point, self.payloads[point])
                            await sent.answer
                        except BitneckError:
                            self.failed += 1
                            continue
                        self.rows.append((begin, (time.perf_counter() - begin) * 1e3))
                        if reconnect_s:
                            await asyncio.sleep(dice.uniform(0.0, 0.1))
                finally:
                    await link.close()

        await asyncio.gather(*[one(k) for k in range(CLIENTS)])

    def p99(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """99th percentile of the round trips of frames sent between two moments, ms."""
        return p50_and_p99([ms for at, ms in self.rows if begin <= at < end])["p99_ms"]


async def switching(bundle: Bundle, cache: Path) -> dict[str, Any]:
    """Run in turns with one operating point, and with another one at every frame."""
    points = [p.id for p in bundle.manifest.ladder if p.split == bundle.manifest.ladder.best.split]
    ratios, failed, frames = [], 0, 0
    with running_server(bundle.root, options=QUIET) as server:
        for _ in range(3):
            fixed, mixed = Cameras(server, cache), Cameras(server, cache)
            await fixed.prepare()
            await mixed.prepare()
            await fixed.run(points[-1:], SECONDS / 2)
            stop = asyncio.Event()
            asking = asyncio.create_task(_ask(server, points, stop))
            await mixed.run(points, SECONDS / 2)
            stop.set()
            failed += await asking + mixed.failed + fixed.failed
            frames += len(mixed.rows)
            ratios.append(mixed.p99() / fixed.p99())
    return {"p99_ratio": float(np.median(ratios)), "failed": failed, "frames": frames}


async def _ask(server: Server, points: Sequence[str], stop: asyncio.Event) -> int:
    """Ask for another rate of every session, 20 times a second. Returns how many requests failed."""
    failed = 0
    async with httpx.AsyncClient(base_url=server.http) as http:
        for point in itertools.cycle(points):
            if stop.is_set():
                return failed
            for session in (await http.get("/v1/sessions")).json():
                reply = await http.put(f"/v1/sessions/{session['id']}/rate", json={"point": point})
                failed += reply.status_code not in (200, 404)  # 404: the session has just ended
            await asyncio.sleep(0.05)
    return failed


async def reloading(bundle: Bundle, folder: Path, cache: Path) -> dict[str, Any]:
    """Reload the bundle with all its operating points and with one less in turns, while every client sends."""
    ids = [p.id for p in bundle.manifest.ladder]
    variants = [subset(bundle, folder / "all", ids), subset(bundle, folder / "fewer", ids[1:])]
    served = folder / "served"
    shutil.copytree(variants[0].root, served)
    took, ratios = [], []
    with running_server(served, options=QUIET) as server:
        cameras = Cameras(server, cache)
        await cameras.prepare()
        sending = asyncio.create_task(cameras.run(ids[1:], 2.0 + RELOADS * 2.5))
        await asyncio.sleep(2.0)
        async with httpx.AsyncClient(base_url=server.http, timeout=60) as http:
            for k in range(RELOADS):
                await asyncio.to_thread(_replace, variants[(k + 1) % 2].root, served)
                await asyncio.sleep(1.0)
                begin = time.perf_counter()
                reply = await http.post(f"/v1/models/{bundle.manifest.name}/reload", headers={"X-Bitneck-Request": "1"})
                took.append(time.perf_counter() - begin)
                assert reply.json()["changed"], reply.text
                await asyncio.sleep(1.0)
                ratios.append(cameras.p99(begin, begin + 1.0) / cameras.p99(begin - 1.0, begin))
        await sending
    return {
        "p99_ratio": float(np.median(ratios)),
        "p99_ratio_worst": max(ratios),
        "reload_s": float(np.median(took)),
        "failed": cameras.failed,
        "frames": len(cameras.rows),
    }


def _replace(source: Path, served: Path) -> None:
    new = served.with_name("incoming")
    shutil.copytree(source, new)
    old = served.with_name("outgoing")
    served.rename(old)
    new.rename(served)
    shutil.rmtree(old)


async def memory(bundle: Bundle, folder: Path, cache: Path) -> dict[str, float]:
    """Resident memory with every operating point and with one, after frames at each that is loaded."""
    sizes = []
    ids = [p.id for p in bundle.manifest.ladder]
    for keep in (ids, [bundle.manifest.ladder.best.id]):
        fewer = subset(bundle, folder / f"points-{len(keep)}", keep)
        with running_server(fewer.root, options=QUIET) as server:
            cameras = Cameras(server, cache)
            await cameras.prepare()
            await cameras.run(keep, 4.0)
            sizes.append(server.resident_mib)
    return {"all_mib": sizes[0], "one_mib": sizes[1], "ratio": sizes[0] / sizes[1]}


async def soak(bundle: Bundle, cache: Path, minutes: float) -> dict[str, Any]:
    """Mixed load with reconnects. Memory is read every ten seconds."""
    with running_server(bundle.root, options=(*QUIET, "--resume-s", "5")) as server:
        cameras = Cameras(server, cache)
        await cameras.prepare()
        running = asyncio.create_task(
            cameras.run([p.id for p in bundle.manifest.ladder], minutes * 60, reconnect_s=5.0)
        )
        samples = []
        while not running.done():
            await asyncio.wait({running}, timeout=10)
            samples.append(server.resident_mib)
            cameras.rows = cameras.rows[-1000:] if len(cameras.rows) > 200_000 else cameras.rows
        await running
    tenth = max(1, len(samples) // 10)
    warm, last = float(np.median(samples[tenth : 2 * tenth])), float(np.median(samples[-tenth:]))
    return {"minutes": minutes, "warm_mib": warm, "end_mib": last, "ratio": last / warm, "failed": cameras.failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle for classification")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="run only the soak, for this time")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name) / "cache"
        if arguments.soak:
            result["soak"] = asyncio.run(soak(bundle, cache, arguments.soak))
        else:
            result["switch"] = asyncio.run(switching(bundle, cache))
            result["reload"] = asyncio.run(reloading(bundle, folder, cache))
            result["memory"] = asyncio.run(memory(bundle, folder, cache))
    if arguments.json:
        print(json.dumps(result))
        return
    for what, values in result.items():
        print(
            f"{what}: " + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        )


if __name__ == "__main__":
    main()
