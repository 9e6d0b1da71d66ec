"""A small real bundle made with onnx alone: random weights, real ONNX files, tables fitted to its own symbols.

    x (3,32,32) -> [seg 0] -> s2 (8,8,8) -> [seg 1] -> s1 (16,4,4) -> [seg 2] -> logits (10)

and one for segmentation:

    x (3,24,40) -> [seg 0] -> s2 (8,6,10) -> [seg 1] -> s1 (16,3,5) -> [seg 2] -> logits (5,24,40)
"""

import io
import json
from datetime import date
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bitneck.bundle import Bundle, BundleWriter
from bitneck.coding.conditional_model import KERNEL_TOTAL, ConditionalModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.manifest import InputSpec, Manifest, PointEntry, Segment, SplitPoint, Task

INPUT = InputSpec(height=32, width=32, resize=36, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLASSES = tuple(f"class {i}" for i in range(10))
SCENE_INPUT = InputSpec(
    height=24, width=40, fit="stretch", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
SCENE_CLASSES = ("sky", "road", "tree", "car", "sign")


def photo(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture: noise of a few pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def photo_bytes(seed: int = 0, fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, fmt)
    return buffer.getvalue()


def _model(
    name: str, nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.float32]], c: int, out: list[str]
) -> bytes:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", c, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *out])],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _conv(
    rng: np.random.Generator, name: str, cin: int, cout: int, stride: int, *, relu: bool = True, gain: float = 1.5
) -> bytes:
    w = (rng.normal(size=(cout, cin, stride, stride)) * gain / np.sqrt(cin * stride * stride)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c" if relu else "y"], kernel_shape=[stride] * 2, strides=[stride] * 2)
    ]
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"]))
    return _model(name, nodes, {"w": w}, cin, ["c", "h2", "w2"])


def _deconv(rng: np.random.Generator, name: str, cin: int, cout: int, stride: int) -> bytes:
    w = (rng.normal(size=(cin, cout, stride, stride)) / np.sqrt(cin)).astype(np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], kernel_shape=[stride] * 2, strides=[stride] * 2)
    return _model(name, [node], {"w": w}, cin, ["c", "h2", "w2"])


def _classifier(rng: np.random.Generator, name: str, cin: int) -> bytes:
    w = rng.normal(size=(cin, len(CLASSES))).astype(np.float32) * 2
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    return _model(name, nodes, {"w": w}, cin, ["k"])


def conditional(channels: int) -> ConditionalModel:
    """Two motions: hardly any change, and some."""
    distance = np.arange(16)
    kernels = np.stack([np.maximum(decay**distance * KERNEL_TOTAL, 1) for decay in (0.02, 0.3, 0.7)])
    rows = np.ones((2, channels), dtype=np.uint8)
    still_and_moving = np.array([[56], [16]], dtype=np.uint8)
    return ConditionalModel(
        np.rint(kernels).astype(np.int64),
        rows * 0,
        rows + np.array([[0], [1]], dtype=np.uint8),
        rows * still_and_moving,
    )


def _segmenter(rng: np.random.Generator, name: str, cin: int) -> bytes:
    """A 1x1 convolution to the classes, enlarged to the input's size."""
    w = rng.normal(size=(len(SCENE_CLASSES), cin, 1, 1)).astype(np.float32) * 2
    scales = np.array([1, 1, 8, 8], dtype=np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Resize", ["c", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"),
    ]
    return _model(name, nodes, {"w": w, "s": scales}, cin, ["k", "h2", "w2"])


PointRow = tuple[str, str, int, int, int, float, tuple[int, int, int], float, float]
#    id       split  C   Cr stride step   latent      bytes top-1
POINTS: tuple[PointRow, ...] = (
    ("s1-r1", "s1", 16, 4, 4, 0.5, (4, 1, 1), 4.0, 0.6),
    ("s1-r2", "s1", 16, 8, 2, 0.2, (8, 2, 2), 16.0, 0.8),
    ("s2-r1", "s2", 8, 6, 4, 0.2, (6, 2, 2), 12.0, 0.7),
)
SCENE_POINTS: tuple[PointRow, ...] = (
    ("s1-r1", "s1", 16, 4, 1, 0.5, (4, 3, 5), 20.0, 0.4),
    ("s1-r2", "s1", 16, 12, 1, 0.1, (12, 3, 5), 90.0, 0.6),
    ("s2-r1", "s2", 8, 6, 2, 0.2, (6, 3, 5), 60.0, 0.5),
)


