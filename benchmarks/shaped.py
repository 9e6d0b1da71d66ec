"""Automatic rate on a real shaped link: two network namespaces, a token bucket between them, and a fourfold drop.

The cloud runs on one side, `bitneck-edge run` on the other; the device's way out has so many bits a second, and a
quarter of them from half-time on. A picture whose answer comes after the target, or that was dropped, is a miss and
counts as accuracy zero. Beside automatic rate the same with the lowest and with the highest point; and what a frame
costs on the device's interface beside its payload.

    sudo python benchmarks/shaped.py --bundle build/efficientnet_lite0 [--json]

It needs Linux, root, and `ip` and `tc` with the token bucket filter; else it says so and ends with 3.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skimage

from bitneck.bundle import Bundle
from bitneck.ladder import Ladder
from bitneck_edge.ratecontrol import rungs

BIN = Path(sys.executable).parent
PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"
NO_SHAPING = 3


class NotHere(Exception):
    """This machine does not let us."""


def sh(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


class ShapedLink:
    """A namespace for the device, with a way out that has a rate.

    Attributes:
        inside: what a command begins with that is to run on the device.
        host: the cloud's address.
    """

    def __init__(self, name: str, host: str) -> None:
        self.name, self.host = name, host
        self.inside = ("ip", "netns", "exec", name)
        self._device = f"{name[:12]}-d"
        self._shaped = False

    def bytes_out(self) -> int:
        """What has left the device, as its interface counts: Ethernet, IP and TCP headers too."""
        command = [*self.inside, "cat", f"/sys/class/net/{self._device}/statistics/tx_bytes"]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    def set_rate(self, bits_per_s: int) -> None:
        """From now on; what waits for more than two seconds is dropped by the bucket."""
        verb = "change" if self._shaped else "add"
        rate = ("rate", f"{bits_per_s}bit", "burst", "1600", "latency", "2s")
        sh(*self.inside, "tc", "qdisc", verb, "dev", self._device, "root", "tbf", *rate)
        self._shaped = True


@contextlib.contextmanager
def shaped_link() -> Iterator[ShapedLink]:
    """Two ends of a cable, one of them in a namespace.

    Raises:
        NotHere: no root, no tools, or a kernel without them.
    """
    if os.name != "posix" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise NotHere("it needs root, ip and tc")
    number = os.getpid() % 250
    link = ShapedLink(f"bneck{os.getpid()}", f"10.213.{number}.1")
    near, far = f"{link.name[:12]}-c", f"{link.name[:12]}-d"
    sh("ip", "netns", "add", link.name)
    try:
        sh("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", link.name)
        sh("ip", "addr", "add", f"{link.host}/30", "dev", near)
        sh("ip", "link", "set", near, "up")
        sh(*link.inside, "ip", "addr", "add", f"10.213.{number}.2/30", "dev", far)
        sh(*link.inside, "ip", "link", "set", far, "up")
        yield link
    finally:
        subprocess.run(["ip", "link", "del", near], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", link.name], capture_output=True, check=False)


@contextlib.contextmanager
def cloud(bundle: Path, host: str) -> Iterator[str]:
    """`bitneck-cloud serve` on the cloud's end: its gRPC address."""
    command = [str(BIN / "bitneck-cloud"), "serve", "--bundle", str(bundle), "--json", "--log-level", "warning"]
    command += ["--grpc", f"{host}:0", "--http", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            select.select([process.stdout], [], [], 120)
            yield json.loads(process.stdout.readline())["grpc"]
        finally:
            process.terminate()


def run(
    link: ShapedLink, server: str, cache: Path, ladder: Ladder, point: str, plan: argparse.Namespace
) -> dict[str, Any]:
    """One policy: pictures at `plan.fps`, the rate cut to a quarter at half-time."""
    count = round(plan.seconds * plan.fps)
    link.set_rate(plan.bits_per_s)
    command = [*link.inside, str(BIN / "bitneck-edge"), "run", "--json-lines", "--server", server, "--cache-dir", cache]
    command += [
        "--point",
        point,
        "--latency-ms",
        plan.target_ms,
        "--fps",
        plan.fps,
        "--repeat",
        count,
        "--newest",
        PHOTO,
    ]
    accuracy, hits, points, halves = 0.0, 0, Counter[str](), (Counter[str](), Counter[str]())
    payload, out = 0, link.bytes_out()
    begin = dropped_at = None
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now, document = time.monotonic(), json.loads(line)
            if "summary" in document:
                summary = document["summary"]
                break
            if "error" in document:
                continue
            begin = begin or now
            if dropped_at is None and now - begin > plan.seconds / 2:
                link.set_rate(plan.bits_per_s // 4)
                dropped_at = now
            points[document["point"]] += 1
            payload += document["payload_bytes"]
            halves[dropped_at is not None][document["point"]] += 1
            if document["ms"]["total"] <= plan.target_ms:
                hits += 1
                accuracy += ladder[document["point"]].accuracy
    return {
        "accuracy": accuracy / count, "misses": 1 - hits / count, "dropped": summary["dropped"],
        "failed": summary["failed"], "answered": summary["frames"], "points": dict(points),
        "overhead_bytes": (link.bytes_out() - out - payload) / max(1, points.total()),
        "before": dict(halves[0]), "after": dict(halves[1]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fps", type=float, default=5.0)
    parser.add_argument("--bits-per-s", type=int, default=44_000)
    parser.add_argument("--target-ms", type=int, default=400)
    parser.add_argument("--policy", action="append", help="auto or an operating point; repeatable")
    parser.add_argument("--json", action="store_true")
    plan = parser.parse_args()
    ladder = Bundle.open(plan.bundle).manifest.ladder
    useful = rungs(ladder)
    policies = plan.policy or ["auto", useful[0].id, useful[-1].id]
    try:
        with shaped_link() as link, cloud(plan.bundle, link.host) as server, tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            fetch = [*link.inside, str(BIN / "bitneck-edge"), "run", "--json", "--server", server, "--cache-dir", cache]
            subprocess.run([*map(str, fetch), str(PHOTO)], check=True, stdout=subprocess.DEVNULL)  # before it is thin
            results = {policy: run(link, server, cache, ladder, policy, plan) for policy in policies}
    except NotHere as exc:
        print(f"not on this machine: {exc}", file=sys.stderr)
        sys.exit(NO_SHAPING)
    if plan.json:
        print(json.dumps(results))
        return
    print(f"{plan.bits_per_s} bit/s, a quarter from half-time on; {plan.fps:g} pictures a second, {plan.target_ms} ms")
    for policy, r in results.items():
        before, after = (max(r[half], key=r[half].get, default="-") for half in ("before", "after"))
        print(
            f"{policy:<8} accuracy {r['accuracy']:.3f}, {r['misses']:.1%} missed ({r['dropped']} dropped, "
            f"{r['failed']} failed), mostly {before}, then {after}; "
            f"{r['overhead_bytes']:.0f} bytes a frame beside the payload"
        )


if __name__ == "__main__":
    main()
