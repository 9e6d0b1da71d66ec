"""int8 files of what a device runs: static quantization, weights per channel, activations by their measured ranges.

    float32 file --ranges of its tensors on photographs--> int8 file

Convolutions become QDQ: activations uint8, weights int8 per output channel, rounded as `bitneck_models.export.rounding`
says. The last convolution of an encoder computes in float32, because its output are the symbols that are coded; only
its weights are int8.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from bitneck_models.export.rounding import Rounding, nearest, weight_scale

__all__ = ["Ranges", "quantized", "structure", "tensor_ranges", "weight_sum"]

Ranges = dict[str, tuple[float, float]]
"""The least and the largest value of each tensor of a file."""

_QUANTIZED = ["Conv", "Gemm", "Add", "Clip", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "PRelu", "Concat"]


def tensor_ranges(model: bytes, inputs: Iterable[NDArray[np.float32]]) -> tuple[Ranges, list[NDArray[np.float32]]]:
    """Run a file on some inputs, and note the range of each of its tensors.

    Args:
        model: the float32 file.
        inputs: (n, ...) float32 each.

    Returns:
        The ranges by tensor, and the outputs, one for each input.
    """
    graph = onnx.load_from_string(model)
    names = [graph.graph.input[0].name, *(name for node in graph.graph.node for name in node.output if name)]
    known = {value.name for value in graph.graph.output}
    output = graph.graph.output[0].name
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names[1:] if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ranges: Ranges = {}
    outputs = []
    for x in inputs:
        values = dict(zip(names[1:], session.run(names[1:], {names[0]: x}), strict=True)) | {names[0]: x}
        for name, value in values.items():
            low, high = ranges.get(name, (0.0, 0.0))  # zero has to be one of the 256 values
            ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
        outputs.append(values[output].copy())
    return ranges, outputs


def structure(model: bytes) -> str:
    """A digest of a file's operators, tensor names and sizes. The ranges of one file fit all with the same."""
    graph = onnx.load_from_string(model).graph
    lines = [f"{node.op_type} {' '.join(node.input)} > {' '.join(node.output)}" for node in graph.node]
    lines += [f"{tensor.name} {list(tensor.dims)}" for tensor in graph.initializer]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weight_sum(model: bytes) -> float:
    """The sum of the absolute weights of a file. Exports of one unit on different machines differ by rounding only."""
    tensors = (numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer)
    return float(sum(np.abs(t.astype(np.float64)).sum() for t in tensors if t.dtype == np.float32))


def quantized(
    model: bytes, ranges: Mapping[str, tuple[float, float]], rounding: Rounding, *, encoder: bool = False
) -> bytes:
    """The int8 file of a float32 file.

    Args:
        model: the float32 file.
        ranges: of its tensors, from `tensor_ranges`.
        rounding: of its weights, from `bitneck_models.export.rounding.rounded`.
        encoder: the file ends with the latent: its last convolution keeps float32 activations.

    Returns:
        The file; the same bytes each time.
    """
    graph = onnx.load_from_string(model)
    integers = {}
    for tensor in graph.graph.initializer:
        if tensor.name in rounding.biases:
            tensor.CopyFrom(numpy_helper.from_array(rounding.biases[tensor.name], tensor.name))
        elif tensor.name in rounding.deltas:
            weights = numpy_helper.to_array(tensor)
            integers[tensor.name] = (nearest(weights) + rounding.deltas[tensor.name]).astype(np.int8)
    for index, node in enumerate(graph.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    last = [node.name for node in graph.graph.node if node.op_type == "Conv"][-1:] if encoder else []
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        graph,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
        nodes_to_quantize=[],
        nodes_to_exclude=last,
        op_types_to_quantize=_QUANTIZED,
        extra_options={"ForceQuantizeNoInputCheck": False},
    )
    quantizer.quantize_model()
    with tempfile.TemporaryDirectory() as folder:
        quantizer.model.save_model_to_file(str(Path(folder) / "int8.onnx"), use_external_data_format=False)
        result = onnx.load(Path(folder) / "int8.onnx")
    for name in last:
        _weights_as_int8(result, name)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    for name, values in integers.items():
        stored[name + "_quantized"].CopyFrom(numpy_helper.from_array(values, name + "_quantized"))
    for node in result.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in result.graph.initializer:  # devices refuse files that speak of other files
        tensor.ClearField("data_location")
    del result.metadata_props[:]
    del result.graph.value_info[:]
    result.producer_name, result.producer_version = "bitneck", ""
    onnx.checker.check_model(result, full_check=True)
    return result.SerializeToString(deterministic=True)


def _weights_as_int8(model: onnx.ModelProto, name: str) -> None:
    """Store the weights of one convolution as int8 per output channel, made float32 again where they are used."""
    node = next(node for node in model.graph.node if node.name == name)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    weights = numpy_helper.to_array(tensor)
    model.graph.initializer.remove(tensor)
    parts = [tensor.name + suffix for suffix in ("_quantized", "_scale", "_zero_point")]
    arrays: tuple[NDArray[Any], ...] = (
        nearest(weights),
        weight_scale(weights),
        np.zeros(len(weights), dtype=np.int8),
    )
    model.graph.initializer.extend(numpy_helper.from_array(a, part) for a, part in zip(arrays, parts, strict=True))
    restored = helper.make_node("DequantizeLinear", parts, [tensor.name], name=name + "_weights", axis=0)
    model.graph.node.insert(list(model.graph.node).index(node), restored)
