"""int8 files: rounding, quantization, the proof, and which of the two a device takes."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.errors import InvalidConfig
from bitneck.image import preprocess
from bitneck.manifest import Precision, int8_name
from bitneck_edge.bundles.precision import choose_precision, measured_speedup, probe_graph
from bitneck_edge.encoder import EdgeEncoder
from bitneck_models.export.int8 import MEAN_LOSS, packed, problems, unpacked
from bitneck_models.export.quantize import quantized, tensor_ranges
from bitneck_models.export.rounding import Rounding, nearest, rounded, weight_scale
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.records import Int8Proof
from bitneck_testing.networks import keep_every_point, run
from bitneck_testing.photographs import add_photos, photo


def session(data: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def outputs(data: bytes, inputs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([session(data).run(None, {"x": x})[0] for x in inputs])


@pytest.fixture(scope="module")
def segment(tiny_bundle: Bundle) -> bytes:
    return tiny_bundle.path("segments/00-seg0.onnx").read_bytes()


def pictures(bundle: Bundle, seeds: range) -> list[np.ndarray]:
    return [preprocess(photo(k), bundle.manifest.input) for k in seeds]


def test_rounding_for_the_inputs_beats_the_nearest_integers(tiny_bundle: Bundle, segment: bytes) -> None:
    """With weights of few levels, so that rounding matters, the error of new inputs' outputs falls."""
    seen, new = pictures(tiny_bundle, range(40)), pictures(tiny_bundle, range(50, 70))
    rounding = rounded(segment, seen)
    model = onnx.load_from_string(segment)
    (weights,) = (t for t in model.graph.initializer if t.name in rounding.deltas)
    values = numpy_helper.to_array(weights)
    errors = []
    for delta in (np.zeros(values.shape, np.int8), rounding.deltas[weights.name]):
        scale = weight_scale(values).reshape(-1, 1, 1, 1)
        weights.CopyFrom(numpy_helper.from_array((nearest(values) + delta) * scale, weights.name))
        errors.append(np.abs(outputs(model.SerializeToString(), new) - outputs(segment, new)).mean())
    assert errors[1] < errors[0]
    assert np.abs(nearest(values).astype(int) + rounding.deltas[weights.name]).max() <= 127


def test_an_int8_file_is_small_repeatable_and_near(tiny_bundle: Bundle, segment: bytes) -> None:
    seen, new = pictures(tiny_bundle, range(40)), pictures(tiny_bundle, range(50, 70))
    ranges, made = tensor_ranges(segment, seen)
    assert np.allclose(np.concatenate(made), outputs(segment, seen), atol=1e-5)
    rounding = rounded(segment, seen)
    data = quantized(segment, ranges, rounding)
    assert data == quantized(segment, ranges, rounding)
    kinds = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    reference = outputs(segment, new)
    assert np.abs(outputs(data, new) - reference).mean() < 0.02 * np.abs(reference).mean()


def test_the_latent_of_an_encoder_has_no_steps_of_its_own(tiny_bundle: Bundle) -> None:
    """Its last convolution stays float32: 256 levels would be coarser than the symbols."""
    data = tiny_bundle.path("units/s1-r1/encoder.onnx").read_bytes()
    chain = SegmentChain(tiny_bundle, threads=1)
    features = [chain.run(x, 0, 2) for x in pictures(tiny_bundle, range(20))]
    ranges, _ = tensor_ranges(data, features)
    made = quantized(data, ranges, rounded(data, features), encoder=True)
    model = onnx.load_from_string(made)
    assert model.graph.node[-1].op_type == "Conv"
    assert any(t.data_type == onnx.TensorProto.INT8 for t in model.graph.initializer)
    reference = outputs(data, features)
    assert np.abs(outputs(made, features) - reference).mean() < 0.02 * np.abs(reference).mean()


def test_roundings_are_kept_as_arrays() -> None:
    one = Rounding({"w": np.ones((2, 3), np.int8)}, {"b": np.zeros(2, np.float32)})
    again = unpacked(packed({"units/a/encoder.onnx": one}))
    assert set(again) == {"units/a/encoder.onnx"}
    assert np.array_equal(again["units/a/encoder.onnx"].deltas["w"], one.deltas["w"])
    assert np.array_equal(again["units/a/encoder.onnx"].biases["b"], one.biases["b"])


def proof(bytes_int8: float = 10.0, lost: float = 0.0, spread: float = 0.01) -> Int8Proof:
    return Int8Proof(
        bytes_float32=10.0, bytes_int8=bytes_int8, agreement_float32=0.8, agreement_int8=0.8 - lost,
        loss_low=lost - spread, loss_high=lost + spread, same_symbols=1.0,
    )  # fmt: skip


def test_what_costs_too_much_is_found() -> None:
    assert problems({"a": proof(), "b": proof(10.3, 0.01)}) == {}
    assert set(problems({"a": proof(), "b": proof(10.5)})) == {"b"}
    assert set(problems({"a": proof(), "b": proof(lost=0.03)})) == {"b"}
    mean = MEAN_LOSS * 1.5
    assert set(problems({"a": proof(lost=mean - 0.003), "b": proof(lost=mean + 0.003, spread=0.02)})) == {"b"}


# From the zoo to the device


