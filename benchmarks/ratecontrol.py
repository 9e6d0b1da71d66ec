"""Accuracy of automatic rate on simulated links, compared with fixed rates and with an oracle that knows the link.

    python benchmarks/ratecontrol.py --zoo models/zoo/efficientnet_lite0 [--json]

Prints one line for each link trace:
- auto/oracle: mean accuracy of automatic rate, divided by that of the oracle; a late or missing answer counts as zero;
- misses, (oracle): share of pictures without an answer in time, with automatic rate and with the oracle;
- switches/min: how often automatic rate changes the operating point;
- lowest/oracle, highest/oracle: as the first, with the lowest and with the highest operating point all the time;
and for two sudden drops of the rate how many frames pass until automatic rate has reacted.

The clock is the trace's own, so the figures are the same on every machine. `bitneck_testing.rate_simulation` says how a
link and a camera are simulated.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitneck_testing.rate_simulation import SCENES, frames_to_react, ladder_of, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("models/zoo/efficientnet_lite0"), help="folder of the zoo")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    ladder = ladder_of(arguments.zoo)
    results = {name: run(scene, ladder) for name, scene in SCENES.items()}
    document: dict[str, Any] = {
        name: {policy: {k: v for k, v in asdict(o).items() if k != "points"} for policy, o in outcomes.items()}
        for name, outcomes in results.items()
    }
    for name, at in (("fourfold drop and back", 60.0), ("s3, fourfold drop", 60.0)):
        document[name]["frames_to_react"] = frames_to_react(SCENES[name], ladder, at, results[name]["auto"])
    if arguments.json:
        print(json.dumps(document))
        return
    print(f"{'scene':<24} auto/oracle  misses  (oracle)  switches/min  lowest/oracle  highest/oracle")
    for name, r in results.items():
        best = r["oracle"].accuracy
        print(
            f"{name:<24} {r['auto'].accuracy / best:>11.3f}  {r['auto'].misses:>6.2%}  {r['oracle'].misses:>8.2%}"
            f"  {r['auto'].switches_per_min:>12.1f}  {r['lowest'].accuracy / best:>13.3f}"
            f"  {r['highest'].accuracy / best:>14.3f}"
        )
        if "frames_to_react" in document[name]:
            print(f"{'':<24} reacts to the drop within {document[name]['frames_to_react']} frames")


if __name__ == "__main__":
    main()
