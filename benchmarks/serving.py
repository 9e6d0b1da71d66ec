"""Overhead and throughput of the whole path on loopback, as ratios of one run.

- overhead: round trip of a frame minus the time inside ONNX Runtime on both sides, one client, one frame at a time;
- floor: the same for a bare exchange over grpc.aio with the same work inside ONNX Runtime and one thread on each side,
  and nothing of bitneck: no coding, no protobuf, no batcher, no session;
- throughput: 8 clients at once against one bare loop that calls the same ONNX files with no network between.

    python benchmarks/serving.py --bundle build/efficientnet_lite0 [--json]

Timings are compared within one run only: the machines that run this are shared.
"""

import argparse
import asyncio
import json
import multiprocessing
import select
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import skimage
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder, PointEncoder, SegmentChain
from bitneck.image import load_photo, preprocess
from bitneck.runtime import OnnxModule
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient

BIN = Path(sys.executable).parent
PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"
FRAMES, CLIENTS, WARM = 300, 8, 30


class Stopwatch:
    """Adds up the time inside ONNX Runtime on the edge, by wrapping `OnnxModule.run`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._run = OnnxModule.run

    def __enter__(self) -> Self:
        original = self._run

        def timed(module: OnnxModule, x: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(module, x)
            finally:
                self.seconds += time.perf_counter() - begin

        OnnxModule.run = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        OnnxModule.run = self._run  # type: ignore[method-assign]


async def overhead(server: str, cache: Path, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds outside ONNX Runtime per frame, image decoding left out, both sides, batcher included."""
    outside = []
    async with EdgeClient(server, cache_dir=cache, point=point) as client:
        with Stopwatch() as watch:
            for _ in range(FRAMES + WARM):
                before, begin = watch.seconds, time.perf_counter()
                answer = await client.infer(image)
                total = time.perf_counter() - begin
                # The cloud's compute time is the decoder and the tail: ONNX Runtime but for the softmax.
                onnx = watch.seconds - before + answer.ms.compute / 1e3
                outside.append((total - onnx) * 1e3 - answer.ms.preprocess - answer.ms.load)
    kept = np.array(outside[WARM:])
    return {"p50_ms": float(np.percentile(kept, 50)), "p99_ms": float(np.percentile(kept, 99))}


class Bare:
    """What both sides of the bare exchange compute: the work inside ONNX Runtime and nothing else, timed."""

    def __init__(self, bundle: Bundle, point_id: str, threads: int = 0) -> None:
        self._point = bundle.manifest.ladder[point_id]
        self._chain, self._pool = SegmentChain(bundle, threads=threads), ThreadPoolExecutor(1)
        self._encoder, self._decoder = PointEncoder(bundle, self._point), PointDecoder(bundle, self._point)
        self._head = self._chain.head_length(self._point.split)
        self._x = np.zeros((1, 3, bundle.manifest.input.height, bundle.manifest.input.width), np.float32)
        self._y = np.zeros((1, *self._point.latent_shape), np.float32)

    async def edge(self) -> float:
        """Seconds inside ONNX Runtime."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._edge)

    async def cloud(self) -> float:
        """Seconds inside ONNX Runtime."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._cloud)

    def _edge(self) -> float:
        begin = time.perf_counter()
        self._encoder.latent(self._chain.run(self._x, 0, self._head))
        return time.perf_counter() - begin

    def _cloud(self) -> float:
        begin = time.perf_counter()
        self._chain.run(self._decoder.decode(self._y), self._head, len(self._chain))
        return time.perf_counter() - begin


def bare_server(bundle: Path, point: str, port: "multiprocessing.Queue[int]") -> None:
    """Answers each message with the seconds that its computation took; its own process."""

    async def main() -> None:
        bare = Bare(Bundle.open(bundle), point)

        async def handle(_: Any, context: Any) -> None:
            while (await context.read()) is not grpc.aio.EOF:
                await context.write(np.float64(await bare.cloud()).tobytes() + bytes(200))

        server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {"Exchange": method}),))
        port.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    asyncio.run(main())


def floor(bundle: Path, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds outside ONNX Runtime per exchange of 200 bytes for 208."""
    context = multiprocessing.get_context("spawn")
    port: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=bare_server, args=(bundle, point, port), daemon=True)
    process.start()

    async def exchange(address: str) -> list[float]:
        outside = []
        opened = Bundle.open(bundle)
        bare = Bare(opened, point)
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/bare.Bare/Exchange")()
            for _ in range(FRAMES + WARM):
                await asyncio.to_thread(preprocess, image, opened.manifest.input)  # as long a pause as in `overhead`
                begin = time.perf_counter()
                inside = await bare.edge()
                await call.write(bytes(200))
                inside += float(np.frombuffer((await call.read())[:8])[0])
                outside.append((time.perf_counter() - begin - inside) * 1e3)
            call.cancel()
        return outside[WARM:]

    try:
        kept = np.array(asyncio.run(exchange(f"127.0.0.1:{port.get(timeout=120)}")))
    finally:
        process.terminate()
        process.join()
    return {"p50_ms": float(np.percentile(kept, 50)), "p99_ms": float(np.percentile(kept, 99))}


async def clients(server: str, cache: Path, image: Image.Image, points: list[str]) -> float:
    """Frames a second of 8 clients, each with its own session, all in this process."""

    async def one(point: str) -> int:
        async with EdgeClient(server, cache_dir=cache, point=point, threads=1) as client:
            answers = [a async for a in client.stream([image] * (FRAMES // CLIENTS))]
            assert all(isinstance(a, Answer) for a in answers)
            return len(answers)

    begin = time.perf_counter()
    counts = await asyncio.gather(*[one(points[k % len(points)]) for k in range(CLIENTS)])
    return sum(counts) / (time.perf_counter() - begin)


def bare_loop(bundle: Bundle, image: Image.Image, point_id: str) -> float:
    """Frames a second of the same files in one loop: preprocess, head, encode, decode, tail."""
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
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    image = load_photo(PHOTO)
    points = [p.id for p in bundle.manifest.ladder]
    best = bundle.manifest.ladder.best.id
    command = [
        str(BIN / "bitneck-cloud"),
        "serve",
        "--bundle",
        str(arguments.bundle),
        "--json",
        "--log-level",
        "warning",
    ]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    result: dict[str, Any] = {"point": best, "frames": FRAMES, "clients": CLIENTS}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server, tempfile.TemporaryDirectory() as cache:
        try:
            assert server.stdout is not None
            select.select([server.stdout], [], [], 120)
            address = json.loads(server.stdout.readline())["grpc"]
            result["outside_onnx"] = asyncio.run(overhead(address, Path(cache), image, best))
            result["floor"] = floor(arguments.bundle, image, best)
            bare = [bare_loop(bundle, image, best)]
            one = asyncio.run(clients(address, Path(cache), image, [best]))
            all_points = asyncio.run(clients(address, Path(cache), image, points))
            bare.append(bare_loop(bundle, image, best))
            result["throughput_8_clients_over_bare_loop"] = one / float(np.mean(bare))
            result["throughput_all_points_over_one_point"] = all_points / one
        finally:
            server.terminate()
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
    print(f"8 clients on {len(points)} points / all on one: {result['throughput_all_points_over_one_point']:.2f}")


if __name__ == "__main__":
    main()