@pytest.fixture
def home(home: Path) -> Path:
    """With a bundle without int8 files."""
    add_photos(home / "photos", range(20, 40))
    run("train", "zoo", "--data", ".")
    keep_every_point(ZooEntry(home / "zoo"))
    run("export", "zoo", "--out", "bundle")
    return home


def test_from_a_trained_entry_to_a_device_that_runs_int8(home: Path) -> None:
    assert not Bundle.open(home / "bundle").manifest.has_int8
    document = json.loads(run("quantize", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "20", "--json"))
    assert (document["left_out"], document["validation_photos"]) == ({}, 10)
    assert document["points"]["s1-r2"]["same_symbols"] > 0.8
    run("export", "zoo", "--out", "bundle")
    bundle = Bundle.open(home / "bundle")
    manifest = bundle.manifest
    assert all(int8_name(path) in manifest.files for path in manifest.edge_graphs())
    assert set(manifest.files_for("cloud")) == {p for p, e in manifest.files.items() if e.role != "edge"}
    assert not any(path.endswith(".int8.onnx") for path in manifest.files_for("cloud"))
    taken = {p: set(manifest.files_for("edge", p)) for p in ("float32", "int8")}  # type: ignore[arg-type]
    assert not taken["float32"] & {int8_name(path) for path in manifest.edge_graphs()}
    assert not taken["int8"] & set(manifest.edge_graphs())
    same = []
    precisions: tuple[Precision, ...] = ("float32", "int8")
    for k in range(10):
        symbols = []
        for precision in precisions:
            bundle.precision = precision
            symbols.append(EdgeEncoder(bundle, threads=1).encode(photo(k, (60, 50)), "s1-r2").encoded.symbols)
        same.append(np.mean(symbols[0] == symbols[1]))
    assert 0.8 < np.mean(same) < 1.0  # nearly the same, and not the same file
    # Another unit under the old record: its encoder gets no int8 file, the rest has theirs.
    record = json.loads((home / "zoo" / "int8.json").read_text())
    record["graphs"]["units/s1-r2/encoder.onnx"]["weights"] *= 1.01
    (home / "zoo" / "int8.json").write_text(json.dumps(record))
    run("export", "zoo", "--out", "bundle")
    files = Bundle.open(home / "bundle").manifest.files
    assert "units/s1-r2/encoder.int8.onnx" not in files
    assert "units/s1-r1/encoder.int8.onnx" in files
    (home / "zoo" / "int8.npz").unlink()
    with pytest.raises(InvalidConfig, match="run `bitneck-models quantize` again"):
        run("export", "zoo", "--out", "bundle")


def test_an_encoder_that_loses_too_much_stays_float32(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitneck_models.export.int8.MOST_BYTES", 0.5)
    document = json.loads(run("quantize", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "20", "--json"))
    assert set(document["left_out"]) == set(Bundle.open(home / "bundle").manifest.edge_graphs())
    run("export", "zoo", "--out", "bundle")
    assert not Bundle.open(home / "bundle").manifest.has_int8


# Which of the two


def test_the_probe_is_a_graph_that_runs_and_has_nearly_the_same_result() -> None:
    x = np.random.default_rng(1).standard_normal((1, 48, 28, 28), dtype=np.float32)
    float32, int8 = (session(probe_graph(p)).run(None, {"x": x})[0] for p in ("float32", "int8"))
    for precision in ("float32", "int8"):
        onnx.checker.check_model(onnx.load_from_string(probe_graph(precision)), full_check=True)
    clipped = np.minimum(float32, 12.75)
    assert np.abs(int8 - clipped).mean() < 0.1 * np.abs(clipped).mean()
    assert measured_speedup() > 0


@pytest.mark.parametrize(("speedup", "expected"), [(1.0, "float32"), (2.0, "int8")])
def test_auto_takes_what_is_faster_and_measures_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, expected: str
) -> None:
    run("quantize", "zoo", "--bundle", "bundle", "--data", ".", "--photos", "20")
    run("export", "zoo", "--out", "bundle")
    manifest = Bundle.open(home / "bundle").manifest
    measured: list[float] = []

    def measure() -> float:
        measured.append(speedup)
        return speedup

    monkeypatch.setattr("bitneck_edge.bundles.precision.measured_speedup", measure)
    for _ in range(3):
        assert choose_precision("auto", manifest, home / "cache") == expected
    assert len(measured) == 1
    (home / "cache" / "precision.json").write_text("no json")
    assert choose_precision("auto", manifest, home / "cache") == expected
    assert len(measured) == 2
    named: tuple[Literal["int8", "float32"], ...] = ("int8", "float32")
    for precision in named:
        assert choose_precision(precision, manifest, home / "cache") == precision


def test_a_bundle_without_int8(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert choose_precision("auto", tiny_bundle.manifest, tmp_path) == "float32"
    assert not (tmp_path / "precision.json").exists()
    with pytest.raises(InvalidConfig, match="has no int8 files"):
        choose_precision("int8", tiny_bundle.manifest, tmp_path)
    point = tiny_bundle.manifest.ladder["s1-r1"]
    f = SegmentChain(tiny_bundle, threads=1, precision="int8").run(pictures(tiny_bundle, range(1))[0], 0, 2)
    assert PointEncoder(tiny_bundle, point, precision="int8").latent(f).shape == (1, *point.latent_shape)
