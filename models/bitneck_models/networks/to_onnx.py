"""Export of a torch module to ONNX: float32, one input ``x``, one output ``y``, dynamic batch axis."""

import logging
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import nn

from bitneck.errors import ModelFailure

__all__ = ["to_onnx"]

OPSET = 18


def to_onnx(module: nn.Module, input_shape: Sequence[int], *, any_size: bool = False) -> bytes:
    """Export a module.

    Args:
        module: the module, in evaluation mode; the file contains its weights.
        input_shape: shape of one sample, without the batch axis.
        any_size: leave the input's height and width open, for a module that takes any.

    Returns:
        The serialized and checked ONNX model.

    Raises:
        ModelFailure: torch cannot export it.
    """
    if module.training:
        raise ModelFailure("a module is exported in evaluation mode; call eval() first")
    example = torch.zeros(2, *input_shape)  # the exporter would take a batch of 1 for a constant
    axes = {0: torch.export.Dim("n", min=1, max=4096)}
    if any_size:
        axes |= {2: torch.export.Dim("h", min=2, max=4096), 3: torch.export.Dim("w", min=2, max=4096)}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=(axes,),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as exc:  # the exporter raises many kinds
        raise ModelFailure(f"torch cannot export {type(module).__name__} to ONNX ({exc})") from exc
    finally:
        quiet.setLevel(level)
    if program is None:
        raise ModelFailure(f"torch exported nothing for {type(module).__name__}")
    model = program.model_proto
    for node in model.graph.node:  # no stack traces and paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    model.graph.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)
