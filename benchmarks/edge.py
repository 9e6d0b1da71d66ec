"""What the edge client costs and gains.

- pipelining: frames a second of `EdgeClient.stream` over those of `EdgeClient.infer` one after the other, through a
  link with a delay, and on loopback where client and cloud share the cores; and the bound: the same frames encoded in a
  loop on every core with nothing sent;
- processor time: of the whole client process per frame outside ONNX Runtime, with and without preprocessing (the
  picture is decoded already), one thread everywhere; beside it the same for a bare exchange over grpc.aio after the
  same computation, with nothing of bitneck;
- memory: peak of resident memory of `bitneck-edge run` for each split point;
- cuts (--cuts): 1,000 frames through a link that is cut every 50 frames for 2 s.

    python benchmarks/edge.py --bundle build/efficientnet_lite0 [--cuts] [--json]

Timings are compared within one run only: the machines that run this are shared.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import grpc
from operation import BIN, PHOTO, Server
from PIL import Image
from serving import Bare

import bitneck_edge.encoder
from bitneck.bundle import Bundle
from bitneck.image import load_photo
from bitneck.runtime import OnnxModule
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.encoder import EdgeEncoder
from bitneck_testing.links import Proxy, proxy_process

DELAY_S = 0.02
FRAMES, WARM = 200, 20
CUT_FRAMES, CUT_EVERY, CUT_S = 1000, 50, 2.0


async def pipelining(address: str, cache: Path, image: Image.Image, point: str) -> tuple[float, float]:
    """Frames a second: as a stream, and one after the other."""
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
    """Frames a second of encoding alone, on every core."""
    encoder = EdgeEncoder(bundle)
    for _ in range(WARM):
        encoder.encode(image, point)
    begin = time.perf_counter()
    for _ in range(FRAMES):
        encoder.encode(image, point)
    return FRAMES / (time.perf_counter() - begin)


class ThreadTime:
    """Processor time inside some functions, of the threads that call them."""

    def __init__(self, *places: tuple[Any, str]) -> None:
        self._places = places
        self.seconds = [0.0] * len(places)

    def __enter__(self) -> Self:
        self._originals = [getattr(owner, name) for owner, name in self._places]
        for k, (owner, name) in enumerate(self._places):
            setattr(owner, name, self._timed(k))
        return self

    def _timed(self, k: int) -> Any:
        original = self._originals[k]

        def timed(*args: Any, **values: Any) -> Any:
            begin = time.thread_time()
            try:
                return original(*args, **values)
            finally:
                self.seconds[k] += time.thread_time() - begin

        return timed

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in zip(self._places, self._originals, strict=True):
            setattr(owner, name, original)


async def processor_time(address: str, cache: Path, image: Image.Image, point: str) -> dict[str, float]:
    """Milliseconds of processor time per frame outside ONNX Runtime."""
    async with EdgeClient(address, cache_dir=cache, point=point, threads=1, workers=1) as client:
        async for _ in client.stream([image] * WARM):
            pass
        with ThreadTime((OnnxModule, "run"), (bitneck_edge.encoder, "preprocess")) as times:
            begin = time.process_time()
            async for _ in client.stream([image] * FRAMES):
                pass
            total = time.process_time() - begin
    onnx, preprocess = times.seconds
    return {
        "cpu_outside_onnx_ms": (total - onnx) / FRAMES * 1e3,
        "cpu_outside_onnx_and_preprocessing_ms": (total - onnx - preprocess) / FRAMES * 1e3,
    }


async def bare_processor_time(bundle: Bundle, point: str) -> float:
    """The same for a bare exchange of 200 bytes each way with a server that echoes."""
    code = (
        "import asyncio, grpc\n"
        "async def echo(_, context):\n"
        "    while (message := await context.read()) is not grpc.aio.EOF:\n"
        "        await context.write(message)\n"
        "async def main():\n"
        "    server = grpc.aio.server()\n"
        "    method = grpc.stream_stream_rpc_method_handler(echo)\n"
        "    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('bare.Bare', {'E': method}),))\n"
        "    print(server.add_insecure_port('127.0.0.1:0'), flush=True)\n"
        "    await server.start()\n"
        "    await server.wait_for_termination()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    bare = Bare(bundle, point, threads=1)
    onnx = total = 0.0
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/bare.Bare/E")()
            with ThreadTime((OnnxModule, "run")) as times:
                for k in range(WARM + FRAMES):
                    if k == WARM:
                        begin, onnx = time.process_time(), times.seconds[0]
                    await bare.edge()
                    await call.write(bytes(200))
                    await call.read()
                total, onnx = time.process_time() - begin, times.seconds[0] - onnx
            call.cancel()
    finally:
        process.terminate()
        await process.wait()
    return (total - onnx) / FRAMES * 1e3


def peak_mib(address: str, cache: Path, photo: Path, point: str) -> float:
    """Peak of resident memory of `bitneck-edge run`."""
    command = [str(BIN / "bitneck-edge"), "run", "--json", "--server", address, "--cache-dir", str(cache)]
    command += ["--point", point, "--repeat", "50", str(photo)]
    summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["summary"]
    return float(summary["peak_mb"])


async def cuts(address: str, cache: Path, image: Image.Image, point: str) -> dict[str, Any]:
    """Frames through a link that is cut again and again: how often each was answered."""
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
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--cuts", action="store_true", help="also 1,000 frames through a link that is cut (a minute)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    image = load_photo(PHOTO)
    best = bundle.manifest.ladder.best.id
    result: dict[str, Any] = {"point": best, "frames": FRAMES, "delay_s": DELAY_S}
    with Server(arguments.bundle) as server, tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        with proxy_process(server.grpc, delay_s=DELAY_S / 2) as remote:
            stream, serial = asyncio.run(pipelining(remote, cache, image, best))
        result["pipelining_remote"] = stream / serial
        stream, serial = asyncio.run(pipelining(server.grpc, cache, image, best))
        result["pipelining_loopback"] = stream / serial
        result["stream_over_encoding_alone"] = stream / encoding_bound(bundle, image, best)
        result |= asyncio.run(processor_time(server.grpc, cache, image, best))
        result["bare_exchange_cpu_ms"] = asyncio.run(bare_processor_time(bundle, best))
        result["peak_mib"] = {
            split.name: peak_mib(server.grpc, cache, PHOTO, point.id)
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
