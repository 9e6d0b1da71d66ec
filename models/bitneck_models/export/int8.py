"""int8 files of a bundle: ranges from calibration photographs, a proof on others, and the files themselves.

bundle + photographs --calibrated--> Int8Record (in the zoo entry) --int8_files--> files of the next export
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import bitneck
from bitneck.bundle import Bundle, BundleWriter
from bitneck.image import load_photo, preprocess
from bitneck.manifest import Precision, int8_name
from bitneck_models.export.quantize import quantized, structure, tensor_ranges, weight_sum
from bitneck_models.export.rounding import Rounding, rounded
from bitneck_models.measure.passes import photo_passes
from bitneck_models.zoo.records import GraphRanges, Int8Proof, Int8Record

__all__ = ["MEAN_LOSS", "MOST_BYTES", "MOST_LOSS", "calibrated", "int8_files", "packed", "problems", "unpacked"]

MOST_BYTES = 1.04
"""A point's payloads as int8, over those as float32, at most."""
MOST_LOSS = 0.005
"""Agreement that a point may lose: the paired interval of its loss must not lie wholly above this. The intervals of all
points together have 95 %, so that among many points none fails by chance."""
MEAN_LOSS = 0.01
"""Agreement that the points may lose in the mean."""

_SAME_WEIGHTS = 1e-3
_CHANCE = 0.05


