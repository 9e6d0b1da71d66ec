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
"""Operators, and weights, and shapes that the file declares."""
_MAX_NAMES = 1000
"""Tensors and attributes of one operator, and integers of one attribute."""
_MAX_RANK = 16
_MAX_LISTED = 1 << 16
"""Integers of a constant that are listed one by one, not raw."""
_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes of an element by ONNX's data type."""

Shape = tuple[int, ...]
Content = bytes | memoryview


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
    data: Content

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
    """What a file holds.

    Attributes:
        nodes: operators in order.
        constants: by name.
        shapes: of inputs and constants, by name.
        declared: shapes that the file says its tensors have; None stands for a length that it does not say. ONNX
            Runtime believes them when it loads the file, so they must be true.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    declared: list[tuple[str, list[int | None]]] = field(default_factory=list)


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
    content: Content | None = None
    for number, value in _fields(memoryview(data)):
        if number == 7:
            if content is not None:  # protobuf merges them
                raise refused("two graphs")
            content = _bytes(value)
        elif number in (20, 25):
            raise refused("functions or training parts")
    graph, inputs = Graph(), list[str]()
    for number, value in _fields(content or b""):
        if max(len(graph.nodes), len(graph.constants), len(graph.declared)) >= _MAX_NODES:
            raise refused(f"more than {_MAX_NODES} operators, weights or declared shapes")
        if number == 1:
            graph.nodes.append(_node(_bytes(value)))
        elif number == 5:
            name, tensor = _tensor(_bytes(value))
            if not name or name in graph.constants:
                raise refused("weights without a name of their own")
            graph.constants[name], graph.shapes[name] = tensor, tensor.shape
        elif number in (11, 12, 13):
            graph.declared.append(_declared(_bytes(value)))
            if number == 11:
                inputs.append(graph.declared[-1][0])
        elif number == 15:
            raise refused("sparse weights")
    inputs = [name for name in inputs if name not in graph.constants]
    if len(inputs) != 1:
        raise refused(f"{len(inputs)} inputs")
    graph.shapes[inputs[0]] = x
    if not graph.nodes:
        raise refused("no operators")
    return graph


def _fields(data: Content) -> Iterator[tuple[int, int | Content]]:
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


def _varint(data: Content, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _bytes(value: int | Content) -> Content:
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def _text(value: int | Content) -> str:
    return str(_bytes(value), "utf-8")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _add_integers(found: list[int], value: int | Content, most: int) -> None:
    """Add to a repeated integer field: one value, or several packed."""
    if isinstance(value, int):
        found.append(_signed(value))
    else:
        at = 0
        while at < len(value) and len(found) <= most:
            one, at = _varint(value, at)
            found.append(_signed(one))
    if len(found) > most:
        raise refused(f"a list of more than {most} integers")


def _node(data: Content) -> Node:
    node, attributes = Node("", [], []), set[str]()
    for number, value in _fields(data):
        if max(len(node.inputs), len(node.outputs), len(attributes)) >= _MAX_NAMES:
            raise refused(f"an operator with more than {_MAX_NAMES} tensors or attributes")
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 4:
            node.kind = _text(value)
        elif number == 5:
            name, ints = _attribute(_bytes(value))
            if name in attributes:
                raise refused("an attribute that is given twice")
            attributes.add(name)
            node.ints[name] = ints
        elif number == 7 and _bytes(value) not in (b"", b"ai.onnx"):
            raise refused(f"operators of {bytes(_bytes(value)[:40])!r}")
    return node


def _attribute(data: Content) -> tuple[str, list[int]]:
    name, text, ints, forms = "", b"", list[int](), list[int]()
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number in (3, 8):
            _add_integers(ints, value, _MAX_NAMES)
            forms.append(number)
        elif number == 4:
            text = bytes(_bytes(value)[:40])
        elif number in (5, 6, 10, 11, 22, 23):
            raise refused("a graph or a tensor inside an operator")
    if 3 in forms and len(forms) > 1:  # which of them counts is the reader's choice
        raise refused("an attribute of several values")
    if name == "auto_pad" and text not in (b"NOTSET", b""):
        raise refused("padding that is not given in numbers")
    if name == "keep_aspect_ratio_policy" and text not in (b"stretch", b""):
        raise refused("a size that another one decides")
    return name, ints


def _declared(data: Content) -> tuple[str, list[int | None]]:
    """The name and shape of a ``ValueInfoProto``; an empty shape if it says none."""
    name, lengths = "", list[int | None]()
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for form, kind in _fields(_bytes(value)):
                if form not in (1, 6):
                    raise refused("a value that is no tensor")
                shapes = [_bytes(shape) for part, shape in _fields(_bytes(kind)) if part == 2] if form == 1 else []
                for part, dimension in (each for shape in shapes for each in _fields(shape)):
                    if part == 1:
                        lengths.append(_length(_bytes(dimension)))
                    if len(lengths) > _MAX_RANK:
                        raise refused(f"a tensor of more than {_MAX_RANK} axes")
    return name, lengths


def _length(data: Content) -> int | None:
    """A dimension: its length, or None for one that has a name or nothing."""
    length = None
    for number, value in _fields(data):
        if number == 1:
            if not isinstance(value, int):
                raise ValueError("a length that is no number")
            length = _signed(value)
    return length


def _tensor(data: Content) -> tuple[str, Tensor]:
    name, kind, count = "", 0, 0
    raw: Content = b""
    shape: list[int] = []
    packed: list[int] = []
    for number, value in _fields(data):
        if number == 1:
            _add_integers(shape, value, _MAX_RANK)
        elif number == 2:
            if not isinstance(value, int):
                raise ValueError("a type that is no number")
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _bytes(value)
        elif number == 4:
            count += len(_bytes(value)) // 4
        elif number in (5, 7):
            _add_integers(packed, value, _MAX_LISTED)
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
