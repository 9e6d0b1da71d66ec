"""What changes cost while frames flow: rate switches, reloads, many operating points in memory, and a long soak.

- switch: p99 of the round trip while every frame has another operating point than the one before and the control API is
  asked for another rate 20 times a second, over p99 with one point;
- reload: p99 of the frames that were in the air in the second after a reload began, over p99 before, with the failures;
- memory: the server's resident memory with every operating point loaded, over that with one;
- soak (--soak MINUTES): resident memory at the end over that after the warm-up, under load with reconnects.

    python benchmarks/operation.py --bundle build/efficientnet_lite0 [--soak 30] [--json]

Timings are compared within one run only: the machines that run this are shared.
"""

import argparse
import asyncio
import itertools
import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import skimage

from bitneck.bundle import Bundle, BundleWriter
from bitneck.errors import BitneckError
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.link.link import Link, LinkSettings
from bitneck_edge.settings import EdgeSettings

BIN = Path(sys.executable).parent
PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"
CLIENTS, SECONDS, RELOADS = 4, 6.0, 6


class Server:
    """`bitneck-cloud serve` in its own process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [str(BIN / "bitneck-cloud"), "serve", "--bundle", str(bundle), "--json", "--log-level", "warning"]
        self._command = [*command, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *options]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        select.select([self.process.stdout], [], [], 120)
        ready = json.loads(self.process.stdout.readline())
        self.grpc, self.http = ready["grpc"], f"http://{ready['http']}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def resident_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def subset(bundle: Bundle, out: Path, keep: Sequence[str]) -> Bundle:
    """The bundle with some of its operating points only."""
    points = [entry for entry in bundle.manifest.points if entry.id in keep]
    dropped = tuple(f"points/{entry.id}/" for entry in bundle.manifest.points if entry.id not in keep)
    with BundleWriter(out) as writer:
        for name, entry in bundle.manifest.files.items():
            if not name.startswith(dropped) if dropped else True:
                writer.add(name, bundle.path(name).read_bytes(), entry.role)
        fields = bundle.manifest.model_dump() | {"points": [p.model_dump() for p in points], "files": writer.files}
        return writer.finish(type(bundle.manifest).model_validate(fields))


class Cameras:
    """Clients that send pre-encoded frames, one after the other, and note when each was answered."""

    def __init__(self, server: Server, cache: Path) -> None:
        self.settings = EdgeSettings.load({"server": server.grpc, "cache_dir": cache, "retries": 10})
        self.rows: list[tuple[float, float]] = []  # (sent, milliseconds)
        self.failed = 0

    async def prepare(self) -> None:
        self.bundle = await fetch_bundle(self.settings)
        encoder = EdgeEncoder(self.bundle)
        self.payloads = {p.id: encoder.encode(PHOTO, p.id).encoded.payload for p in encoder.ladder}

    def link(self, name: str) -> Link:
        s = self.settings
        settings = LinkSettings(
            access=s.access, model="", bundle_id=self.bundle.bundle_id, client=name, retries=s.retries,
            connect_timeout_s=s.connect_timeout_s, answer_timeout_s=s.answer_timeout_s,
        )  # fmt: skip
        return Link(settings, lambda _point, _reason: None)

    async def run(self, points: Sequence[str], seconds: float, *, reconnect_s: float = 0.0) -> None:
        """Load for a while; with `reconnect_s` clients leave and come back about so often."""
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
        return float(np.percentile([ms for at, ms in self.rows if begin <= at < end], 99))


async def switching(bundle: Bundle, cache: Path) -> dict[str, Any]:
    """Alternating runs with one point and with another point at every frame."""
    points = [p.id for p in bundle.manifest.ladder if p.split == bundle.manifest.ladder.best.split]
    ratios, failed, frames = [], 0, 0
    with Server(bundle.root) as server:
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
    """Ask for another rate of every session, 20 times a second; how many requests failed."""
    failed = 0
    async with httpx.AsyncClient(base_url=server.http) as http:
        for point in itertools.cycle(points):
            if stop.is_set():
                return failed
            for session in (await http.get("/v1/sessions")).json():
                reply = await http.put(f"/v1/sessions/{session['id']}/rate", json={"point": point})
                failed += reply.status_code not in (200, 404)  # 404: it ended in between
            await asyncio.sleep(0.05)
    return failed


async def reloading(bundle: Bundle, folder: Path, cache: Path) -> dict[str, Any]:
    """Reloads between the whole bundle and one that lacks a point, while every client sends."""
    ids = [p.id for p in bundle.manifest.ladder]
    variants = [subset(bundle, folder / "all", ids), subset(bundle, folder / "fewer", ids[1:])]
    served = folder / "served"
    shutil.copytree(variants[0].root, served)
    took, ratios = [], []
    with Server(served) as server:
        cameras = Cameras(server, cache)
        await cameras.prepare()
        sending = asyncio.create_task(cameras.run(ids[1:], 2.0 + RELOADS * 2.5))
        await asyncio.sleep(2.0)
        async with httpx.AsyncClient(base_url=server.http, timeout=60) as http:
            for k in range(RELOADS):
                await asyncio.to_thread(_replace, variants[(k + 1) % 2].root, served)
                await asyncio.sleep(1.0)
                begin = time.perf_counter()
                reply = await http.post(f"/v1/models/{bundle.manifest.name}/reload")
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
    """Resident memory after frames at every operating point that is loaded."""
    sizes = []
    ids = [p.id for p in bundle.manifest.ladder]
    for keep in (ids, [bundle.manifest.ladder.best.id]):
        with Server(subset(bundle, folder / f"points-{len(keep)}", keep).root) as server:
            cameras = Cameras(server, cache)
            await cameras.prepare()
            await cameras.run(keep, 4.0)
            sizes.append(server.resident_mib)
    return {"all_mib": sizes[0], "one_mib": sizes[1], "ratio": sizes[0] / sizes[1]}


async def soak(bundle: Bundle, cache: Path, minutes: float) -> dict[str, Any]:
    """Mixed load with reconnects; memory is read every ten seconds."""
    with Server(bundle.root, "--resume-s", "5") as server:
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
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="only the soak, so long")
    parser.add_argument("--json", action="store_true")
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
