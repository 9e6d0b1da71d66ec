"""Answers: checked, put together, and drawn as pictures.

The public names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitneck_edge.answers.verify import check_classes, labels_of, segmentation_of

__all__ = ["check_classes", "labels_of", "segmentation_of"]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("bitneck_edge.answers.verify"), name)
