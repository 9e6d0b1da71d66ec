"""Weights of int8 convolutions, rounded one after the other: each error is made up for by the weights after it.

This is GPTQ (Frantar et al., arXiv 2210.17323) for convolutions: the second moments of a convolution's inputs say which
rounded weights give the least error of its outputs. The mean error that is left goes into the bias.

Dimensions: O output channels, I = inputs of an output channel (channels of a group * K * K), P places.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["Rounding", "nearest", "rounded", "weight_scale"]

_LEVELS = 127
_PLACES = 4096
"""Places of one input that count for the second moments, at most, spread evenly."""
_DAMPING = 0.01
"""Of the second moments' mean diagonal; keeps them invertible."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a file's weights are rounded.

    Attributes:
        deltas: by weight tensor: what is added to the nearest integers, of the weights' shape, int8.
        biases: by bias tensor: its new values, (O,) float32.
    """

    deltas: dict[str, NDArray[np.int8]]
    biases: dict[str, NDArray[np.float32]]


def weight_scale(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """The step of each output channel's int8 weights, (O,)."""
    largest = np.abs(weights).reshape(len(weights), -1).max(1) / _LEVELS
    scale: NDArray[np.float32] = np.maximum(largest, np.finfo(np.float32).tiny).astype(np.float32)
    return scale


def nearest(weights: NDArray[np.floating]) -> NDArray[np.int8]:
    """Weights as the nearest int8 values, of the same shape."""
    scale = weight_scale(weights).reshape(-1, *[1] * (weights.ndim - 1))
    integers: NDArray[np.int8] = np.clip(np.rint(weights / scale), -_LEVELS, _LEVELS).astype(np.int8)
    return integers


def rounded(model: bytes, inputs: Iterable[NDArray[np.float32]]) -> Rounding:
    """Round the weights of a file's convolutions for some inputs.

    Args:
        model: the float32 file.
        inputs: (n, ...) float32 each.
    """
    graph = onnx.load_from_string(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv" and node.input[1] in tensors]
    moments = {node.output[0]: _Moments(node, tensors[node.input[1]]) for node in convolutions}
    source = graph.graph.input[0].name
    wanted = [name for name in dict.fromkeys(node.input[0] for node in convolutions) if name != source]
    known = {value.name for value in graph.graph.output}
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in known
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for x in inputs:
        values = dict(zip(wanted, session.run(wanted, {source: x}), strict=True)) if wanted else {}
        values[source] = x
        for node in convolutions:
            moments[node.output[0]].add(values[node.input[0]])
    deltas, biases = {}, {}
    for node in convolutions:
        weights = tensors[node.input[1]]
        integers, shift = moments[node.output[0]].round()
        deltas[node.input[1]] = (integers - nearest(weights)).astype(np.int8)
        if len(node.input) > 2 and node.input[2] in tensors:
            biases[node.input[2]] = (tensors[node.input[2]] + shift).astype(np.float32)
    return Rounding(deltas, biases)


class _Moments:
    """Second moments and mean of one convolution's inputs, for each of its groups."""

    def __init__(self, node: onnx.NodeProto, weights: NDArray[np.float32]) -> None:
        values = {attribute.name: list(attribute.ints) or [attribute.i] for attribute in node.attribute}
        self._weights = weights
        self._groups = values.get("group", [1])[0]
        self._strides = values.get("strides", [1, 1])
        self._pads = values.get("pads", [0, 0, 0, 0])
        self._dilations = values.get("dilations", [1, 1])
        size = int(np.prod(weights.shape[1:]))
        self._second = np.zeros((self._groups, size, size))
        self._first = np.zeros((self._groups, size))
        self._count = 0

    def add(self, x: NDArray[np.float32]) -> None:
        """Count an input, (n, C, h, w)."""
        top, left, bottom, right = self._pads
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        kernel = [(k - 1) * d + 1 for k, d in zip(self._weights.shape[2:], self._dilations, strict=True)]
        windows = sliding_window_view(x, kernel, axis=(2, 3))
        rows, columns = self._strides
        windows = windows[:, :, ::rows, ::columns, :: self._dilations[0], :: self._dilations[1]]
        n, _channels, height, width, *_ = windows.shape
        places = np.unique(np.linspace(0, n * height * width - 1, min(_PLACES, n * height * width)).astype(np.intp))
        image, place = np.divmod(places, height * width)
        chosen = windows[image, :, place // width, place % width]  # (P, C, K, K)
        by_group = chosen.reshape(len(places), self._groups, -1).transpose(1, 0, 2).astype(np.float64)  # (G, P, I)
        self._second += by_group.transpose(0, 2, 1) @ by_group
        self._first += by_group.sum(1)
        self._count += len(places)

    def round(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The integers, of the weights' shape, and what the bias has to add for the mean error, (O,)."""
        flat = self._weights.reshape(self._groups, len(self._weights) // self._groups, -1).astype(np.float64)
        scales = weight_scale(self._weights).astype(np.float64).reshape(self._groups, -1)
        integers = np.stack(
            [_gptq(w, h / self._count, s) for w, h, s in zip(flat, self._second, scales, strict=True)]
        )  # (G, O / G, I)
        errors = flat - integers * scales[:, :, None]
        shift = np.einsum("goi,gi->go", errors, self._first / self._count).reshape(-1)
        return integers.reshape(self._weights.shape).astype(np.int64), shift


def _gptq(weights: NDArray[np.float64], second: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round the columns of a matrix one after the other.

    Args:
        weights: (O, I).
        second: second moments of the inputs, (I, I).
        scale: step of each row, (O,).

    Returns:
        Integers of at most 127, (O, I).
    """
    size = len(second)
    damped = second + np.eye(size) * (_DAMPING * np.trace(second) / size + 1e-9)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, integers = weights.copy(), np.zeros_like(weights)
    for i in range(size):
        integers[:, i] = np.clip(np.rint(left[:, i] / scale), -_LEVELS, _LEVELS)
        error = (left[:, i] - integers[:, i] * scale) / upper[i, i]
        left[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    return integers
