"""What sinks cost: the time of a commit, the processor time for one answer, and how far they are behind.

    python benchmarks/sinks.py [--seconds 5] [--answers 8] [--passes 40] [--sync always] [--json] [--steps]

It commits passes of answers at a steady pace to no sink, to one of each kind, and to three at once. `behind_s` are the
seconds from the last commit until all is delivered: at a pace that a sink does not follow, they grow. The processor
time is that of this process and of the sinks' worker, whose memory is `worker_mib`. The webhook's server is a process
of its own. The broker is a real one (mosquitto), and is left out where it is not installed.

With --steps it measures what three sinks do to the queue, step by step, in one thread and without a pause: commits of
one answer and of four, each sink's turn with 30 answers, and a second's housekeeping.
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
from bitneck_cloud.answers.sinks.queue.access import checkpoint
from bitneck_cloud.answers.sinks.queue.file import QueueFile
from bitneck_cloud.answers.sinks.state import Bounds, Entry
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.consumers.broker import MOSQUITTO, Broker
from bitneck_testing.consumers.committer import wait_for
from bitneck_testing.consumers.documents import answers
from bitneck_testing.consumers.receiver import Receiver
from bitneck_testing.measuring import processor_s, resident_mib
from bitneck_testing.processes import spawned_server

WARM_S = 1.5


def receive(address: "Queue[str]") -> None:
    """The webhook's server."""
    with Receiver().running() as running:
        address.put(running.url)
        time.sleep(3600)


def spent_s(outgoing: Outgoing) -> float:
    """Processor time so far: of this process, and of the sinks' worker."""
    return time.process_time() + (processor_s(outgoing.pid) if outgoing.pid is not None else 0.0)


def measure(tables: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one set of sinks."""
    settings = CloudSettings.load({"sinks": tables, "sinks_queue": folder / "queue.db", "sinks_sync": options.sync})
    outgoing = Outgoing(settings.sinks, settings.sinks_queue, server="benchmark", sync=settings.sinks_sync == "always")
    outgoing.start()
    outgoing.commit(answers(1, options.answers))
    time.sleep(WARM_S)
    number, commits_ms, begin = options.answers, [], spent_s(outgoing)
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        documents = answers(number + 1, number + options.answers)
        number += options.answers
        before = time.perf_counter()
        outgoing.commit(documents)
        commits_ms.append(1e3 * (time.perf_counter() - before))
        time.sleep(max(0.0, 1 / options.passes - (time.perf_counter() - before)))
    ended = time.perf_counter()
    wait_for(lambda: not any(state.queued for state in outgoing.states()), 60)
    behind_s = time.perf_counter() - ended
    busy_s = spent_s(outgoing) - begin
    worker_mib = round(resident_mib(outgoing.pid)) if outgoing.pid is not None else 0
    outgoing.close()
    p50, p99 = np.percentile(commits_ms, [50, 99])
    return {
        "sinks": [table["kind"] for table in tables],
        "answers": number - options.answers,
        "commit_ms_p50": round(float(p50), 2),
        "commit_ms_p99": round(float(p99), 2),
        "processor_us_an_answer": round(1e6 * busy_s / (number - options.answers)),
        "behind_s": round(behind_s, 2),
        "worker_mib": worker_mib,
    }


def steps(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Medians in microseconds."""
    names = ("a", "b", "c")
    file = QueueFile(folder / "queue.db", dict.fromkeys(names, Bounds(1 << 40, 1e9)), sync=options.sync == "always")
    file.open(time.time())
    body = json.dumps(answers(1, 1)[0], separators=(",", ":")).encode()
    taken_us: dict[str, list[float]] = {}

    def timed(name: str, begin: float) -> None:
        taken_us.setdefault(name, []).append(1e6 * (time.perf_counter() - begin))

    number, end = 0, time.monotonic() + options.seconds
    while time.monotonic() < end:
        for size in (1, 1, 4) * 5:
            entries = [Entry("session s", k, k, ((names, body),)) for k in range(number + 1, number + size + 1)]
            number += size
            begin = time.perf_counter()
            file.add(entries, time.time())
            timed(f"commit_of_{size}", begin)
        for name in names:
            begin = time.perf_counter()
            batch = file.take(name, 30, 1 << 20)
            file.settle(name, batch, [""] * len(batch), time.time())
            timed("take_and_settle_of_30", begin)
        begin = time.perf_counter()
        while file.save(number, time.time()) or file.expire(time.time()):
            pass
        timed("housekeeping_for_30", begin)
        checkpoint(folder / "queue.db")
    file.close()
    return {name: round(float(np.median(times)), 1) for name, times in taken_us.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each set of sinks")
    parser.add_argument("--answers", type=int, default=8, help="of one pass")
    parser.add_argument("--passes", type=float, default=40.0, help="a second")
    parser.add_argument("--sync", choices=["second", "always"], default="second")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--steps", action="store_true", help="of the queue, in place of sinks")
    options = parser.parse_args()
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(steps(Path(folder), options)))
        return
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
