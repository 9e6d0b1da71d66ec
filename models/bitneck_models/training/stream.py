"""Fresh views of photographs, taken through the frozen head at every step: training without a cache of features.

    photographs --workers: read, random view--> x (n, 3, H, W) --frozen head--> f (n, C, Hf, Wf)

A cache holds a few views of each photograph; a large data set would fill a disk with them. Here every update sees views
that no other has seen. A view depends on the seed, the step and the photograph alone, so the number of workers and of
processes does not matter.

Dimensions: M photographs, n samples of a process, H x W input, C x Hf x Wf feature.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitneck.manifest import InputSpec, Task
from bitneck_models.data.class_maps import VOID
from bitneck_models.data.features import head_module, random_input, sized_class_map
from bitneck_models.networks.backbone import Backbone
from bitneck_models.training.run import low_precision

__all__ = ["Key", "ViewStream", "keyed_loader"]

Key = tuple[int, int]
"""A step, and the number of a photograph."""


def keyed_loader(
    views: Dataset[Any], keys: Iterator[list[Key]], workers: int, *, pinned: bool = False
) -> DataLoader[Any]:
    """Reads views ahead, batch by batch.

    Args:
        views: by key. Worker processes get a copy of it.
        keys: of each batch; may be endless.
        workers: processes that read; 0 to read in this one.
        pinned: put batches where a GPU copies them from fastest.

    Returns:
        The batches, collated into tensors.
    """
    # Forking would copy the locks of this process's threads.
    method = "spawn" if workers else None
    return DataLoader(
        views, batch_sampler=keys, num_workers=workers, multiprocessing_context=method, pin_memory=pinned
    )  # fmt: skip


class _Views(Dataset[tuple[NDArray[np.float32], NDArray[np.uint8]]]):
    """The view of a photograph at a step, and its class map; the map is empty where none is wanted.

    Worker processes get a copy of it.
    """

    def __init__(
        self,
        photos: Sequence[Path],
        maps: Mapping[Path, Path] | None,
        spec: InputSpec,
        task: Task,
        classes: int,
        seed: int,
    ) -> None:
        self.photos, self.maps, self.spec, self.task, self.classes, self.seed = photos, maps, spec, task, classes, seed

    def __getitem__(self, key: Key) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        step, row = key
        path = self.photos[row]
        known = sized_class_map(self.maps[path], self.classes, self.spec) if self.maps and path in self.maps else None
        x, found = random_input(path, known, self.spec, self.task, np.random.default_rng([self.seed, step, row]))
        if self.maps is None or found is None:
            return x[0], np.empty((0, 0), np.uint8)
        return x[0], found if known is not None else np.full_like(found, VOID)


class ViewStream:
    """Features of fresh views, step by step.

    Args:
        backbone: the frozen network.
        split: the split point.
        photos: the photographs, M.
        maps: segmentation: files of their class maps, if the task needs them; else None.
        seed: seed of the views.
        workers: processes that read photographs; 0 to read them in this one.
        device: where the head runs, as torch names it. On a CPU it runs in ONNX Runtime, which is several times faster.
        precision: of a head on a GPU.
        folder: keeps the head's ONNX module.
    """

    def __init__(
        self,
        backbone: Backbone,
        split: str,
        photos: Sequence[Path],
        maps: Mapping[Path, Path] | None,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        precision: str,
        folder: Path,
    ) -> None:
        self.has_maps = maps is not None
        self._views = _Views(photos, maps, backbone.input, backbone.task, len(backbone.labels), seed)
        self._workers, self._device = workers, device
        self._coming: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next = -1
        if device.type == "cpu":
            module = head_module(backbone, split, folder)
            self._head: Callable[[Tensor], Tensor] = lambda x: torch.from_numpy(module.run(x.numpy()))
        else:
            head = copy.deepcopy(backbone.head(split)).to(device)  # the backbone stays where it is

            def run(x: Tensor) -> Tensor:
                with torch.no_grad(), low_precision(device, precision):
                    f: Tensor = head(x.to(device, non_blocking=True))
                return f.float()

            self._head = run

    def __len__(self) -> int:
        """M."""
        return len(self._views.photos)

    def read(self, step: int, rows_of: Callable[[int], NDArray[np.intp]]) -> tuple[Tensor, NDArray[np.uint8] | None]:
        """Features of the views of a step, while workers read those of the steps after it.

        Args:
            step: number of the step.
            rows_of: the photographs of a step and of later ones, in order.

        Returns:
            (n, C, Hf, Wf) float32, and the class maps (n, H, W) of the views, `VOID` where unknown; None if the task
            needs none.
        """
        if self._coming is None or self._next != step:
            keys = ([(k, int(row)) for row in rows_of(k)] for k in itertools.count(step))
            self._coming = iter(keyed_loader(self._views, keys, self._workers, pinned=self._device.type == "cuda"))
        self._next = step + 1
        return self._features(*next(self._coming))

    def read_once(self, step: int, rows: NDArray[np.intp]) -> tuple[Tensor, NDArray[np.uint8] | None]:
        """The same for given photographs, in this process, and without reading ahead."""
        parts = [self._views[step, int(row)] for row in rows]
        x, maps = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        return self._features(x, maps)

    def _features(self, x: Tensor, maps: Tensor) -> tuple[Tensor, NDArray[np.uint8] | None]:
        return self._head(x), maps.numpy() if self.has_maps else None
