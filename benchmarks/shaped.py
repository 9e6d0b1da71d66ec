"""Accuracy of automatic rate on a real shaped link, whose rate falls to a quarter at half-time.

    sudo python benchmarks/shaped.py --bundle build/efficientnet_lite0 [--json]

The cloud runs on this machine and `bitneck-edge run` in a network namespace; a token bucket limits the device's way
out. Prints for automatic rate, the lowest and the highest operating point:
- accuracy: mean over all pictures; a picture that was dropped, or whose answer came after the target, counts as zero;
- the share of such pictures, and how many were dropped or failed;
- the operating point that was used most before and after half-time;
- how many bytes a frame costs on the device's interface beside its payload.

It needs Linux, root, and `ip` and `tc` with the token bucket filter; without them it says so and ends with status 3.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bitneck.bundle import Bundle
from bitneck.ladder import Ladder
from bitneck_edge.ratecontrol import rungs
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import QUIET, child_process, edge_run, run_json, running_server
from bitneck_testing.shaped_link import ShapedLink, ShapingUnavailable, shaped_link

NO_SHAPING = 3


def run(
    link: ShapedLink, server: str, cache: Path, ladder: Ladder, point: str, plan: argparse.Namespace
) -> dict[str, Any]:
    """Run one policy: pictures at `plan.fps`, and a quarter of the rate from half-time on."""
    count = round(plan.seconds * plan.fps)
    link.set_rate(plan.bits_per_s)
    options = ("--json-lines", "--newest", "--point", point, "--latency-ms", plan.target_ms)
    command = edge_run(server, cache, *options, "--fps", plan.fps, "--repeat", count, sample_photo())
    accuracy, hits, points, halves = 0.0, 0, Counter[str](), (Counter[str](), Counter[str]())
    payload, out = 0, link.bytes_out()
    begin = dropped_at = None
    with child_process([*link.inside, *command]) as process:
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
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle for classification")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each run")
    parser.add_argument("--fps", type=float, default=5.0, help="pictures a second")
    parser.add_argument("--bits-per-s", type=int, default=44_000, help="rate of the link before half-time")
    parser.add_argument("--target-ms", type=int, default=400, help="an answer after this time is a miss")
    parser.add_argument("--policy", action="append", help="auto or the id of an operating point; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    plan = parser.parse_args()
    ladder = Bundle.open(plan.bundle).manifest.ladder
    useful = rungs(ladder)
    policies = plan.policy or ["auto", useful[0].id, useful[-1].id]
    try:
        with (
            shaped_link() as link,
            running_server(plan.bundle, options=(*QUIET, "--insecure"), grpc=f"{link.host}:0") as server,
            tempfile.TemporaryDirectory() as folder,
        ):
            cache = Path(folder)
            run_json([*link.inside, *edge_run(server.grpc, cache, "--json", sample_photo())])  # fetch before it is thin
            results = {policy: run(link, server.grpc, cache, ladder, policy, plan) for policy in policies}
    except ShapingUnavailable as exc:
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
