"""What a task has to define so that its networks can be measured: one `Metric` and one `Meter`.

    Metric   reads photographs with their truths, turns the network's output into an answer, and words the results
    Meter    counts the answers of one network, photograph by photograph

The evaluation of bundles, the baselines and the report work on these alone. A new task is one module such as
`bitneck_models.measure.top1`, and one line in `METRICS`.
"""

import importlib
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from bitneck.manifest import Task
from bitneck_models.measure.sweeps import BaselineSweep

__all__ = ["METRICS", "Answer", "Meter", "Metric", "metric_for", "metric_titles"]

Photo = TypeVar("Photo")
"""A photograph with its truth, of the type that the task's `Metric.photos` gives."""

Answer = NDArray[np.integer]
"""The best class, () or (H, W)."""


class Meter(Protocol):
    """Compares the answers of one network with the truth. The network is the uncompressed one or an operating point."""

    @abstractmethod
    def add(self, answer: Answer, truth: Answer) -> None:
        """Count one photograph."""

    @abstractmethod
    def accuracy(self) -> float:
        """The task's measure of accuracy, 0 to 1."""

    @abstractmethod
    def fields(self, uncompressed: Self, agreement: float) -> dict[str, Any]:
        """The fields of an operating point's result that say how good it is.

        Args:
            uncompressed: meter of the uncompressed network, on the same photographs.
            agreement: share of the answers that are those of the uncompressed network.
        """

    def details(self) -> dict[str, Any]:
        """Further figures of the uncompressed network; by default none."""
        return {}

    def check(self, folder: str) -> None:
        """Refuse truths that give nothing to compare with; by default every truth gives something.

        Args:
            folder: of the truths, for the message.

        Raises:
            InvalidConfig: there is nothing to compare with.
        """
        del folder


class Metric(Protocol[Photo]):
    """One task.

    Attributes:
        key: name of the accuracy in documents.
        title: its name for people.
        columns: titles of the cells that `cells` gives.
        sweep: settings of the baselines.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    sweep: BaselineSweep

    def __init__(self, labels: Sequence[str], ignore: Collection[int]) -> None:
        """Keep the names of the classes, and the indices in class maps that are void.

        Raises:
            InvalidConfig: indices for a task that has no class maps.
        """

    @staticmethod
    @abstractmethod
    def photos(folder: Path, wnids: Sequence[str], labels: Sequence[str]) -> Sequence[Photo]:
        """The photographs of a folder with their truths."""

    @abstractmethod
    def path(self, photo: Photo) -> Path:
        """The photograph's file."""

    @abstractmethod
    def truth(self, photo: Photo) -> Answer | None:
        """What the answer should be; None where nobody knows: then the uncompressed network's answer stands in."""

    @abstractmethod
    def truth_folder(self, photo: Photo) -> Path:
        """The folder that the truth comes from, for messages."""

    @abstractmethod
    def answer(self, output: NDArray[np.float32]) -> Answer:
        """The answer that logits (K,) or (K, H, W) give."""

    @abstractmethod
    def meter(self) -> Meter:
        """A meter that has counted nothing."""

    @abstractmethod
    def cells(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """A row of the table for people, from a meter's `fields`."""

    @abstractmethod
    def summary(self, accuracy: float, details: Mapping[str, Any], images: int) -> str:
        """A line for people about the uncompressed network."""


METRICS: Mapping[Task, str] = {
    "classification": "bitneck_models.measure.top1:Top1",
    "segmentation": "bitneck_models.measure.mean_iou:MeanIou",
}
"""The metric of each task, as ``module:class``."""


def metric_for(task: Task, labels: Sequence[str], ignore: Collection[int] = ()) -> Metric[Any]:
    """The metric of a task.

    Args:
        task: of the network.
        labels: names of its classes.
        ignore: indices in class maps that are void. By default, all indices that are no class.

    Raises:
        InvalidConfig: `ignore` for a task that has no class maps.
    """
    metric: Metric[Any] = _load(METRICS[task])(labels, ignore)
    return metric


def metric_titles() -> dict[str, str]:
    """The name for people of every task's accuracy, by its name in documents."""
    metrics = [_load(place) for place in METRICS.values()]
    return {metric.key: metric.title for metric in metrics}


def _load(place: str) -> type[Metric[Any]]:
    module, _, name = place.partition(":")
    metric: type[Metric[Any]] = getattr(importlib.import_module(module), name)
    return metric
