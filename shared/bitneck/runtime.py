"""ONNX Runtime: one file, one input, one output."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bitneck.errors import ModelFailure

__all__ = ["OnnxModule"]


class OnnxModule:
    """An ONNX file with one float32 input and one float32 output, batch axis first.

    ``run`` is thread-safe.

    Args:
        path: the file.
        threads: threads inside one operator; 0 lets ONNX Runtime take every core.

    Raises:
        ModelFailure: ONNX Runtime cannot load it, or it has more than one input or output.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self.name = path.parent.name + "/" + path.name
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A process holds many sessions; threads that spin while they wait would take the cores from one another.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime raises a kind of its own for every status
            raise ModelFailure(f"{path}: ONNX Runtime cannot load it ({exc})") from exc
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelFailure(f"{path}: expected one input and one output, got {len(inputs)} and {len(outputs)}")
        self._input = inputs[0].name
        self._outputs = [outputs[0].name]

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the module.

        Args:
            x: (N, ...) float32.

        Returns:
            (N, ...) float32.

        Raises:
            ModelFailure: ONNX Runtime refused the input.
        """
        try:
            (y,) = self._session.run(self._outputs, {self._input: x})
        except Exception as exc:
            raise ModelFailure(f"{self.name}: ONNX Runtime failed on an input of shape {x.shape} ({exc})") from exc
        result: NDArray[np.float32] = y
        return result
