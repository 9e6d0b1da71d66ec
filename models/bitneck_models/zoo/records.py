"""Records of a zoo entry: how its files were made, and what was measured."""

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Self

from pydantic import Field

from bitneck.coding.factorized_model import FactorizedModel
from bitneck_models.typed_files import Strict

__all__ = ["ConditionalRecord", "MeasuredLadder", "MeasuredPoint", "NetworkRecord", "PointRecord"]


class PointRecord(Strict):
    """How a point was trained, and its validation metrics: ``points/<id>/record.json``.

    Attributes:
        recipe: the point's recipe.
        training: its schedule.
        code_version: version of this package.
        torch_version: version of torch.
        train_features: number of training views.
        validation_photos: number of photographs put aside.
        lambda_final: lambda at the end of training.
        estimated_bytes: mean estimate of the rate term over the last 200 steps.
        validation_bytes: ideal code length on the photographs put aside, mean.
        validation_agreement: agreement with the teacher on the photographs put aside.
        validation_mean_iou: segmentation: mean IoU with their class maps; None if they have none.
        trained: date.
        unit_sha256: digest of ``unit.safetensors``.
        tables_sha256: digest of ``tables.npz``.
    """

    recipe: dict[str, Any]
    training: dict[str, Any]
    code_version: str
    torch_version: str
    train_features: int
    validation_photos: int
    lambda_final: float
    estimated_bytes: float
    validation_bytes: float
    validation_agreement: float
    validation_mean_iou: float | None = None
    trained: date
    unit_sha256: str = ""
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
        tables_digest: `FactorizedModel.digest` of the measured tables; empty in older records. It detects that a point
            was trained again, which changes its tables. It does not detect a change of the recipe's step or of the
            network without training.
    """

    payload_bytes: Annotated[float, Field(ge=0)]
    bpp_payload: Annotated[float, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    tables_digest: str = ""

    def measured_with(self, tables: FactorizedModel) -> bool:
        """Whether these tables were measured. True for a record without a digest, which cannot tell."""
        return self.tables_digest in ("", tables.digest)


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

    def still_true(self, tables: Mapping[str, FactorizedModel]) -> Self:
        """This ladder without the points that were trained again since, which now have other tables.

        Args:
            tables: the tables of each point, by id.
        """
        kept = {p: m for p, m in self.points.items() if p not in tables or m.measured_with(tables[p])}
        return self.model_copy(update={"points": kept})