def make_tiny_bundle(
    root: Path,
    *,
    seed: int = 0,
    name: str = "tiny",
    drop_points: tuple[str, ...] = (),
    task: Task = "classification",
    similar: tuple[str, ...] = (),
) -> Bundle:
    """Write the bundle to `root`; another seed gives another bundle id. `similar` points get conditional tables."""
    from bitneck.chain import PointEncoder, SegmentChain
    from bitneck.image import preprocess

    rng = np.random.default_rng(seed)
    scene = task == "segmentation"
    spec, classes = (SCENE_INPUT, SCENE_CLASSES) if scene else (INPUT, CLASSES)
    h, w = spec.height // 8, spec.width // 8
    last = _segmenter if scene else _classifier
    segments = [_conv(rng, "seg0", 3, 8, 4), _conv(rng, "seg1", 8, 16, 2), last(rng, "seg2", 16)]
    roles = ("edge", "both", "cloud")
    points = list(SCENE_POINTS if scene else POINTS)
    points = [p for p in points if p[0] not in drop_points]
    units = {
        p[0]: (_conv(rng, "enc", p[2], p[3], p[4], relu=False), _deconv(rng, "dec", p[3], p[2], p[4])) for p in points
    }
    entries = [
        PointEntry(
            id=p[0], split=p[1], stride=p[4], channels=p[3], step=p[5], latent_shape=p[6], payload_bytes=p[7],
            bpp_payload=p[7] * 8 / spec.pixels, accuracy=p[8], agreement=p[8], dataset="random", images=10,
            measured=date(2026, 1, 1),
        )
        for p in points
    ]  # fmt: skip

    def write(tables: dict[str, FactorizedModel]) -> Bundle:
        with BundleWriter(root) as writer:
            for index, (data, role) in enumerate(zip(segments, roles, strict=True)):
                writer.add(f"segments/{index:02d}-seg{index}.onnx", data, role)  # type: ignore[arg-type]
            for p in points:
                writer.add(f"points/{p[0]}/encoder.onnx", units[p[0]][0], "edge")
                writer.add(f"points/{p[0]}/decoder.onnx", units[p[0]][1], "cloud")
                writer.add(f"points/{p[0]}/tables.npz", tables[p[0]].to_npz(), "both")
                if p[0] in similar:
                    writer.add(f"points/{p[0]}/conditional.npz", conditional(p[3]).to_npz(), "both")
            writer.add("labels.json", json.dumps(classes).encode(), "both" if scene else "cloud")
            return writer.finish(
                Manifest(
                    name=name,
                    backbone="tiny",
                    task=task,
                    input=spec,
                    uncompressed_accuracy=0.9,
                    labels="labels.json",
                    segments=tuple(Segment(name=f"seg{i}", file=f"segments/{i:02d}-seg{i}.onnx") for i in range(3)),
                    split_points=(
                        SplitPoint(name="s2", after_segment=0, feature_shape=(8, 2 * h, 2 * w)),
                        SplitPoint(name="s1", after_segment=1, feature_shape=(16, h, w)),
                    ),
                    points=tuple(entries),
                    files=writer.files,
                )
            )

    wide = {
        p[0]: FactorizedModel.fit(np.stack([np.full(p[6], v, dtype=np.int32) for v in (-200, 200)])) for p in points
    }
    first = write(wide)  # its encoders tell which symbols occur; then the tables are fitted to them
    chain = SegmentChain(first, threads=1)
    fitted = {}
    for p in points:
        encoder = PointEncoder(first, first.manifest.ladder[p[0]])
        symbols = [
            encoder.symbols(chain.run(preprocess(photo(i), spec), 0, chain.head_length(p[1]))) for i in range(100, 130)
        ]
        fitted[p[0]] = FactorizedModel.fit(np.stack(symbols))
    return write(fitted)
