"""Records of a zoo entry: how its files were made, and what was measured."""

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Self

from pydantic import Field

from bitneck_models.typed_files import Id, Positive, Strict

__all__ = [
    "ConditionalRecord",
    "ContextRecord",
    "GraphRanges",
    "Int8Proof",
    "Int8Record",
    "MeasuredLadder",
    "MeasuredPoint",
    "NetworkRecord",
    "PointRecord",
    "UnitRecord",
]


class UnitRecord(Strict):
    """How a unit was trained: ``units/<id>/record.json``.

    Attributes:
        recipe: the unit's recipe.
        training: its schedule.
        code_version: version of this package.
        torch_version: version of torch.
        train_features: number of training views.
        lambda_final: lambda at the end of training.
        estimated_bytes: mean estimate of the rate term over the last 200 steps.
        trained: date.
        unit_sha256: digest of ``unit.safetensors``.
    """

    recipe: dict[str, Any]
    training: dict[str, Any]
    code_version: str
    torch_version: str
    train_features: int
    lambda_final: float
    estimated_bytes: float
    trained: date
    unit_sha256: str = ""


class PointRecord(Strict):
    """A unit at one step, and its metrics on the photographs that its recipe puts aside: ``points/<id>/point.json``.

    Attributes:
        unit: id of the unit.
        split: its split point.
        step: quantizer step Q.
        validation_photos: number of photographs put aside.
        validation_bytes: ideal code length on these photographs under the tables, mean. Contexts are not counted.
        validation_agreement: agreement with the teacher on them.
        validation_mean_iou: segmentation: mean IoU with their class maps; None if they have none.
        fitted: date when the tables were fitted.
        tables_sha256: digest of ``tables.npz``.
    """

    unit: Id
    split: Id
    step: Positive
    validation_photos: int
    validation_bytes: float
    validation_agreement: float
    validation_mean_iou: float | None = None
    fitted: date
    tables_sha256: str = ""


class ConditionalRecord(Strict):
    """How conditional tables were fitted, and what they save: ``points/<id>/conditional.json``.

    Attributes:
        photos: number of photographs they were fitted on.
        validation_photos: number of photographs put aside.
        seed: seed of the scenes.
        code_version: version of this package.
        bytes_alone: ideal code length of the second frame of each pair, coded alone, by motion; mean over the
            photographs put aside.
        bytes_similar: the same, coded against the first frame.
        fitted: date.
        tables_sha256: digest of the ``tables.npz`` that they were fitted to.
        conditional_sha256: digest of ``conditional.npz``.
    """

    photos: int
    validation_photos: int
    seed: int
    code_version: str
    bytes_alone: dict[str, float]
    bytes_similar: dict[str, float]
    fitted: date
    tables_sha256: str
    conditional_sha256: str


class ContextRecord(Strict):
    """How contexts were fitted, and what they save: ``points/<id>/contexts.json``.

    Attributes:
        photos: number of photographs they were fitted on.
        validation_photos: number of photographs put aside.
        code_version: version of this package.
        bytes_factorized: ideal code length under the point's tables, mean over the photographs put aside.
        bytes_contexts: the same with contexts.
        fitted: date.
        tables_sha256: digest of the ``tables.npz`` that they were fitted to.
        contexts_sha256: digest of ``contexts.npz``; empty where they save too little to be kept.
    """

    photos: int
    validation_photos: int
    code_version: str
    bytes_factorized: float
    bytes_contexts: float
    fitted: date
    tables_sha256: str
    contexts_sha256: str


class GraphRanges(Strict):
    """What an int8 file is made with.

    Attributes:
        structure: digest of the float32 file's operators, tensor names and sizes.
        weights: sum of the absolute weights of the float32 file.
        tensors: least and largest value of each of its tensors on the calibration photographs.
    """

    structure: str
    weights: float
    tensors: dict[str, tuple[float, float]]


