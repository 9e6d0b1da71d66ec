"""What a task has to define so that its networks can be measured: one `Metric` and one `Meter`.

    Metric   reads photographs with their truths, and turns the network's output into an answer
    Meter    counts the answers of one network, photograph by photograph

The evaluation of bundles and the baselines work on these alone. A new task is one module such as
`bitneck_models.measure.top1`, and one line in `METRICS`.
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bitneck.manifest import Task
from bitneck_models.data.photos import LabelledPhoto

__all__ = ["METRICS", "Meter", "Metric", "Photo", "metric_for"]

Photo = LabelledPhoto | tuple[Path, Path]
"""A photograph with its truth: the index of a class, or the file of a class map."""

Answer = NDArray[np.integer]
"""The best class, () or (H, W)."""


class Meter(Protocol):
    """Compares the answers of one network with the truth. The network is the uncompressed one or an operating point."""

    def add(self, answer: Answer, truth: Answer) -> None:
        """Count one photograph."""

    def accuracy(self) -> float:
        """The task's measure of accuracy, 0 to 1."""

    def fields(self, uncompressed: Self, agreement: float) -> dict[str, Any]:
        """The fields of an operating point's result that say how good it is.

        Args:
            uncompressed: meter of the uncompressed network, on the same photographs.
            agreement: share of the answers that are those of the uncompressed network.
        """

    def details(self) -> dict[str, Any]:
        """What the result says of the uncompressed network beside its accuracy."""

    def check(self, folder: str) -> None:
        """Refuse truths that say nothing.

        Raises:
            InvalidConfig: there is nothing to compare with.
        """


class Metric(Protocol):
    """One task.

    Attributes:
        key: name of the accuracy in documents.
        title: its name for people.
        columns: titles of what `cells` gives.
    """

    key: str
    title: str
    columns: tuple[str, ...]

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        """Keep the names of the classes, and the indices in class maps that are void.

        Raises:
            InvalidConfig: indices for a task that has no class maps.
        """

    @staticmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[Photo]:
        """The photographs of a folder with their truths."""

    def path(self, photo: Photo) -> Path:
        """The photograph's file."""

    def truth(self, photo: Photo) -> Answer:
        """What the answer should be."""

    def answer(self, output: NDArray[np.float32]) -> Answer:
        """The answer that logits (K,) or (K, H, W) give."""

    def meter(self) -> Meter:
        """A meter that has counted nothing."""

    def cells(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """A row of the table for people, from a meter's `fields`."""

    def summary(self, accuracy: float, details: Mapping[str, Any], images: int) -> str:
        """A line for people about the uncompressed network."""


METRICS: Mapping[Task, str] = {
    "classification": "bitneck_models.measure.top1:Top1",
    "segmentation": "bitneck_models.measure.mean_iou:MeanIou",
}
"""The metric of each task, as ``module:class``."""


def metric_for(task: Task, labels: Sequence[str], ignore: Collection[int] = ()) -> Metric:
    """The metric of a task.

    Args:
        task: of the network.
        labels: names of its classes.
        ignore: indices that are void in class maps; without them each one that is no class.

    Raises:
        InvalidConfig: `ignore` for a task that has no class maps.
    """
    module, _, name = METRICS[task].partition(":")
    metric: Metric = getattr(importlib.import_module(module), name)(labels, ignore)
    return metric
