"""What the edge client costs and gains, against the real bundle and a server process on this machine.

    python benchmarks/edge.py --bundle build/efficientnet_lite0 [--cuts] [--json]
    python benchmarks/edge.py --bundle build/efficientnet_lite0 --processor [POINT ...] [--json]

Prints:
- pipelining: frames a second of `EdgeClient.stream`, divided by those of `EdgeClient.infer` called one after the other;
  through a link with a delay of 20 ms, and on loopback, where client and cloud share the cores; and the stream divided
  by its bound, which is encoding the same frames in a loop on every core without sending them;
- processor time: of the whole client process per frame, outside ONNX Runtime, with and without preprocessing, with one
  thread everywhere (the picture is already decoded); beside it the same for a bare gRPC exchange after the same
  computation, without anything of bitneck;
- memory: the peak of resident memory of `bitneck-edge run` at each split point;
- with --processor: only the processor time, at some points or the best one, as medians of pairs: the client and the
  bare exchange take turns;
- with --cuts: how often each of 1,000 frames is answered through a link that is cut every 50 frames for 2 s.

Compare timings within one run only, because the machines that run this are shared.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from bitneck.bundle import Bundle
from bitneck.image import load_photo
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.encoder import EdgeEncoder
from bitneck_testing.bare_exchange import BareWork, bare_server, open_exchange
from bitneck_testing.links import Proxy, proxy_process
from bitneck_testing.measuring import COMPUTING, PREPARING, TimeInside
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import QUIET, edge_run, run_json, running_server

DELAY_S = 0.02
FRAMES, WARM = 200, 20
PAIRS = 5
CUT_FRAMES, CUT_EVERY, CUT_S = 1000, 50, 2.0


async def pipelining(address: str, cache: Path, image: Image.Image, point: str) -> tuple[float, float]:
    """Frames a second: as a stream, and one after the other. The better of two runs each."""
    async with EdgeClient(address, cache_dir=cache, point=point) as client:
        rates = []
        for streamed in (True, False, True, False):
            begin = time.perf_counter()
            if streamed:
                answers = [a async for a in client.stream([image] * FRAMES)]
                assert all(isinstance(a, Answer) for a in answers)
            else:
                for _ in range(FRAMES):
                    await client.infer(image)
            rates.append(FRAMES / (time.perf_counter() - begin))
    return max(rates[0::2]), max(rates[1::2])


def encoding_bound(bundle: Bundle, image: Image.Image, point: str) -> float:
    """Frames a second of encoding alone, on every core, without sending."""
    encoder = EdgeEncoder(bundle)
    for _ in range(WARM):
        encoder.encode(image, point)
    begin = time.perf_counter()
    for _ in range(FRAMES):
        encoder.encode(image, point)
    return FRAMES / (time.perf_counter() - begin)


async def processor_time(address: str, cache: Path, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds of processor time per frame outside ONNX Runtime."""
    async with EdgeClient(address, cache_dir=cache, point=point, threads=1, workers=1) as client:
        async for _ in client.stream([image] * WARM):
            pass
        with TimeInside(COMPUTING, *PREPARING, clock=time.thread_time) as inside:
            begin = time.process_time()
            async for _ in client.stream([image] * FRAMES):
                pass
            total = time.process_time() - begin
    onnx, *preprocess = inside.seconds
    return {
        "cpu_outside_onnx_ms": (total - onnx) / FRAMES * 1e3,
        "cpu_outside_onnx_and_preprocessing_ms": (total - onnx - sum(preprocess)) / FRAMES * 1e3,
    }


async def bare_processor_time(bundle: Bundle, address: str, point: str) -> float:
    """The same for a bare exchange with a server that computes nothing."""
    begin = onnx = 0.0
    async with open_exchange(address, BareWork(bundle, point, threads=1)) as exchange:
        with TimeInside(COMPUTING, clock=time.thread_time) as inside:
            for k in range(WARM + FRAMES):
                if k == WARM:
                    begin, onnx = time.process_time(), inside.seconds[0]
                await exchange.once()
            total = time.process_time() - begin
    return (total - (inside.seconds[0] - onnx)) / FRAMES * 1e3


async def processor_pairs(
    bundle: Bundle, address: str, bare: str, cache: Path, image: Image.Image, point: str
) -> dict[str, Any]:
    """The client and the bare exchange in turns: the median of each, and of the ratio of the two in a turn."""
    pairs = []
    for _ in range(PAIRS):
        ours = await processor_time(address, cache, image, point)
        alone = ours["cpu_outside_onnx_and_preprocessing_ms"]
        pairs.append((alone, await bare_processor_time(bundle, bare, point)))
    return {
        "cpu_outside_onnx_and_preprocessing_ms": statistics.median(ours for ours, _ in pairs),
        "bare_exchange_cpu_ms": statistics.median(bare_ms for _, bare_ms in pairs),
        "ratio": statistics.median(ours / bare_ms for ours, bare_ms in pairs),
        "pairs": pairs,
    }


