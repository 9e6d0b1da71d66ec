"""The cost of a part of a bundle: parameters and multiply-adds, counted from the ONNX file that is deployed.

These are the figures of Table 4 of the paper. Multiply-adds are those of convolutions and matrix products. Biases,
activations and pooling are not counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper

from bitneck.errors import BundleCorrupt
from bitneck.ladder import OperatingPoint
from bitneck.manifest import Manifest

__all__ = ["Complexity", "PointComplexity", "onnx_complexity", "point_complexity"]


@dataclass(frozen=True, slots=True)
class Complexity:
    """The cost of one photograph in one module."""

    parameters: int
    multiply_adds: int

    def __add__(self, other: "Complexity") -> "Complexity":
        """The cost of two modules, one after the other."""
        return Complexity(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointComplexity:
    """The cost of the four parts. Head and encoder run at the edge, decoder and tail in the cloud."""

    head: Complexity
    encoder: Complexity
    decoder: Complexity
    tail: Complexity


def point_complexity(root: Path, manifest: Manifest, point: OperatingPoint) -> PointComplexity:
    """Count the four parts of one operating point.

    Args:
        root: the bundle's folder.
        manifest: of the bundle.
        point: one of its operating points.
    """
    cut = manifest.split(point.split).after_segment + 1
    unit = manifest.unit(point.unit)
    spec, sent = manifest.input, manifest.split(point.split).feature_shape
    return PointComplexity(
        head=_chain(root, manifest, range(cut), (3, spec.height, spec.width)),
        encoder=_files(root, unit.encoder_files, sent),
        decoder=onnx_complexity(root / unit.decoder, point.latent_shape),
        tail=_chain(root, manifest, range(cut, len(manifest.segments)), manifest.decoded_shape(unit.id)),
    )


def _chain(root: Path, manifest: Manifest, segments: range, shape: tuple[int, ...]) -> Complexity:
    """Segments one after the other. `shape` is the first segment's input, without the batch axis."""
    return _files(root, [manifest.segments[index].file for index in segments], shape)


def _files(root: Path, files: Sequence[str], shape: tuple[int, ...]) -> Complexity:
    """Files one after the other. `shape` is the first one's input, without the batch axis."""
    total = Complexity(0, 0)
    for file in files:
        part, shape = _measured(root / file, shape)
        total += part
    return total


def onnx_complexity(path: Path, input_shape: Sequence[int]) -> Complexity:
    """Count one file, for a batch of one.

    Args:
        path: the ONNX file.
        input_shape: of one sample, without the batch axis. The file may leave height and width open.

    Raises:
        BundleCorrupt: it is no ONNX file, or its shapes cannot be inferred.
    """
    return _measured(path, input_shape)[0]


def _measured(path: Path, input_shape: Sequence[int]) -> tuple[Complexity, tuple[int, ...]]:
    """The count (see `onnx_complexity`) and the output's shape, without the batch axis."""
    try:
        model = onnx.load(path)
        for value in model.graph.input:
            for axis, size in zip(value.type.tensor_type.shape.dim, (1, *input_shape), strict=True):
                axis.dim_value = size
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as exc:  # onnx raises many types for a broken file
        raise BundleCorrupt(f"{path}: not readable as ONNX ({exc})") from exc
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in _values(graph)}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    parameters = sum(math.prod(t.dims) for t in graph.initializer if numpy_helper.to_array(t).dtype.kind == "f")
    counted = Complexity(parameters, sum(_multiply_adds(node, shapes, path) for node in graph.node))
    return counted, tuple(shapes[graph.output[0].name][1:])


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, list[int]], path: Path) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"):
        return 0
    try:
        weight, result, inputs = shapes[node.input[1]], shapes[node.output[0]], shapes[node.input[0]]
    except KeyError as exc:
        raise BundleCorrupt(f"{path}: the shape of {exc} is unknown") from exc
    if not all((*weight, *result, *inputs)):
        raise BundleCorrupt(f"{path}: the shapes at {node.op_type} {node.name} cannot be inferred")
    match node.op_type:
        case "Conv":
            return math.prod(result) * math.prod(weight[1:])
        case "ConvTranspose":
            return math.prod(inputs) * math.prod(weight[1:])
        case "Einsum":
            return _einsum(node, inputs, weight)
        case _:  # Gemm and MatMul sum over the input's last dimension
            return math.prod(result) * inputs[-1]


def _einsum(node: onnx.NodeProto, left: list[int], right: list[int]) -> int:
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    first, second = equation.split("->")[0].split(",")
    sizes = dict(zip(first, left, strict=True)) | dict(zip(second, right, strict=True))
    return math.prod(sizes.values())