def calibrated(
    bundle: Bundle,
    photos: Sequence[Path],
    validation: Sequence[Path],
    progress: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> tuple[Int8Record, dict[str, Rounding]]:
    """Find out how to make the int8 files of a bundle, and what they cost.

    Args:
        bundle: both halves, as float32.
        photos: calibration photographs: training photographs of the recipe.
        validation: photographs for the proof, which were put aside.
        progress: called with (what is being done, done, all).

    Returns:
        The record, and the rounding of each file's weights, by the float32 file's name.

    Raises:
        ImageError: a photograph cannot be read.
        ModelFailure: ONNX Runtime failed.
    """
    graphs, roundings = _ranges(bundle, photos, progress)
    before = _measured(bundle, validation, "float32", lambda done: progress("float32", done, len(validation)))
    left_out: dict[str, str] = {}
    while True:
        used = {path: ranges for path, ranges in graphs.items() if path not in left_out}
        with tempfile.TemporaryDirectory() as folder:
            staged = _with_int8(bundle, used, roundings, Path(folder) / "bundle")
            after = _measured(staged, validation, "int8", lambda done: progress("int8", done, len(validation)))
        proof = {point: _proof(before[point], after[point], len(before)) for point in before}
        found = problems(proof)
        more = {
            path: f"{point}: {problem}"
            for point, problem in found.items()
            for path in bundle.manifest.unit(bundle.manifest.point(point).unit).encoder_files
            if path in used
        }
        if not found or not used:
            break
        # An encoder that loses too much stays float32; if that does not help, the head is to blame.
        left_out |= more or {path: f"{point}: {problem}" for path in used for point, problem in found.items()}
    record = Int8Record(
        photos=len(photos),
        validation_photos=len(validation),
        code_version=bitneck.__version__,
        onnxruntime_version=ort.__version__,
        made=datetime.now(tz=UTC).date(),
        graphs=used,
        points=proof,
        left_out=left_out,
    )
    return record, {path: roundings[path] for path in used}


def problems(proof: Mapping[str, Int8Proof]) -> dict[str, str]:
    """What is too much, by operating point; the worst points are named if the mean of all is too much."""
    found = {}
    losses = {point: p.agreement_float32 - p.agreement_int8 for point, p in proof.items()}
    for point, p in proof.items():
        if p.bytes_int8 > MOST_BYTES * p.bytes_float32:
            found[point] = f"{p.bytes_int8:.1f} bytes, as float32 {p.bytes_float32:.1f}"
        elif p.loss_low > MOST_LOSS:
            found[point] = (
                f"agreement {p.agreement_int8:.4f}, as float32 {p.agreement_float32:.4f}: it loses "
                f"{p.loss_low:.4f} to {p.loss_high:.4f}"
            )
    if not found and losses and (mean := float(np.mean(list(losses.values())))) > MEAN_LOSS:
        found = {point: f"the points lose {mean:.4f} agreement in the mean" for point in losses if losses[point] > mean}
    return found


def int8_files(record: Int8Record, roundings: Mapping[str, Rounding], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The int8 files that can be made, by name.

    Args:
        record: of the zoo entry.
        roundings: of each file's weights.
        files: the float32 files that a device runs, by name. One that changed since `calibrated` gets no int8 file.
    """
    made = {}
    for path, data in files.items():
        ranges = record.graphs.get(path)
        if ranges is not None and _fits(ranges, data):
            made[int8_name(path)] = _quantized(path, data, ranges, roundings[path])
    return made


def packed(roundings: Mapping[str, Rounding]) -> dict[str, NDArray[Any]]:
    """Roundings as arrays, to be kept in a zoo entry."""
    deltas = {f"{path}|{name}|delta": a for path, r in roundings.items() for name, a in r.deltas.items()}
    return deltas | {f"{path}|{name}|bias": a for path, r in roundings.items() for name, a in r.biases.items()}


def unpacked(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Rounding]:
    """The opposite of `packed`."""
    roundings: dict[str, Rounding] = {}
    for key, array in arrays.items():
        path, name, kind = key.split("|")
        rounding = roundings.setdefault(path, Rounding({}, {}))
        (rounding.deltas if kind == "delta" else rounding.biases)[name] = array
    return roundings


def _quantized(path: str, data: bytes, ranges: GraphRanges, rounding: Rounding) -> bytes:
    return quantized(data, ranges.tensors, rounding, encoder=path.startswith("units/"))


def _fits(ranges: GraphRanges, data: bytes) -> bool:
    same = math.isclose(ranges.weights, weight_sum(data), rel_tol=_SAME_WEIGHTS)
    return same and ranges.structure == structure(data)


def _ranges(
    bundle: Bundle, photos: Sequence[Path], progress: Callable[[str, int, int], None]
) -> tuple[dict[str, GraphRanges], dict[str, Rounding]]:
    """The ranges of every file that a device runs, and the rounding of its weights."""
    manifest = bundle.manifest
    graphs: dict[str, GraphRanges] = {}
    roundings: dict[str, Rounding] = {}
    made: dict[str, list[NDArray[np.float32]]] = {}
    total = len(manifest.edge_graphs())

    def run(path: str, inputs: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        if path not in graphs:
            data = bundle.path(path).read_bytes()
            tensors, made[path] = tensor_ranges(data, inputs)
            roundings[path] = rounded(data, inputs)
            graphs[path] = GraphRanges(structure=structure(data), weights=weight_sum(data), tensors=tensors)
            progress("calibration", len(graphs), total)
        return made[path]

    x = [preprocess(load_photo(photo), manifest.input) for photo in photos]
    for index, segment in enumerate(manifest.segments[: manifest.split_points[-1].after_segment + 1]):
        x = run(segment.file, x)
        for split in manifest.split_points:
            if split.after_segment != index:
                continue
            for unit in manifest.units:
                f = x
                for path in unit.encoder_files if unit.split == split.name else ():
                    f = run(path, f)
    return graphs, roundings


def _with_int8(
    bundle: Bundle, graphs: Mapping[str, GraphRanges], roundings: Mapping[str, Rounding], out: Path
) -> Bundle:
    """A copy of a bundle with int8 files."""
    with BundleWriter(out) as writer:
        for name, entry in bundle.manifest.files.items():
            if not name.endswith(".int8.onnx"):
                writer.add(name, bundle.path(name).read_bytes(), entry.role)
        for path, ranges in graphs.items():
            data = _quantized(path, bundle.path(path).read_bytes(), ranges, roundings[path])
            writer.add(int8_name(path), data, "edge")
        return writer.finish(bundle.manifest.model_copy(update={"files": writer.files}))


class _Point:
    """One operating point at one precision: bytes, agreement, and symbols of each photograph."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.agreement: list[float] = []
        self.symbols: list[NDArray[np.int32]] = []


def _measured(
    bundle: Bundle, photos: Sequence[Path], precision: Precision, progress: Callable[[int], None]
) -> dict[str, _Point]:
    points = {point.id: _Point() for point in bundle.manifest.ladder}
    for done, passed in enumerate(photo_passes(bundle, photos, precision), start=1):
        teacher = passed.output.argmax(0)
        for point, at_point in passed.points():
            found = points[point.id]
            found.bytes.append(at_point.payload_bytes)
            found.agreement.append(float(np.mean(at_point.output.argmax(0) == teacher)))
            found.symbols.append(at_point.symbols)
        progress(done)
    return points


def _proof(before: _Point, after: _Point, points: int) -> Int8Proof:
    same = [float(np.mean(a == b)) for a, b in zip(before.symbols, after.symbols, strict=True)]
    losses = np.array(before.agreement) - np.array(after.agreement)
    errors = NormalDist().inv_cdf(1 - _CHANCE / 2 / points)
    spread = errors * float(losses.std()) / math.sqrt(len(losses))
    return Int8Proof(
        bytes_float32=float(np.mean(before.bytes)),
        bytes_int8=float(np.mean(after.bytes)),
        agreement_float32=float(np.mean(before.agreement)),
        agreement_int8=float(np.mean(after.agreement)),
        loss_low=float(losses.mean()) - spread,
        loss_high=float(losses.mean()) + spread,
        same_symbols=float(np.mean(same)),
    )
