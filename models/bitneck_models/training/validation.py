"""Rate and agreement of a trained unit on the photographs put aside."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.coding.symbols import dequantize
from bitneck_models.data.class_maps import confusion, mean_iou
from bitneck_models.training.tables import symbols_of
from bitneck_models.units.unit import BottleneckUnit

__all__ = ["Validation", "validate"]

_CHUNK = 20


@dataclass(frozen=True, slots=True)
class Validation:
    """A unit on the photographs put aside.

    Attributes:
        payload_bytes: ideal code length under its tables, mean.
        agreement: share of the photographs, or of their pixels, whose class is the teacher's.
        mean_iou: segmentation: mean IoU with the class maps of the photographs; None without any.
    """

    payload_bytes: float
    agreement: float
    mean_iou: float | None = None


def validate(
    unit: BottleneckUnit,
    tail: nn.Module,
    step: float,
    tables: FactorizedModel,
    features: NDArray[np.float16],
    truth: NDArray[np.uint8] | None = None,
) -> Validation:
    """Measure rate and agreement on features that were not trained on.

    Args:
        unit: the unit, in evaluation mode.
        tail: the network after the split point.
        step: quantizer step Q.
        tables: tables of the unit.
        features: (M, C, Hf, Wf) float16.
        truth: segmentation: class maps, (M, H, W) uint8; None without any.
    """
    symbols = symbols_of(unit, features, step, tables)
    bits = [tables.ideal_bits(s) for s in symbols]
    agree = 0.0
    matrix: NDArray[np.int64] | None = None
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        f = torch.from_numpy(features[rows].astype(np.float32))
        y_hat = torch.from_numpy(dequantize(symbols[rows], step))
        with torch.no_grad():
            student, teacher = tail(unit.decoder(y_hat)), tail(f)  # (n, L) or (n, K, H, W)
        answer = student.argmax(1)  # (n,) or (n, H, W)
        same = (answer == teacher.argmax(1)).float()
        agree += float(same.reshape(len(same), -1).mean(1).sum())
        if truth is not None:
            part = confusion(truth[rows], answer.numpy(), student.shape[1])
            matrix = part if matrix is None else matrix + part
    return Validation(
        payload_bytes=float(np.mean(bits)) / 8,
        agreement=agree / len(features),
        mean_iou=None if matrix is None or not matrix.any() else mean_iou(matrix),
    )
