"""float32 or int8: which of the two this device runs faster, found with a small graph that is made here.

The graph is an inverted bottleneck, as mobile networks have them: 1x1 to four times as many channels, 3x3 depthwise,
1x1 back. As int8 it is QDQ, as the bundles' files are. The result is kept in the cache; it holds for this processor
and this version of ONNX Runtime.
"""

import contextlib
import json
import platform
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from bitneck.errors import InvalidConfig
from bitneck.manifest import Manifest, Precision

__all__ = ["choose_precision", "measured_speedup", "probe_graph"]

_CHANNELS, _WIDE, _SIDE = 48, 192, 28
_RUNS = 15
_WEIGHT = 0.03
"""Step of the weights; the activations then fill the range of uint8."""
_WORTH = 1.15
"""int8 has to be this many times as fast; else float32, which is exact, is taken."""

_FLOAT, _UINT8, _INT8 = 1, 2, 3
"""Tensor types of ONNX."""


def choose_precision(wanted: Literal["auto", "int8", "float32"], manifest: Manifest, cache_dir: Path) -> Precision:
    """What a device runs of a bundle.

    Args:
        wanted: of the settings; ``auto`` for what is faster here.
        manifest: of the bundle.
        cache_dir: root of the cache, where the result of a measurement is kept.

    Raises:
        InvalidConfig: int8 is wanted, and the bundle has none.
    """
    if wanted == "int8" and not manifest.has_int8:
        raise InvalidConfig(
            f"precision is int8, but the bundle {manifest.name} has no int8 files; give float32 or auto, or run "
            "`bitneck-models quantize` and export it again"
        )
    if wanted != "auto":
        return wanted
    if not manifest.has_int8:
        return "float32"
    return "int8" if _speedup(cache_dir) >= _WORTH else "float32"


def _speedup(cache_dir: Path) -> float:
    """The kept measurement, or a new one."""
    path = cache_dir / "precision.json"
    key = f"{platform.machine()} {_processor()} onnxruntime {ort.__version__}"
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = json.loads(path.read_bytes()[:4096])
        if kept["measured_on"] == key:
            return float(kept["speedup"])
    speedup = measured_speedup()
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"measured_on": key, "speedup": round(speedup, 3)}) + "\n")
        part.replace(path)
    return speedup


def _processor() -> str:
    """The processor's name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor()


def measured_speedup() -> float:
    """How many times as fast int8 runs here as float32, on one thread. Takes a fraction of a second."""
    x = np.random.default_rng(0).standard_normal((1, _CHANNELS, _SIDE, _SIDE), dtype=np.float32)
    sessions = []
    for precision in ("float32", "int8"):
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        data = probe_graph("int8" if precision == "int8" else "float32")
        sessions.append(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    best = [float("inf"), float("inf")]
    for _ in range(_RUNS):  # in turn, so that a busy moment hits both
        for k, session in enumerate(sessions):
            begun = time.perf_counter()
            session.run(None, {"x": x})
            best[k] = min(best[k], time.perf_counter() - begun)
    return best[0] / best[1]


def probe_graph(precision: Precision) -> bytes:
    """The graph as an ONNX file, (1, 48, 28, 28) to the same shape, with weights that mean nothing."""
    layers = ((_CHANNELS, _WIDE, 1, 1), (_WIDE, _WIDE, 3, _WIDE), (_WIDE, _CHANNELS, 1, 1))
    nodes: list[bytes] = []
    tensors: list[bytes] = []
    name = "x"
    for index, (inputs, outputs, kernel, group) in enumerate(layers):
        shape = (outputs, inputs // group, kernel, kernel)
        weights = np.arange(np.prod(shape)).reshape(shape) % 15 - 7
        attributes = _ints("kernel_shape", [kernel] * 2) + _ints("pads", [kernel // 2] * 4) + _int("group", group)
        weight = f"w{index}"
        if precision == "int8":
            nodes += _quantized(name, tensors)
            tensors.append(_tensor(f"{weight}_q", _INT8, shape, weights.astype(np.int8).tobytes()))
            tensors.append(_tensor(f"{weight}_s", _FLOAT, (outputs,), np.full(outputs, _WEIGHT, np.float32).tobytes()))
            tensors.append(_tensor(f"{weight}_z", _INT8, (outputs,), bytes(outputs)))
            names = [f"{weight}_q", f"{weight}_s", f"{weight}_z"]
            nodes.append(_node("DequantizeLinear", names, weight, _int("axis", 0)))
            name = f"{name}_d"
        else:
            tensors.append(_tensor(weight, _FLOAT, shape, (weights * _WEIGHT).astype(np.float32).tobytes()))
        nodes.append(_node("Conv", [name, weight], f"c{index}", attributes))
        nodes.append(_node("Relu", [f"c{index}"], f"r{index}"))
        name = f"r{index}"
    if precision == "int8":
        nodes += _quantized(name, tensors)
        name = f"{name}_d"
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"probe") + b"".join(_field(5, t) for t in tensors)
    graph += _field(11, _value("x")) + _field(12, _value(name))
    return _varint_field(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _varint_field(2, 17))


def _quantized(name: str, tensors: list[bytes]) -> list[bytes]:
    """Nodes that make a tensor uint8 and float32 again. Zero is the least value behind a ReLU, which is then free."""
    tensors.append(_tensor(f"{name}_s", _FLOAT, (), struct.pack("<f", 0.05)))
    tensors.append(_tensor(f"{name}_z", _UINT8, (), b"\x80" if name == "x" else b"\x00"))
    return [
        _node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], f"{name}_q"),
        _node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], f"{name}_d"),
    ]


# The few messages of ONNX's protobuf that the graph needs. A device has no `onnx` package.


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes([value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    return names + _field(3, output.encode()) + _field(4, kind.encode()) + attributes


def _ints(name: str, values: Sequence[int]) -> bytes:
    body = _field(1, name.encode()) + b"".join(_varint_field(8, value) for value in values) + _varint_field(20, 7)
    return _field(5, body)


def _int(name: str, value: int) -> bytes:
    return _field(5, _field(1, name.encode()) + _varint_field(3, value) + _varint_field(20, 2))


def _tensor(name: str, kind: int, shape: Sequence[int], data: bytes) -> bytes:
    sizes = b"".join(_varint_field(1, size) for size in shape)
    return sizes + _varint_field(2, kind) + _field(8, name.encode()) + _field(9, data)


def _value(name: str) -> bytes:
    sizes = b"".join(_field(1, _varint_field(1, size)) for size in (1, _CHANNELS, _SIDE, _SIDE))
    kind = _field(1, _varint_field(1, _FLOAT) + _field(2, sizes))
    return _field(1, name.encode()) + _field(2, kind)
