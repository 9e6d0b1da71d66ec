"""What sinks cost: the time of a commit, and the processor time of this process for one answer.

    python benchmarks/sinks.py [--seconds 5] [--answers 8] [--passes 40] [--sync always] [--json]

It commits passes of answers at a steady pace to no sink, to one of each kind, and to three at once. The webhook's
server is a process of its own. The broker is a real one (mosquitto), and is left out where it is not installed.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import numpy as np

from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.consumers.broker import MOSQUITTO, Broker
from bitneck_testing.consumers.committer import wait_for
from bitneck_testing.consumers.documents import answers
from bitneck_testing.consumers.receiver import Receiver
from bitneck_testing.processes import spawned_server

WARM_S = 1.5


def receive(address: "Queue[str]") -> None:
    """The webhook's server."""
    with Receiver().running() as running:
        address.put(running.url)
        time.sleep(3600)


def measure(tables: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one set of sinks."""
    settings = CloudSettings.load({"sinks": tables, "sinks_queue": folder / "queue.db", "sinks_sync": options.sync})
    outgoing = Outgoing(settings.sinks, settings.sinks_queue, server="benchmark", sync=settings.sinks_sync == "always")
    outgoing.start()
    outgoing.commit(answers(1, options.answers))
    time.sleep(WARM_S)
    number, commits_ms, begin = options.answers, [], time.process_time()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        documents = answers(number + 1, number + options.answers)
        number += options.answers
        before = time.perf_counter()
        outgoing.commit(documents)
        commits_ms.append(1e3 * (time.perf_counter() - before))
        time.sleep(max(0.0, 1 / options.passes - (time.perf_counter() - before)))
    wait_for(lambda: not any(state.queued for state in outgoing.states()), 60)
    busy_s = time.process_time() - begin
    outgoing.close()
    p50, p99 = np.percentile(commits_ms, [50, 99])
    return {
        "sinks": [table["kind"] for table in tables],
        "answers": number - options.answers,
        "commit_ms_p50": round(float(p50), 2),
        "commit_ms_p99": round(float(p99), 2),
        "processor_us_an_answer": round(1e6 * busy_s / (number - options.answers)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each set of sinks")
    parser.add_argument("--answers", type=int, default=8, help="of one pass")
    parser.add_argument("--passes", type=float, default=40.0, help="a second")
    parser.add_argument("--sync", choices=["second", "always"], default="second")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    figures = []
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(spawned_server(receive))
        kinds: list[dict[str, Any]] = [
            {"kind": "jsonl", "name": "jsonl"},
            {"kind": "webhook", "name": "webhook", "url": url, "secret": "0123456789abcdef"},
        ]
        if MOSQUITTO is not None:
            broker = stack.enter_context(Broker(base / "broker"))
            kinds.append({"kind": "mqtt", "name": "mqtt", "host": "127.0.0.1", "port": broker.port})
        for chosen in ([], *([kind] for kind in kinds), kinds):
            folder = Path(tempfile.mkdtemp(dir=base))
            tables = [kind | {"path": str(folder / "a.jsonl")} if kind["kind"] == "jsonl" else kind for kind in chosen]
            figures.append(measure(tables, folder, options))
            if not options.json:
                print(figures[-1], flush=True)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
