"""Small real bundles, made with onnx alone: random weights, real ONNX files, tables fitted to their own symbols.

For classification:

    x (3,32,32) -> [seg 0] -> s2 (8,8,8) -> [seg 1] -> s1 (16,4,4) -> [seg 2] -> logits (10)

For segmentation:

    x (3,24,40) -> [seg 0] -> s2 (8,6,10) -> [seg 1] -> s1 (16,3,5) -> [seg 2] -> logits (5,24,40)
"""

import json
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitneck.bundle import Bundle, BundleWriter
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.coding.conditional_model import KERNEL_TOTAL, ConditionalModel
from bitneck.coding.context_model import WEIGHT_ONE, ContextModel
from bitneck.coding.factorized_model import FactorizedModel, to_counts
from bitneck.image import preprocess
from bitneck.manifest import FileRole, InputSpec, Manifest, PointEntry, Segment, SplitPoint, Task, UnitEntry
from bitneck_testing.photographs import photo

__all__ = ["CLASSES", "INPUT", "SCENE_CLASSES", "SCENE_INPUT", "conditional", "contexts", "make_tiny_bundle"]

INPUT = InputSpec(height=32, width=32, resize=36, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLASSES = tuple(f"class {i}" for i in range(10))
SCENE_INPUT = InputSpec(
    height=24, width=40, fit="stretch", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
SCENE_CLASSES = ("sky", "road", "tree", "car", "sign")


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


def _segmenter(rng: np.random.Generator, name: str, cin: int) -> bytes:
    """A 1x1 convolution to the classes, enlarged to the input's size."""
    w = rng.normal(size=(len(SCENE_CLASSES), cin, 1, 1)).astype(np.float32) * 2
    scales = np.array([1, 1, 8, 8], dtype=np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Resize", ["c", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="half_pixel"),
    ]
    return _model(name, nodes, {"w": w, "s": scales}, cin, ["k", "h2", "w2"])


def conditional(channels: int) -> ConditionalModel:
    """Conditional tables for two kinds of motion: hardly any change, and some."""
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


def contexts(tables: FactorizedModel) -> ContextModel:
    """Contexts with one class to either side: a symbol is likely to be as its neighbours are."""
    channels = tables.channels
    half = int((tables.hi - tables.lo).max()) + 1
    banks = tuple(
        np.stack([to_counts(decay ** np.abs(np.arange(-half, half + 1))) for decay in decays])
        for decays in ((0.8, 0.5), (0.7,))
    )
    band = (np.arange(channels) % 2).astype(np.uint8)
    table = np.zeros((7, channels), np.uint16)
    table[1:, ::2] = 1
    middle = np.clip(np.array([[0], [-1], [0], [1], [-1], [0], [1]]), tables.lo, tables.hi).astype(np.int16)
    weights = np.full((2, 4, channels), WEIGHT_ONE // 4, np.int16)
    return ContextModel(weights, table, middle, band, banks)


class _Row(NamedTuple):
    """An operating point: what its unit looks like, and figures that nothing measured."""

    id: str
    split: str
    features: int
    channels: int
    stride: int
    step: float
    latent_shape: tuple[int, int, int]
    payload_bytes: float
    accuracy: float


_ROWS: dict[Task, tuple[_Row, ...]] = {
    "classification": (
        _Row("s1-r1", "s1", 16, 4, 4, 0.5, (4, 1, 1), 4.0, 0.6),
        _Row("s1-r2", "s1", 16, 8, 2, 0.2, (8, 2, 2), 16.0, 0.8),
        _Row("s2-r1", "s2", 8, 6, 4, 0.2, (6, 2, 2), 12.0, 0.7),
    ),
    "segmentation": (
        _Row("s1-r1", "s1", 16, 4, 1, 0.5, (4, 3, 5), 20.0, 0.4),
        _Row("s1-r2", "s1", 16, 12, 1, 0.1, (12, 3, 5), 90.0, 0.6),
        _Row("s2-r1", "s2", 8, 6, 2, 0.2, (6, 3, 5), 60.0, 0.5),
    ),
}
_ROLES: tuple[FileRole, ...] = ("edge", "both", "cloud")
"""Of the three segments."""
_FITTED_TO = range(100, 130)
"""Seeds of the photographs that the tables are fitted to."""


def make_tiny_bundle(
    root: Path,
    *,
    seed: int = 0,
    name: str = "tiny",
    drop_points: tuple[str, ...] = (),
    task: Task = "classification",
    similar: tuple[str, ...] = (),
    contextual: tuple[str, ...] = (),
) -> Bundle:
    """Write a bundle with the operating points s1-r1, s1-r2 and s2-r1 to `root`.

    Args:
        root: the bundle's folder.
        seed: of the weights; another seed gives another bundle id.
        name: the bundle's name.
        drop_points: operating points to leave out.
        task: "segmentation" gives an input of 24x40 and a class map of that size.
        similar: operating points that get conditional tables, for similar frames.
        contextual: operating points that get contexts.
    """
    rng = np.random.default_rng(seed)
    scene = task == "segmentation"
    spec, classes = (SCENE_INPUT, SCENE_CLASSES) if scene else (INPUT, CLASSES)
    h, w = spec.height // 8, spec.width // 8
    last = _segmenter if scene else _classifier
    segments = [_conv(rng, "seg0", 3, 8, 4), _conv(rng, "seg1", 8, 16, 2), last(rng, "seg2", 16)]
    rows = [row for row in _ROWS[task] if row.id not in drop_points]
    units = {
        row.id: (
            _conv(rng, "enc", row.features, row.channels, row.stride, relu=False),
            _deconv(rng, "dec", row.channels, row.features, row.stride),
        )
        for row in rows
    }

    def write(tables: dict[str, FactorizedModel]) -> Bundle:
        with BundleWriter(root) as writer:
            for index, (data, role) in enumerate(zip(segments, _ROLES, strict=True)):
                writer.add(f"segments/{index:02d}-seg{index}.onnx", data, role)
            for row in rows:
                encoder, decoder = units[row.id]
                writer.add(f"units/{row.id}/encoder.onnx", encoder, "edge")
                writer.add(f"units/{row.id}/decoder.onnx", decoder, "cloud")
                writer.add(f"points/{row.id}/tables.npz", tables[row.id].to_npz(), "both")
                if row.id in contextual:
                    writer.add(f"points/{row.id}/contexts.npz", contexts(tables[row.id]).to_npz(), "both")
                if row.id in similar:
                    writer.add(f"points/{row.id}/conditional.npz", conditional(row.channels).to_npz(), "both")
            writer.add("labels.json", json.dumps(classes).encode(), "both")
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
                    units=tuple(
                        UnitEntry(
                            id=row.id,
                            split=row.split,
                            stride=row.stride,
                            channels=row.channels,
                            latent_shape=row.latent_shape,
                        )
                        for row in rows
                    ),
                    points=tuple(_entry(row, spec) for row in rows),
                    files=writer.files,
                )
            )

    # Tables that hold any symbol come first: the bundle's own encoders then tell which symbols occur.
    extremes = {row.id: [np.full(row.latent_shape, value, dtype=np.int32) for value in (-200, 200)] for row in rows}
    wide = write({row_id: FactorizedModel.fit(np.stack(symbols)) for row_id, symbols in extremes.items()})
    chain = SegmentChain(wide, threads=1)
    fitted = {}
    for row in rows:
        encoder, head = PointEncoder(wide, wide.manifest.ladder[row.id]), chain.head_length(row.split)
        symbols = [encoder.symbols(chain.run(preprocess(photo(k), spec), 0, head)) for k in _FITTED_TO]
        fitted[row.id] = FactorizedModel.fit(np.stack(symbols))
    return write(fitted)


def _entry(row: _Row, spec: InputSpec) -> PointEntry:
    return PointEntry(
        id=row.id, unit=row.id, step=row.step, payload_bytes=row.payload_bytes,
        bpp_payload=row.payload_bytes * 8 / spec.pixels, accuracy=row.accuracy, agreement=row.accuracy,
        dataset="random", images=10, measured=date(2026, 1, 1),
    )  # fmt: skip
