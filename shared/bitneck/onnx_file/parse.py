"""The protobuf of an ONNX model, as far as its cost needs it: operators, attributes in integers, shapes of weights.

Numbers of the fields are those of ``onnx.proto``. What could hide work, such as a graph inside an operator, is refused.
Pure.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from bitneck.errors import BundleCorrupt

__all__ = ["Graph", "Node", "Shape", "Tensor", "read_graph", "refused"]

_MAX_NODES = 20_000
_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of an element by ONNX's data type."""

Shape = tuple[int, ...]


@dataclass
class Node:
    """An operator: its kind, the names of its tensors, and its attributes in integers."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    ints: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Tensor:
    """A constant of the file. `data` is empty if it is of floats that are not stored raw."""

    shape: Shape
    kind: int
    data: bytes

    @classmethod
    def of_integers(cls, values: Sequence[int]) -> Self:
        """An int64 tensor of one axis."""
        return cls((len(values),), 7, struct.pack(f"<{len(values)}q", *values))

    def floats(self) -> list[float]:
        """The values of a float tensor."""
        if self.kind != 1 or not self.data:
            raise refused("a scale that is not given in floats")
        return list(struct.unpack(f"<{math.prod(self.shape)}f", self.data))

    def integers(self) -> list[int]:
        """The values of an int64 or int32 tensor."""
        code = {6: "i", 7: "q"}.get(self.kind)
        if code is None:
            raise refused("a shape that is not given in integers")
        return list(struct.unpack(f"<{math.prod(self.shape)}{code}", self.data))


@dataclass
class Graph:
    """What a file holds: operators in order, constants by name, and the shapes of inputs and constants by name."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)


def refused(what: str) -> BundleCorrupt:
    """The error of a file that has something whose cost cannot be known."""
    return BundleCorrupt(
        f"the ONNX file has {what}, so what it would take cannot be bounded; it is not run. If you trust the bundle, "
        "pin it (--bundle-id)"
    )


def read_graph(data: bytes, x: Shape) -> Graph:
    """Read a model.

    Args:
        data: the file's bytes.
        x: the shape of its one input.

    Raises:
        BundleCorrupt: see `refused`.
        ValueError, IndexError: it is no protobuf of a model.
    """
    content = b""
    for number, value in _fields(data):
        if number == 7:
            content = _bytes(value)
        elif number in (20, 25):
            raise refused("functions or training parts")
    graph, inputs = Graph(), list[str]()
    for number, value in _fields(content):
        if number == 1:
            graph.nodes.append(_node(_bytes(value)))
        elif number == 5:
            name, tensor = _tensor(_bytes(value))
            graph.constants[name], graph.shapes[name] = tensor, tensor.shape
        elif number == 11:
            inputs.append(_name(_bytes(value)))
        elif number == 15:
            raise refused("sparse weights")
    inputs = [name for name in inputs if name not in graph.constants]
    if len(inputs) != 1:
        raise refused(f"{len(inputs)} inputs")
    graph.shapes[inputs[0]] = x
    if not 1 <= len(graph.nodes) <= _MAX_NODES:
        raise refused(f"{len(graph.nodes)} operators")
    return graph


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; a value is an integer, or the bytes of a longer one."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("cut short")
            yield number, data[at : at + length]
            at += length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _integers(value: int | bytes) -> list[int]:
    """A repeated integer field: one value, or several packed."""
    if isinstance(value, int):
        return [_signed(value)]
    found, at = [], 0
    while at < len(value):
        one, at = _varint(value, at)
        found.append(_signed(one))
    return found


def _node(data: bytes) -> Node:
    node = Node("", [], [])
    for number, value in _fields(data):
        if number == 1:
            node.inputs.append(_bytes(value).decode())
        elif number == 2:
            node.outputs.append(_bytes(value).decode())
        elif number == 4:
            node.kind = _bytes(value).decode()
        elif number == 5:
            name, ints = _attribute(_bytes(value))
            node.ints[name] = ints
        elif number == 7 and _bytes(value) not in (b"", b"ai.onnx"):
            raise refused(f"operators of {_bytes(value)[:40]!r}")
    return node


def _attribute(data: bytes) -> tuple[str, list[int]]:
    name, ints = "", []
    for number, value in _fields(data):
        if number == 1:
            name = _bytes(value).decode()
        elif number in (3, 8):
            ints += _integers(value)
        elif number == 4 and _bytes(value) not in (b"NOTSET", b"") and b"auto_pad" in data:
            raise refused("padding that is not given in numbers")
        elif number in (5, 6, 10, 11, 22, 23):
            raise refused("a graph or a tensor inside an operator")
    return name, ints


def _tensor(data: bytes) -> tuple[str, Tensor]:
    name, shape, kind, raw, count = "", [], 0, b"", 0
    packed: list[int] = []
    for number, value in _fields(data):
        if number == 1:
            shape += _integers(value)
        elif number == 2:
            (kind,) = _integers(value)
        elif number == 8:
            name = _bytes(value).decode()
        elif number == 9:
            raw = _bytes(value)
        elif number == 4:
            count += len(_bytes(value)) // 4
        elif number in (5, 7):
            packed += _integers(value)
        elif number in (13, 14):
            raise refused("weights in another file")
        elif number in (6, 10, 11):
            raise refused("weights of a type that is not used")
    if kind not in _SIZES or any(length < 0 for length in shape):
        raise refused("weights of an unknown type")
    size = math.prod(shape)
    if packed:
        if kind == 7:
            raw = struct.pack(f"<{len(packed)}q", *packed)
        elif kind == 6:
            raw = struct.pack(f"<{len(packed)}i", *packed)
        else:
            raw, count = b"", len(packed)
    if (len(raw) != size * _SIZES[kind]) and count != size:
        raise refused("weights of another size than they say")
    return name, Tensor(tuple(shape), kind, raw)


def _name(data: bytes) -> str:
    return next((_bytes(value).decode() for number, value in _fields(data) if number == 1), "")
