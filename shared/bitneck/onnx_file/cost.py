"""What a run of an ONNX file takes, found without ONNX Runtime, so that a file from a stranger can be refused. Pure.

ONNX Runtime runs what a file says, also at loading: 200 bytes can ask for gigabytes, or never end. Here the operators
must be known, and the shapes that follow from the input give the memory and the multiply-adds of a run.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bitneck.errors import BundleCorrupt
from bitneck.onnx_file.parse import Node, Shape, Tensor, read_graph, refused

__all__ = ["MAX_MULTIPLY_ADDS", "MAX_TENSOR_BYTES", "Cost", "check_onnx"]

MAX_TENSOR_BYTES = 1 << 29
"""What all tensors of a run may take together; EfficientNet-Lite0's whole network takes 30 MB."""
MAX_MULTIPLY_ADDS = 50_000_000_000
"""Of a run; EfficientNet-Lite0 has 0.4 of these billions, a ResNet-152 at 224 pixels 11.5."""
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes: bytes of all tensors, multiply-adds, and the shape of the output."""

    tensor_bytes: int
    multiply_adds: int
    y: Shape


def check_onnx(data: bytes, x: Shape) -> Cost:
    """Check a file that has one input and one output.

    Args:
        data: the file's bytes.
        x: the shape of its input.

    Raises:
        BundleCorrupt: it is no ONNX model, has unknown operators or weights elsewhere, or would take too much.
    """
    try:
        return _check(data, x)
    except (
        IndexError,
        ValueError,
        KeyError,
        UnicodeDecodeError,
        struct.error,
        OverflowError,
        ZeroDivisionError,
    ) as exc:
        raise refused(f"a part that cannot be read ({type(exc).__name__}: {str(exc)[:80]})") from exc


def _check(data: bytes, x: Shape) -> Cost:
    graph, y = read_graph(data, x), x
    shapes = graph.shapes
    taken, work = sum(math.prod(shape) * _FLOAT_BYTES for shape in shapes.values()), 0
    for node in graph.nodes:
        rule = _RULES.get(node.kind)
        if rule is None:
            raise refused(f"the operator {node.kind[:40]!r}")
        got = [shapes[name] for name in node.inputs if name]
        shape, operations = rule(node, got, [graph.constants.get(name) for name in node.inputs])
        if any(length < 1 for length in shape):
            raise refused(f"an impossible shape at {node.kind}")
        work += operations
        if any(name and name in shapes for name in node.outputs):
            raise refused("a tensor that is made twice")
        for name in node.outputs[:1]:
            shapes[name] = y = shape
            if (values := _integers(node, got, [graph.constants.get(name) for name in node.inputs])) is not None:
                graph.constants[name] = Tensor.of_integers(values)
            taken += math.prod(shape) * _FLOAT_BYTES
        if taken > MAX_TENSOR_BYTES or work > MAX_MULTIPLY_ADDS:
            raise BundleCorrupt(
                f"the ONNX file would take more than {MAX_TENSOR_BYTES >> 20} MiB or {MAX_MULTIPLY_ADDS / 1e9:.0f} "
                "billion multiply-adds for one picture; it is not run. If you trust the bundle, pin it (--bundle-id)"
            )
    for name, declared in graph.declared:
        real = shapes.get(name)
        if declared and real is not None and not _true(declared, real):
            raise refused(f"a tensor of the shape {real} for which it declares another one")
    return Cost(taken, work, y)


def _true(declared: Sequence[int | None], real: Shape) -> bool:
    """Whether a tensor has the shape that the file says, as far as it says one."""
    return len(declared) == len(real) and all(a is None or a == b for a, b in zip(declared, real, strict=True))


Rule = Callable[[Node, Sequence[Shape], Sequence[Tensor | None]], tuple[Shape, int]]


def _same(_node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    return got[0], math.prod(got[0])


def _broadcast(_node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    rank = max(len(shape) for shape in got)
    padded = [(1,) * (rank - len(shape)) + shape for shape in got]
    shape = tuple(max(lengths) for lengths in zip(*padded, strict=True))
    return shape, math.prod(shape)


def _windows(node: Node, shape: Shape, kernel: Sequence[int]) -> list[int]:
    spatial = len(shape) - 2
    strides = node.ints.get("strides") or [1] * spatial
    dilations = node.ints.get("dilations") or [1] * spatial
    pads = node.ints.get("pads") or [0] * (2 * spatial)
    ceil = bool((node.ints.get("ceil_mode") or [0])[0])
    lengths = []
    for k in range(spatial):
        if min(strides[k], dilations[k], kernel[k]) < 1 or min(pads[k], pads[k + spatial]) < 0:
            raise ValueError("impossible windows")
        free = shape[k + 2] + pads[k] + pads[k + spatial] - dilations[k] * (kernel[k] - 1) - 1
        lengths.append((-(-free // strides[k]) if ceil else free // strides[k]) + 1)
    return lengths


def _conv(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    x, weights = got[0], got[1]
    shape = (x[0], weights[0], *_windows(node, x, weights[2:]))
    return shape, math.prod(shape) * math.prod(weights[1:])


def _pool(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    kernel = node.ints["kernel_shape"]
    shape = (*got[0][:2], *_windows(node, got[0], kernel))
    return shape, math.prod(shape) * math.prod(kernel)


def _global_pool(_node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    return (*got[0][:2], *(1 for _ in got[0][2:])), math.prod(got[0])


def _reduce(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    axes = node.ints.get("axes")
    if axes is None and len(constants) > 1 and constants[1] is not None:
        axes = constants[1].integers()
    keep = (node.ints.get("keepdims") or [1])[0]
    rank = len(got[0])
    over = {axis % rank for axis in axes} if axes else set(range(rank))
    shape = tuple(1 if k in over else length for k, length in enumerate(got[0]) if keep or k not in over)
    return shape, math.prod(got[0])


def _concat(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    axis = node.ints["axis"][0] % len(got[0])
    shape = list(got[0])
    shape[axis] = sum(shape_[axis] for shape_ in got)
    return tuple(shape), math.prod(shape)


def _transpose(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    order = node.ints.get("perm") or list(range(len(got[0])))[::-1]
    if sorted(order) != list(range(len(got[0]))):
        raise ValueError("no permutation")
    return tuple(got[0][k] for k in order), math.prod(got[0])


def _constant(constants: Sequence[Tensor | None], what: str) -> list[int]:
    if len(constants) < 2 or constants[1] is None:
        raise refused(f"a {what} that is computed")
    return constants[1].integers()


def _reshape(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    wanted, size = _constant(constants, "shape"), math.prod(got[0])
    zero_is_zero = (node.ints.get("allowzero") or [0])[0]
    shape = [got[0][k] if length == 0 and not zero_is_zero else length for k, length in enumerate(wanted)]
    if shape.count(-1) > 1 or any(length < -1 for length in shape):
        raise ValueError("an impossible shape")
    if -1 in shape:
        known = math.prod(length for length in shape if length != -1)
        shape[shape.index(-1)] = size // known
    if math.prod(shape) != size:
        raise ValueError("a shape of another size")
    return tuple(shape), 0


def _flatten(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    axis = (node.ints.get("axis") or [1])[0]
    return (math.prod(got[0][:axis]), math.prod(got[0][axis:])), 0


def _expand(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    wanted = tuple(_constant(constants, "shape"))
    if any(length < 1 for length in wanted):
        raise ValueError("an impossible shape")
    return _broadcast(node, (got[0], wanted), constants)


def _gemm(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    a, b = got[0], got[1]
    if len(a) != 2 or len(b) != 2:
        raise ValueError("no matrices")
    rows, inner = a[::-1] if (node.ints.get("transA") or [0])[0] else a
    columns = b[0] if (node.ints.get("transB") or [0])[0] else b[1]
    return (rows, columns), rows * columns * inner


def _matmul(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    a, b = got[0], got[1]
    if min(len(a), len(b)) < 2:
        raise ValueError("no matrices")
    before, _ = _broadcast(node, (a[:-2], b[:-2]), constants) if len(a) > 2 or len(b) > 2 else ((), 0)
    shape = (*before, a[-2], b[-1])
    return shape, math.prod(shape) * a[-1]


def _axes(node: Node, constants: Sequence[Tensor | None]) -> list[int]:
    return node.ints.get("axes") or _constant(constants, "list of axes")


def _shape(node: Node, got: Sequence[Shape], _constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    return (len(_cut(node, got[0])),), 0


def _cut(node: Node, shape: Shape) -> Shape:
    start, end = (node.ints.get("start") or [0])[0], (node.ints.get("end") or [len(shape)])[0]
    return shape[start:end]


def _integers(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> list[int] | None:
    """The values of an output that is a shape, or made of shapes; None for all others."""
    if node.kind == "Shape":
        return list(_cut(node, got[0]))
    if node.kind not in ("Cast", "Concat", "Identity") or any(len(shape) != 1 for shape in got):
        return None
    known = [tensor.integers() for tensor in constants if tensor is not None and tensor.kind in (6, 7)]
    return [value for values in known for value in values] if len(known) == len(constants) else None


def _resize(_node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    sizes, scales = (constants[k] if len(constants) > k else None for k in (3, 2))
    if sizes is not None:
        shape = tuple(sizes.integers())
    elif scales is not None:
        shape = tuple(math.floor(length * scale) for length, scale in zip(got[0], scales.floats(), strict=True))
    else:
        raise refused("a size that is computed")
    if len(shape) != len(got[0]):
        raise ValueError("a size of other axes")
    return shape, 4 * math.prod(shape)


def _squeeze(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    over = {axis % len(got[0]) for axis in _axes(node, constants)}
    if any(got[0][axis] != 1 for axis in over):
        raise ValueError("an axis that is not of length 1")
    return tuple(length for k, length in enumerate(got[0]) if k not in over), 0


def _unsqueeze(node: Node, got: Sequence[Shape], constants: Sequence[Tensor | None]) -> tuple[Shape, int]:
    axes = _axes(node, constants)
    rank = len(got[0]) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(got[0])
    if len(new) != len(axes):
        raise ValueError("an axis that is named twice")
    return tuple(1 if k in new else next(rest) for k in range(rank)), 0


_SAME = (
    "Abs BatchNormalization Cast Clip DequantizeLinear Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
    "InstanceNormalization LayerNormalization LeakyRelu Log Mish Neg QuantizeLinear Reciprocal Relu Round Selu "
    "Sigmoid Softmax Softplus Sqrt Tanh"
)
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(["Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"], _broadcast),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool"], _global_pool),
    **dict.fromkeys(["AveragePool", "MaxPool"], _pool),
    **dict.fromkeys(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"], _reduce),
    "Concat": _concat,
    "Conv": _conv,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Operators whose output's shape follows from the shapes of their inputs and from constants."""
