"""TensorBoard's scalars of a unit's training: estimated bytes, task term, lambda."""

from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard.writer import SummaryWriter

from bitneck_models.training.run import due
from bitneck_models.training.unit import StepReport

__all__ = ["Scalars"]

_EVERY = 10


class Scalars:
    """Writes every tenth step. A resumed run writes into the same folder and replaces the steps that it repeats.

    Args:
        folder: the folder, for ``tensorboard --logdir``; None to write nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def add(self, step: StepReport) -> None:
        """Write a step, if it is a tenth one or the last."""
        if self.folder is None or not due(step.step, _EVERY, step.steps):
            return
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder), purge_step=step.step)
        values = {"estimated_bytes": step.bits / 8, "task": step.task, "lambda": step.lambda_}
        for name, value in values.items():
            self._writer.add_scalar(name, value, step.step)

    def __enter__(self) -> Self:
        """Nothing is written before the first step."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the rest, and close the file."""
        if self._writer is not None:
            self._writer.close()
