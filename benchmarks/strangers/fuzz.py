"""Feed wrong bytes to all that server and device do with bytes from outside: parsing, checks, decoding. No network.

    python benchmarks/strangers/fuzz.py --inputs 1000000 [--seed 0]

Payloads and protobuf messages of both sides, manifests, tables, ONNX files, class maps and photographs are random, or
right ones that were changed, cut or lengthened. The only errors that may come out are bitneck's own and protobuf's
DecodeError; decoded symbols must lie inside their tables; memory must not grow. Prints how many inputs were taken, how
many ended in which error, and by how much the peak of memory grew. Ends with status 1 if memory grew by more than 16
MiB, and with a traceback at any other error.
"""

import argparse
import io
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image

from bitneck.bundle import Bundle
from bitneck.coding.class_map import decode_map, encode_map
from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.context_model import ContextModel
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BitneckError
from bitneck.image import load_photo
from bitneck.manifest import Manifest
from bitneck.onnx_file.cost import check_onnx
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import check_frame, seal_frame
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.api.wire import frame_from_wire
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.sessions.session import Session
from bitneck_edge.link.wire import frame_to_wire, server_message
from bitneck_edge.measure.memory import peak_mib
from bitneck_testing.streams import empty_result
from bitneck_testing.tiny_bundles import make_tiny_bundle

ALLOWED_GROWTH_MIB = 16


def mutated(dice: random.Random, data: bytes) -> bytes:
    """A right input with one to four things wrong."""
    value = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        match dice.randrange(5):
            case 0 if value:
                value[dice.randrange(len(value))] ^= 1 << dice.randrange(8)
            case 1:
                del value[dice.randint(0, len(value)) :]
            case 2:
                value += dice.randbytes(dice.randint(1, 64))
            case 3:
                at = dice.randint(0, len(value))
                value[at:at] = dice.randbytes(dice.randint(1, 8))
            case _ if value:
                at = dice.randrange(len(value))
                value[at : at + dice.randint(1, 8)] = b"\xff" * dice.randint(0, 8)
    return bytes(value)


