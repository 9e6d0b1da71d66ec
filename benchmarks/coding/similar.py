"""Bytes of similar frames: coded against a frame that was answered, compared with each frame coded by itself.

    python benchmarks/coding/similar.py --bundle build/efficientnet_lite0 [--point s1-r1 ...] [--json]

Scenes are made by `bitneck_models.data.scenes` from photographs that nothing was fitted to (`imagenet-eval-400`):
- still: the camera stands still, under several kinds of light; `video` is such a scene through H.264;
- pan, zoom: the camera moves;
- drive: the street scenes of `camvid/test` as they were taken, one second apart.

Each frame is coded with the bundle's own codecs, then decoded and compared. As in the edge client, the smaller of the
two codings is sent, and one frame in a hundred is coded by itself. The reference is `--lag` frames back: the newest
frame that can have been answered. Prints for each scene and operating point the bytes saved on the stream, and the
bytes of the payload without and with a reference.

The data is found through BITNECK_DATA. Ends with status 1 if a still scene saves less than 20 % of its bytes, or a
moving one costs more than 2 % more.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.image import find_photos, load_photo, preprocess
from bitneck.wire.frames import seal_frame, wire_bytes
from bitneck_models.data.scenes import Camera, Path2D, moving, still

KEY_EVERY = 100
CAPTURED_US = 1_760_000_000_000_000
STILL_SAVES, MOVING_COSTS = 0.20, 0.02

Frames = Iterator[Image.Image]


@dataclass(frozen=True, slots=True)
class Scene:
    """A kind of scene.

    Attributes:
        name: what the table calls it.
        still: whether the camera stands still.
        frames: makes its frames from a photograph.
    """

    name: str
    still: bool
    frames: Callable[[Image.Image, np.random.Generator], Frames]


@dataclass(slots=True)
class Tally:
    """Sums over the frames of a scene at an operating point: frames, frames with a reference, and bytes."""

    frames: int = 0
    referring: int = 0
    payload_alone: int = 0
    payload: int = 0
    wire_alone: int = 0
    wire: int = 0


def scenes(bundle: Bundle, count: int) -> list[Scene]:
    spec = bundle.manifest.input

    def standing(camera: Camera) -> Callable[[Image.Image, np.random.Generator], Frames]:
        return lambda photo, rng: still(photo, spec, camera, count, rng)

    def going(path: Path2D) -> Callable[[Image.Image, np.random.Generator], Frames]:
        return lambda photo, rng: moving(photo, spec, Camera(noise=3.0), path, count, rng)

    def video(photo: Image.Image, rng: np.random.Generator) -> Frames:
        return h264(list(still(photo, spec, Camera(noise=3.0, quality=95), count, rng)))

    return [
        Scene("still, daylight", True, standing(Camera(noise=1.5, quality=90))),
        Scene("still, indoors", True, standing(Camera(noise=3.0))),
        Scene("still, dim", True, standing(Camera(noise=6.0, quality=80))),
        Scene("still, flickering light", True, standing(Camera(noise=3.0, flicker=0.04))),
        Scene("still, video", True, video),
        Scene("pan, 0.5 % a frame", False, going(Path2D(speed=0.005))),
        Scene("pan, 2 % a frame", False, going(Path2D(speed=0.02))),
        Scene("pan, 5 % a frame", False, going(Path2D(speed=0.05))),
        Scene("pan, 15 % a frame", False, going(Path2D(speed=0.15))),
        Scene("zoom, 3 % a frame", False, going(Path2D(speed=0.0, growth=0.03))),
    ]


def h264(pictures: Sequence[Image.Image]) -> Frames:
    """The pictures after coding and decoding with H.264."""
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "26", "preset": "veryfast"})
        stream.width, stream.height = (side - side % 2 for side in pictures[0].size)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


class Streams:
    """One stream for each operating point, all of the same frames."""

    def __init__(self, bundle: Bundle, points: Sequence[str], lag: int) -> None:
        self._bundle = bundle
        self._chain = SegmentChain(bundle)
        self._encoders = {name: PointEncoder(bundle, bundle.manifest.ladder[name]) for name in points}
        self._heads = {name: self._chain.head_length(encoder.point.split) for name, encoder in self._encoders.items()}
        self._lag = lag
        self.tallies: dict[tuple[str, str], Tally] = {}

    def run(self, scene: str, frames: Frames) -> None:
        """Code a sequence of frames at every operating point."""
        sent: dict[str, list[NDArray[np.int32]]] = {name: [] for name in self._encoders}
        for frame in frames:
            f, at = preprocess(frame, self._bundle.manifest.input), 0
            for length in sorted(set(self._heads.values())):
                f, at = self._chain.run(f, at, length), length
                for name, encoder in self._encoders.items():
                    if self._heads[name] == length:
                        self._code(scene, name, encoder.symbols(f), sent[name])

    def _code(self, scene: str, name: str, s: NDArray[np.int32], sent: list[NDArray[np.int32]]) -> None:
        encoder, tally = self._encoders[name], self.tallies.setdefault((scene, name), Tally())
        seq = len(sent) + 1
        payload = encoder.codec.encode(s)
        alone = chosen = seal_frame(seq=seq, point=name, payload=payload, captured_unix_us=CAPTURED_US)
        codec = encoder.conditional
        if codec is not None and seq > self._lag and seq % KEY_EVERY != 1:
            reference = codec.keep(sent[-self._lag])
            similar = codec.encode(s, reference)
            assert np.array_equal(codec.decode(similar, reference), s)
            frame = seal_frame(
                seq=seq, point=name, payload=similar, captured_unix_us=CAPTURED_US,
                reference=self._lag, reference_crc32c=reference.crc32c,
            )  # fmt: skip
            if wire_bytes(frame) < wire_bytes(alone):
                chosen = frame
        sent.append(s)
        tally.frames += 1
        tally.referring += chosen is not alone
        tally.payload_alone += len(payload)
        tally.payload += len(chosen.payload)
        tally.wire_alone += wire_bytes(alone)
        tally.wire += wire_bytes(chosen)


def drives(folder: Path) -> Iterator[list[Path]]:
    """The sequences of street scenes: files whose names begin alike, in order."""
    photos = find_photos(folder)
    for beginning in dict.fromkeys(photo.name.split("_")[0] for photo in photos):
        yield [photo for photo in photos if photo.name.startswith(beginning)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle with tables for similar frames")
    parser.add_argument("--point", action="append", metavar="ID", help="an operating point; repeatable; all by default")
    parser.add_argument("--photos", type=int, default=20, help="photographs that each kind of scene is made from")
    parser.add_argument("--frames", type=int, default=15, help="frames of each scene, the first key frame included")
    parser.add_argument("--lag", type=int, default=1, help="how many frames back the reference is")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    data = Path(os.environ["BITNECK_DATA"])
    bundle = Bundle.open(arguments.bundle)
    points = arguments.point or [point.id for point in bundle.manifest.ladder]
    streams = Streams(bundle, points, arguments.lag)
    photos = find_photos(data / "imagenet-eval-400" / "images")
    photos = photos[:: max(1, len(photos) // arguments.photos)][: arguments.photos]
    kinds = scenes(bundle, arguments.frames)
    for kind in kinds:
        for k, photo in enumerate(photos):
            streams.run(kind.name, kind.frames(load_photo(photo), np.random.default_rng(k)))
        print(kind.name, file=sys.stderr)
    for sequence in drives(data / "camvid" / "test" / "images"):
        streams.run("drive, 1 s a frame", (load_photo(photo) for photo in sequence))
    names = [*(kind.name for kind in kinds), "drive, 1 s a frame"]
    standing = {kind.name for kind in kinds if kind.still}
    rows = [row(streams.tallies[scene, point], scene, point) for scene in names for point in points]
    if arguments.json:
        print(json.dumps(rows))
    else:
        print("Bytes saved on the wire (of the payload); payload bytes without a reference -> with one:")
        print(f"{'scene':24}" + "".join(f"{point:>23}" for point in points))
        for scene in names:
            cells = [
                f"{r['saved_wire']:5.0%} ({r['saved_payload']:4.0%}) {r['payload_alone']:4.0f}->{r['payload']:<4.0f}"
                for r in rows
                if r["scene"] == scene
            ]
            print(f"{scene:24}" + "".join(f"{cell:>23}" for cell in cells))
    worst_still = min(r["saved_wire"] for r in rows if r["scene"] in standing)
    worst_moving = min(r["saved_wire"] for r in rows if r["scene"] not in standing)
    print(f"still scenes save {worst_still:.1%} or more, moving ones {worst_moving:.1%} or more", file=sys.stderr)
    if worst_still < STILL_SAVES or worst_moving < -MOVING_COSTS:
        sys.exit(f"wanted: at least {STILL_SAVES:.0%} on still scenes, at least {-MOVING_COSTS:.0%} on moving ones")


def row(tally: Tally, scene: str, point: str) -> dict[str, float | str]:
    return {
        "scene": scene,
        "point": point,
        "frames": tally.frames,
        "referring": tally.referring / tally.frames,
        "payload_alone": tally.payload_alone / tally.frames,
        "payload": tally.payload / tally.frames,
        "wire_alone": tally.wire_alone / tally.frames,
        "wire": tally.wire / tally.frames,
        "saved_payload": 1 - tally.payload / tally.payload_alone,
        "saved_wire": 1 - tally.wire / tally.wire_alone,
    }


if __name__ == "__main__":
    main()