class Int8Proof(Strict):
    """One operating point as float32 and as int8, on the photographs that the recipe puts aside.

    Attributes:
        bytes_float32: mean bytes of a payload.
        bytes_int8: likewise.
        agreement_float32: agreement with the uncompressed network.
        agreement_int8: likewise.
        loss_low, loss_high: paired interval of the agreement that is lost; 95 % for all points together.
        same_symbols: share of the symbols that are the same.
    """

    bytes_float32: float
    bytes_int8: float
    agreement_float32: float
    agreement_int8: float
    loss_low: float
    loss_high: float
    same_symbols: float


class Int8Record(Strict):
    """How the int8 files of an entry are made, and what they cost: ``int8.json``, written by `quantize`.

    Attributes:
        photos: number of calibration photographs.
        validation_photos: number of photographs that the proof was made on.
        code_version: version of this package.
        onnxruntime_version: version of ONNX Runtime.
        made: date.
        graphs: by the float32 file's name in the bundle.
        points: the proof, by operating point.
        left_out: files that stay float32 alone, and why.
    """

    photos: int
    validation_photos: int
    code_version: str
    onnxruntime_version: str
    made: date
    graphs: dict[str, GraphRanges]
    points: dict[str, Int8Proof]
    left_out: dict[str, str]


class NetworkRecord(Strict):
    """How a network was trained, and its accuracy: ``network.json``.

    Attributes:
        recipe: the resolved recipe, ``network.toml``.
        code_version: version of this package.
        torch_version: version of torch.
        train_photos: number of training photographs.
        validation_photos: number of photographs in ``val``.
        test_photos: number of photographs in ``test``.
        steps_kept: number of updates of the weights that are kept.
        validation_iou: mean IoU on ``val``, which chose these weights.
        test_iou: mean IoU on ``test``, measured once, at the end.
        test_iou_by_class: the same of each class, by name.
        trained: date.
        sha256: digest of ``network.safetensors``.
    """

    recipe: dict[str, Any]
    code_version: str
    torch_version: str
    train_photos: int
    validation_photos: int
    test_photos: int
    steps_kept: int
    validation_iou: float
    test_iou: float
    test_iou_by_class: dict[str, float]
    trained: date
    sha256: str


class MeasuredPoint(Strict):
    """One operating point on an evaluation set, through real bytes.

    Attributes:
        payload_bytes: mean bytes of a payload.
        bpp_payload: the same in bits per input pixel.
        accuracy: accuracy of the answers.
        agreement: agreement with the uncompressed network.
        tables_digest: `bitneck_models.zoo.entry.coding_digest` of what was measured; empty in older records. It detects
            that a point was trained again or got other contexts. It does not detect a change of the recipe's step or of
            the network without training.
    """

    payload_bytes: Annotated[float, Field(ge=0)]
    bpp_payload: Annotated[float, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    tables_digest: str = ""

    def measured_with(self, digest: str) -> bool:
        """Whether these tables were measured. True for a record without a digest, which cannot tell."""
        return self.tables_digest in ("", digest)


class MeasuredLadder(Strict):
    """Every operating point on one evaluation set: ``ladder.json``.

    Attributes:
        dataset: name of the evaluation set.
        images: number of its photographs.
        measured: date.
        uncompressed_accuracy: accuracy of the network without a unit.
        points: the operating points, by id.
    """

    dataset: str
    images: Annotated[int, Field(ge=1)]
    measured: date
    uncompressed_accuracy: Annotated[float, Field(ge=0, le=1)]
    points: dict[str, MeasuredPoint]

    def still_true(self, digests: Mapping[str, str]) -> Self:
        """This ladder without the points that were trained or fitted again since, which are now coded otherwise.

        Args:
            digests: see `MeasuredPoint.tables_digest`, of each point by id.
        """
        kept = {p: m for p, m in self.points.items() if p not in digests or m.measured_with(digests[p])}
        return self.model_copy(update={"points": kept})
