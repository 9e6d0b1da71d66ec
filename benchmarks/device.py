"""What a frame costs a device: from a file to its payload, and its parts, on one thread.

    python benchmarks/device.py --bundle build/efficientnet_lite0 [--point ID ...] [--rounds 9] [--json]

The files are generated, the same each time, and grainy as photographs of a small sensor are: a JPEG of 4000x3000
(quality 90), one of 1920x1080, one of 640x480, and a video of 1920x1080. For each file, point and precision:

    whole      file to payload, as the client does it
    exact      the same with --exact and float32: whole picture decoded, turned, resized, cropped
    parts      decoding and resizing; head; encoder and coding: each run alone, and their sum

Times are the least of some rounds; the variants take turns, so that a busy moment hits all of them. The energy proxy is
the processor time of the whole process for a frame. Memory is the peak of a process that encodes one file at one point.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from bitneck.bundle import Bundle
from bitneck.manifest import Precision
from bitneck_edge.encoder import EdgeEncoder
from bitneck_edge.measure import memory
from bitneck_edge.sources.photo import Photo, input_of
from bitneck_edge.sources.video import read_video

GRAIN = 8.0
"""Standard deviation of the grain, of 255 levels."""
SIZES = {"jpeg 4000x3000": (4000, 3000), "jpeg 1920x1080": (1920, 1080), "jpeg 640x480": (640, 480)}
VIDEO = "video 1920x1080"


def grainy(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of smooth colours with grain."""
    rng = np.random.default_rng(seed)
    width, height = size
    base = Image.fromarray(rng.integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=np.uint8))
    smooth = np.asarray(base.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noise = rng.normal(0.0, GRAIN, smooth.shape).astype(np.float32)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def make_files(folder: Path) -> dict[str, Path]:
    """Write the files; the video only where PyAV is installed."""
    files = {}
    for name, size in SIZES.items():
        files[name] = folder / f"{size[0]}x{size[1]}.jpg"
        grainy(size).save(files[name], quality=90)
    try:
        import av
    except ImportError:
        return files
    files[VIDEO] = folder / "video.mp4"
    with av.open(str(files[VIDEO]), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1920, 1080, "yuv420p", 8_000_000
        for seed in range(25):
            container.mux(stream.encode(av.VideoFrame.from_image(grainy((1920, 1080), seed))))
        container.mux(stream.encode())
    return files


class Device:
    """A bundle's edge half at one precision, on one thread."""

    def __init__(self, bundle: Bundle, precision: Precision, *, exact: bool) -> None:
        bundle.precision = precision
        self.encoder = EdgeEncoder(bundle, threads=1, exact=exact)
        self.spec = bundle.manifest.input

    def frame(self, photo: Photo, point: str) -> None:
        """File to payload."""
        self.encoder.encode(photo, point)

    def parts(self, photo: Photo, point: str) -> dict[str, Callable[[], object]]:
        """The parts of a frame, each to be run alone."""
        encoder = self.encoder.point_encoder(point)
        head = self.encoder.chain.head_length(encoder.point.split)
        with input_of(photo, self.spec, exact=self.encoder.exact) as (x, _):
            f = self.encoder.chain.run(x, 0, head).copy()

        def picture() -> None:
            with input_of(photo, self.spec, exact=self.encoder.exact):
                pass

        return {
            "picture": picture,
            "head": lambda: self.encoder.chain.run(x, 0, head),
            "encoder": lambda: encoder.encode(f),
        }


def least(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, the least of some rounds in turn."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - begun) * 1e3)
    return best


def video_ms(path: Path, device: Device, point: str, *, exact: bool) -> float:
    """Milliseconds for a picture of a video, decoding included."""
    begun, pictures = time.perf_counter(), 0
    for capture in read_video(str(path), None, spec=lambda: None if exact else device.spec):
        device.frame(capture.photo, point)
        pictures += 1
    return (time.perf_counter() - begun) * 1e3 / pictures


def processor_ms(run: Callable[[], object], frames: int = 10) -> float:
    """Processor time of the whole process for a frame, milliseconds."""
    begun = time.process_time()
    for _ in range(frames):
        run()
    return (time.process_time() - begun) * 1e3 / frames


def rows_of(bundle: Bundle, files: dict[str, Path], points: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each file, point and precision."""
    exact = Device(bundle, "float32", exact=True)
    precisions: tuple[Precision, ...] = ("float32", "int8") if bundle.manifest.has_int8 else ("float32",)
    for precision in precisions:
        device = Device(bundle, precision, exact=False)
        for point in points:
            for name, path in files.items():
                if name == VIDEO:
                    whole = min(video_ms(path, device, point, exact=False) for _ in range(2))
                    before = min(video_ms(path, exact, point, exact=True) for _ in range(2))
                    yield {
                        "file": name, "point": point, "precision": precision, "whole_ms": whole, "exact_ms": before,
                        "over_exact": whole / before,
                    }  # fmt: skip
                    continue
                device.frame(path, point)
                exact.frame(path, point)
                work = {
                    "whole": lambda d=device, p=path, o=point: d.frame(p, o),
                    "exact": lambda p=path, o=point: exact.frame(p, o),
                } | device.parts(path, point)
                best = least(work, rounds)
                total = best["picture"] + best["head"] + best["encoder"]
                yield {
                    "file": name, "point": point, "precision": precision, "whole_ms": best["whole"],
                    "picture_ms": best["picture"], "head_ms": best["head"], "encoder_ms": best["encoder"],
                    "over_parts": best["whole"] / total, "exact_ms": best["exact"],
                    "over_exact": best["whole"] / best["exact"],
                    "processor_ms": processor_ms(work["whole"]),
                }  # fmt: skip


def peak_mib(bundle: Path, precision: str, point: str, file: Path) -> float:
    """Peak of resident memory of a process that encodes one file, MiB."""
    command = [sys.executable, __file__, "--bundle", str(bundle), "--one", precision, point, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def encode_one(bundle: Path, precision: str, point: str, file: str) -> None:
    """Encode one file and print the peak of resident memory, MiB."""
    opened = Bundle.open(bundle, side="edge")
    Device(opened, "int8" if precision == "int8" else "float32", exact=False).frame(Path(file), point)
    print(memory.peak_mib())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--point", action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.one:
        encode_one(arguments.bundle, *arguments.one)
        return
    bundle = Bundle.open(arguments.bundle, side="edge")
    ladder = bundle.manifest.ladder
    best = {split.name: [p for p in ladder if p.split == split.name] for split in bundle.manifest.split_points}
    points = arguments.point or [max(at, key=lambda p: p.accuracy).id for at in best.values()]
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        rows = list(rows_of(bundle, files, points, arguments.rounds))
        peaks = {
            precision: peak_mib(arguments.bundle, precision, points[-1], files["jpeg 4000x3000"])
            for precision in dict.fromkeys(row["precision"] for row in rows)
        }
    if arguments.json:
        print(json.dumps({"rows": rows, "peak_mib": peaks}, indent=1))
        return
    table = Table("file", "point", "precision", "picture", "head", "encoder", "whole", "/ parts", "exact", "/ exact")
    for r in rows:
        cells = [f"{r[k]:.1f}" if k in r else "" for k in ("picture_ms", "head_ms", "encoder_ms", "whole_ms")]
        over = f"{r['over_parts']:.2f}" if "over_parts" in r else ""
        table.add_row(
            r["file"], r["point"], r["precision"], *cells, over, f"{r['exact_ms']:.1f}", f"{r['over_exact']:.2f}"
        )
    Console(width=120).print(table, "milliseconds; the least of some rounds in turn")
    for precision, peak in peaks.items():
        print(f"peak of resident memory, jpeg 4000x3000 at {points[-1]}, {precision}: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
