"""The edge half: photographs to frames, the link to the cloud, and the command line of a device.

    from bitneck_edge import EdgeClient

A name is imported when it is first used, so that the command line starts without ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bitneck import moved

if TYPE_CHECKING:
    from bitneck_edge.answers.results import (
        Answer,
        ClassShare,
        Failure,
        Label,
        Segmentation,
        StageTimes,
        Switch,
        Written,
    )
    from bitneck_edge.bundles.fetch import fetch_bundle
    from bitneck_edge.client import EdgeClient
    from bitneck_edge.encoder import EdgeEncoder, EncodedPhoto
    from bitneck_edge.settings import EdgeSettings
    from bitneck_edge.sources.capture import Capture
    from bitneck_edge.sources.photo import Photo, Pixels
    from bitneck_edge.sync import SyncEdgeClient

__all__ = [
    "Answer",
    "Capture",
    "ClassShare",
    "EdgeClient",
    "EdgeEncoder",
    "EdgeSettings",
    "EncodedPhoto",
    "Failure",
    "Label",
    "Photo",
    "Pixels",
    "Segmentation",
    "StageTimes",
    "Switch",
    "SyncEdgeClient",
    "Written",
    "fetch_bundle",
]

_HOMES = {
    "answers.results": (
        "Answer", "ClassShare", "Failure", "Label", "Segmentation", "StageTimes", "Switch", "Written",
    ),
    "bundles.fetch": ("fetch_bundle",),
    "client": ("EdgeClient",),
    "encoder": ("EdgeEncoder", "EncodedPhoto"),
    "settings": ("EdgeSettings",),
    "sources.capture": ("Capture",),
    "sources.photo": ("Photo", "Pixels"),
    "sync": ("SyncEdgeClient",),
}  # fmt: skip


moved.install()


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