def files_of_strangers(bundle: Bundle) -> dict[str, tuple[list[bytes], Callable[[bytes], Any]]]:
    """What a device or a server reads of others beside frames: right examples, and the function that reads them."""
    names = [entry.name for entry in bundle.manifest.segments]
    labels = [pb.Label(index=k, name=name, score=0.5) for k, name in enumerate(names)]
    answers = [
        pb.ServerMessage(result=pb.Result(seq=7, output=pb.Output(classification=pb.Classification(labels=labels)))),
        pb.ServerMessage(set_point=pb.SetPoint(point="s1-r1", reason="a reason")),
        pb.ServerMessage(opened=pb.Opened(session_id="s-1", resume_token="t", window=4)),  # noqa: S106  no secret
        pb.ServerMessage(fault=pb.Fault(seq=3, code=8, message="a message")),
        pb.ServerMessage(go_away=pb.GoAway(reason="a reason")),
    ]
    graphs = [path for path in bundle.manifest.files if path.endswith(".onnx")]
    spec = bundle.manifest.input
    tables = [bundle.path(path).read_bytes() for path in bundle.manifest.files if path.endswith("/tables.npz")]
    conditional = [bundle.path(path).read_bytes() for path in bundle.manifest.files if "conditional" in path]
    contexts = [bundle.path(path).read_bytes() for path in bundle.manifest.files if path.endswith("/contexts.npz")]
    classes = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) // 100
    photographs = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, kind)
        photographs.append(buffer.getvalue())

    def answer(data: bytes) -> None:
        message = pb.ServerMessage()
        message.ParseFromString(data)
        server_message(message)

    return {
        "answer": ([message.SerializeToString() for message in answers], answer),
        "manifest": ([bundle.manifest_json], lambda data: Manifest.from_json(data, "here")),
        "tables": (tables, FactorizedModel.from_npz),
        "conditional tables": (conditional, ConditionalModel.from_npz),
        "contexts": (contexts, ContextModel.from_npz),
        "graph": (
            [bundle.path(path).read_bytes() for path in graphs],
            lambda data: check_onnx(data, (1, 3, spec.height, spec.width)),
        ),
        "class map": ([encode_map(classes)], lambda data: decode_map(data, height=24, width=32, number=8)),
        "photograph": (photographs, lambda data: load_photo(data, max_pixels=1 << 20)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)  # noqa: S311  inputs that can be repeated, no secret
    numbers = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_tiny_bundle(Path(folder) / "bundle", similar=("s1-r2", "s2-r1"), contextual=("s2-r1",))
        model = ServedModel(bundle, threads=1)
        strangers = files_of_strangers(model.bundle)
    symbols = numbers.integers(-6, 7, (200, 24, 3, 3)).astype(np.int32)
    codecs = [FactorizedCodec(FactorizedModel.fit(symbols), (24, 3, 3))]
    codecs += [decoder.codec for decoder in model.decoders.values()]
    codecs.append(FactorizedCodec(FactorizedModel.fit(symbols[:, :, :1, :1]), (24, 1, 1)))
    right = [(codec, codec.encode(numbers.integers(codec.tables.lo[:, None, None], codec.tables.hi[:, None, None] + 1,
              codec.latent_shape).astype(np.int32))) for codec in codecs for _ in range(20)]  # fmt: skip
    conditional = [decoder.conditional for decoder in model.decoders.values() if decoder.conditional is not None]
    similar = [(codec, codec.encode(s, codec.keep(s)), codec.keep(s)) for codec in conditional
               for s in [np.zeros(codec.latent_shape, np.int32)]]  # fmt: skip
    points = list(model.decoders)
    frames = [
        seal_frame(seq=k + 1, point=points[k % len(points)], payload=payload) for k, (_, payload) in enumerate(right)
    ]
    frames += [
        seal_frame(seq=k + 2, point=codec.point, payload=payload, reference=1, reference_crc32c=kept.crc32c)
        for k, (codec, payload, kept) in enumerate(similar)
    ]
    messages = [pb.ClientMessage(frame=frame_to_wire(frame)).SerializeToString() for frame in frames]
    messages.append(pb.ClientMessage(open=pb.Open(bundle_id=model.bundle.bundle_id, client="x")).SerializeToString())
    session = Session(
        session_id="s-1", model="m", client="c", ladder=model.ladder, window=64, assumed_fps=10, now=0.0,
        max_bytes_per_s=1e9,
    )  # fmt: skip
    session.keep(100)
    signer = TokenSigner(b"k" * 32, max_age_s=1e9)
    outcomes: Counter[str] = Counter()
    begin, warm = time.perf_counter(), 0.0
    for k in range(arguments.inputs):
        if k == min(20_000, arguments.inputs // 2):
            warm = peak_mib()
        random_bytes = dice.random() < 0.3
        try:
            if k % 4 == 3:
                kind = dice.choice(list(strangers))
                examples, read = strangers[kind]
                read(dice.randbytes(dice.randint(0, 400)) if random_bytes else mutated(dice, dice.choice(examples)))
            elif k % 8 == 1:
                codec, payload, kept = dice.choice(similar)
                data = dice.randbytes(dice.randint(0, 400)) if random_bytes else mutated(dice, payload)
                s = codec.decode(data, kept)
                assert codec.keep(s).symbols.shape == codec.latent_shape
                assert codec.encode(s, codec.keep(s)) is not None  # inside the tables
            elif k % 2:
                codec, payload = dice.choice(right)
                data = dice.randbytes(dice.randint(0, 400)) if random_bytes else mutated(dice, payload)
                s = codec.decode(data)
                lo, hi = codec.tables.lo[:, None, None], codec.tables.hi[:, None, None]
                assert s.shape == codec.latent_shape
                assert (s >= lo).all()
                assert (s <= hi).all()
                assert len(codec.encode(s)) >= len(data)
            else:
                data = dice.randbytes(dice.randint(0, 400)) if random_bytes else mutated(dice, dice.choice(messages))
                message = pb.ClientMessage()
                message.ParseFromString(data)
                if message.HasField("frame"):
                    frame = frame_from_wire(message.frame)
                    reference = session.reference(frame.seq, frame.reference, frame.point)
                    check_frame(frame, reference.crc32c if reference is not None else None)
                    model.check(frame)
                    session.accept(frame.seq, frame.point, len(frame.payload), k / 1e3)
                    session.complete(empty_result(frame.seq), dice.choice(similar)[2])
                    model.decode_similar(frame.point, frame.payload, reference)
                else:
                    assert signer.read(message.open.resume_token, 0.0) is None
            outcomes["taken"] += 1
        except (BitneckError, DecodeError) as exc:
            outcomes[type(exc).__name__] += 1
    grown = peak_mib() - warm
    print(
        f"{arguments.inputs} inputs in {time.perf_counter() - begin:.0f} s: "
        + ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
        + f"; peak memory grew by {grown:.1f} MiB"
    )
    if grown > ALLOWED_GROWTH_MIB:
        sys.exit(f"memory grew by {grown:.1f} MiB, more than {ALLOWED_GROWTH_MIB}")


if __name__ == "__main__":
    main()
