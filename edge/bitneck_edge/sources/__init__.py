"""Where pictures come from: files, folders, videos, network streams and cameras.

The public names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitneck_edge.sources.parse import VIDEO_SUFFIXES, Source, parse_sources
    from bitneck_edge.sources.read import read_sources
    from bitneck_edge.sources.threads import in_thread

__all__ = ["VIDEO_SUFFIXES", "Source", "in_thread", "parse_sources", "read_sources"]

_HOMES = {"in_thread": "threads", "read_sources": "read"}
"""The rest is in ``parse``."""


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'parse')}"), name)
