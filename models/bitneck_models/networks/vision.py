"""Import of torchvision, and of timm, which needs it, beside a build of torch that does not match.

PyPI has torchvision only as a CUDA build. Beside a CPU build of torch its native library does not load, and its import
fails at two operators that it expects to be registered. It is enough to declare them first, because bitneck never calls
them. If the library loads, nothing is declared.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["imagenet_wnids", "import_timm", "import_torchvision"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a Library's operators live as long as the object


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, with its operators declared if its own library does not load."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as exc:
        if "torchvision::nms" not in str(exc):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _declared.append(library)
    for name in _OPERATORS:
        library.define(name + _SCHEMA)  # type: ignore[no-untyped-call]
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """The module ``timm``, which imports torchvision."""
    import_torchvision()
    return importlib.import_module("timm")


def imagenet_wnids(labels: Sequence[str]) -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1,000 classes if the labels are their names, in order; else nothing."""
    if len(labels) != 1000:
        return ()
    info = import_timm().data.ImageNetInfo("imagenet-1k")
    return tuple(info.label_names()) if tuple(info.label_descriptions()) == tuple(labels) else ()
