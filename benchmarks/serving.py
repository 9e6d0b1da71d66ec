"""Overhead and throughput of the whole path on loopback, as ratios of one run.

    python benchmarks/serving.py --bundle build/efficientnet_lite0 [--json]

Prints:
- overhead: the round trip of a frame minus the time inside ONNX Runtime on both sides, with one client that sends one
  frame at a time;
- floor: the same for a bare gRPC exchange with the same work inside ONNX Runtime and one thread on each side, without
  anything of bitneck: no coding, no protobuf, no batcher, no session;
- throughput: frames a second of 8 clients at once, divided by those of one loop that calls the same ONNX files without
  a network; and the 8 clients on 8 operating points from the whole ladder, divided by the 8 clients on one. It counts
  from when all clients have an answer.

Compare timings within one run only, because the machines that run this are shared.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import load_photo, preprocess
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_testing.bare_exchange import BareWork, bare_server, open_exchange
from bitneck_testing.measuring import COMPUTING, TimeInside, p50_and_p99
from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import QUIET, running_server

FRAMES, CLIENTS, WARM = 300, 8, 30


async def overhead(server: str, cache: Path, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds outside ONNX Runtime per frame, on both sides, with the batcher, without decoding the image."""
    outside = []
    async with EdgeClient(server, cache_dir=cache, point=point) as client:
        with TimeInside(COMPUTING) as edge:
            for _ in range(FRAMES + WARM):
                before, begin = edge.seconds[0], time.perf_counter()
                answer = await client.infer(image)
                total = time.perf_counter() - begin
                # The cloud's compute time is the decoder and the tail: ONNX Runtime but for the softmax.
                onnx = edge.seconds[0] - before + answer.ms.compute / 1e3
                outside.append((total - onnx) * 1e3 - answer.ms.preprocess - answer.ms.load)
    return p50_and_p99(outside[WARM:])


async def floor(bundle: Bundle, address: str, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds outside ONNX Runtime per bare exchange."""
    outside = []
    async with open_exchange(address, BareWork(bundle, point)) as exchange:
        for _ in range(FRAMES + WARM):
            await asyncio.to_thread(preprocess, image, bundle.manifest.input)  # as long a pause as in `overhead`
            begin = time.perf_counter()
            inside = await exchange.once()
            outside.append((time.perf_counter() - begin - inside) * 1e3)
    return p50_and_p99(outside[WARM:])


async def clients(server: str, cache: Path, image: Image.Image, points: Sequence[str]) -> float:
    """Frames a second of clients in this process, each with a session of its own at one of the points."""

    async def one(client: EdgeClient) -> int:
        answers = [a async for a in client.stream([image] * (FRAMES // CLIENTS))]
        assert all(isinstance(a, Answer) for a in answers)
        return len(answers)

    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for point in points:
            client = EdgeClient(server, cache_dir=cache, point=point, threads=1)
            opened.append(await stack.enter_async_context(client))
            await opened[-1].infer(image)
        begin = time.perf_counter()
        counts = await asyncio.gather(*map(one, opened))
        return sum(counts) / (time.perf_counter() - begin)


def bare_loop(bundle: Bundle, image: Image.Image, point_id: str) -> float:
    """Frames a second of one loop over the same files: preprocess, head, encode, decode, tail."""
    chain = SegmentChain(bundle)
    point = bundle.manifest.ladder[point_id]
    encoder, decoder, head = PointEncoder(bundle, point), PointDecoder(bundle, point), chain.head_length(point.split)
    begin = 0.0
    for k in range(FRAMES + WARM):
        if k == WARM:
            begin = time.perf_counter()
        encoded = encoder.encode(chain.run(preprocess(image, bundle.manifest.input), 0, head))
        chain.run(decoder.decode(decoder.dequantize(encoded.payload)[None]), head, len(chain))
    return FRAMES / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle for classification")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    image = load_photo(sample_photo())
    ladder = [p.id for p in bundle.manifest.ladder]
    spread = [ladder[k * (len(ladder) - 1) // (CLIENTS - 1)] for k in range(CLIENTS)]
    best = bundle.manifest.ladder.best.id
    result: dict[str, Any] = {"point": best, "frames": FRAMES, "clients": CLIENTS}
    with running_server(bundle.root, options=QUIET) as server, tempfile.TemporaryDirectory() as folder:
        address, cache = server.grpc, Path(folder)
        result["outside_onnx"] = asyncio.run(overhead(address, cache, image, best))
        with bare_server(bundle.root, best) as bare_address:
            result["floor"] = asyncio.run(floor(bundle, bare_address, image, best))
        bare = [bare_loop(bundle, image, best)]
        one = asyncio.run(clients(address, cache, image, [best] * CLIENTS))
        mixed = asyncio.run(clients(address, cache, image, spread))
        bare.append(bare_loop(bundle, image, best))
        result["throughput_8_clients_over_bare_loop"] = one / float(np.mean(bare))
        result["spread"] = spread
        result["throughput_mixed_points_over_one_point"] = mixed / one
    if arguments.json:
        print(json.dumps(result))
        return
    outside = result["outside_onnx"]
    print(
        f"outside ONNX Runtime, per frame, both sides: p50 {outside['p50_ms']:.2f} ms, p99 {outside['p99_ms']:.2f} ms"
    )
    floor_ms = result["floor"]
    print(f"a bare gRPC exchange with the same work: p50 {floor_ms['p50_ms']:.2f} ms, p99 {floor_ms['p99_ms']:.2f} ms")
    print(f"8 clients / bare loop, frames a second: {result['throughput_8_clients_over_bare_loop']:.2f}")
    print(f"8 clients on {', '.join(spread)} / all on {best}: {result['throughput_mixed_points_over_one_point']:.2f}")


if __name__ == "__main__":
    main()