async def only_processor(bundle: Bundle, points: list[str], image: Image.Image) -> dict[str, Any]:
    """`processor_pairs` at some points."""
    with (
        running_server(bundle.root, options=QUIET) as server,
        bare_server() as bare,
        tempfile.TemporaryDirectory() as folder,
    ):
        return {point: await processor_pairs(bundle, server.grpc, bare, Path(folder), image, point) for point in points}


def processor_line(point: str, figures: dict[str, Any]) -> str:
    """The figures of one point for people."""
    return (
        f"{point}: processor time outside ONNX Runtime and preprocessing, per frame: "
        f"{figures['cpu_outside_onnx_and_preprocessing_ms']:.2f} ms; a bare gRPC exchange: "
        f"{figures['bare_exchange_cpu_ms']:.2f} ms; {figures['ratio']:.2f} times"
    )


def peak_mib(address: str, cache: Path, photo: Path, point: str) -> float:
    """Peak of resident memory of `bitneck-edge run`."""
    document = run_json(edge_run(address, cache, "--json", "--point", point, "--repeat", 50, photo))
    return float(document["summary"]["peak_mb"])


async def cuts(address: str, cache: Path, image: Image.Image, point: str) -> dict[str, Any]:
    """Send frames through a link that is cut again and again, and count how often each is answered."""
    seen: Counter[int] = Counter()
    failed = 0
    async with (
        Proxy(address, delay_s=DELAY_S / 2) as link,
        EdgeClient(link.address, cache_dir=cache, point=point, retries=-1) as client,
    ):
        begin = time.perf_counter()
        async for result in client.stream([image] * CUT_FRAMES):
            if isinstance(result, Answer):
                seen[result.seq] += 1
            else:
                failed += 1
            if (seen.total() + failed) % CUT_EVERY == 0:
                link.cut()
                asyncio.get_running_loop().call_later(CUT_S, link.mend)
        seconds, reconnects = time.perf_counter() - begin, client.reconnects
    return {
        "frames": CUT_FRAMES, "answered_once": sum(n == 1 for n in seen.values()),
        "answered_twice": sum(n > 1 for n in seen.values()), "failed": failed,
        "reconnects": reconnects, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle for classification")
    parser.add_argument(
        "--cuts", action="store_true", help="also send 1,000 frames through a link that is cut (a minute)"
    )
    parser.add_argument("--processor", nargs="*", metavar="POINT", help="only the processor time, at these points")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    photo = sample_photo()
    image = load_photo(photo)
    best = bundle.manifest.ladder.best.id
    if arguments.processor is not None:
        found = asyncio.run(only_processor(bundle, arguments.processor or [best], image))
        print(json.dumps(found) if arguments.json else "\n".join(processor_line(*each) for each in found.items()))
        return
    result: dict[str, Any] = {"point": best, "frames": FRAMES, "delay_s": DELAY_S}
    with running_server(bundle.root, options=QUIET) as server, tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        with proxy_process(server.grpc, delay_s=DELAY_S / 2) as remote:
            stream, serial = asyncio.run(pipelining(remote, cache, image, best))
        result["pipelining_remote"] = stream / serial
        stream, serial = asyncio.run(pipelining(server.grpc, cache, image, best))
        result["pipelining_loopback"] = stream / serial
        result["stream_over_encoding_alone"] = stream / encoding_bound(bundle, image, best)
        result |= asyncio.run(processor_time(server.grpc, cache, image, best))
        with bare_server() as bare:
            result["bare_exchange_cpu_ms"] = asyncio.run(bare_processor_time(bundle, bare, best))
        result["peak_mib"] = {
            split.name: peak_mib(server.grpc, cache, photo, point.id)
            for split in bundle.manifest.split_points
            for point in [max((p for p in bundle.manifest.ladder if p.split == split.name), key=lambda p: p.accuracy)]
        }
        if arguments.cuts:
            result["cuts"] = asyncio.run(cuts(server.grpc, cache, image, best))
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"stream / one after the other, frames a second: {result['pipelining_remote']:.2f} through a link of "
        f"{DELAY_S * 1e3:.0f} ms, {result['pipelining_loopback']:.2f} on loopback, where the cloud shares the cores"
    )
    print(f"stream on loopback / encoding alone: {result['stream_over_encoding_alone']:.2f}")
    print(
        f"processor time outside ONNX Runtime, per frame: {result['cpu_outside_onnx_ms']:.2f} ms, without "
        f"preprocessing {result['cpu_outside_onnx_and_preprocessing_ms']:.2f} ms; a bare gRPC exchange: "
        f"{result['bare_exchange_cpu_ms']:.2f} ms"
    )
    print("peak of resident memory: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in result["peak_mib"].items()))
    if "cuts" in result:
        c = result["cuts"]
        print(
            f"{c['frames']} frames, the link cut every {CUT_EVERY} for {CUT_S:.0f} s: {c['answered_once']} answered "
            f"once, {c['answered_twice']} twice, {c['failed']} failed, "
            f"{c['reconnects']} reconnects, {c['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
