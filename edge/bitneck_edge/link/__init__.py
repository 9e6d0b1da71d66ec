"""The stream to the cloud: frames out, answers in, across reconnects.

The public names are imported when they are first used: `bitneck_edge.link.remote` alone needs none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitneck_edge.link.link import Link, LinkSettings
    from bitneck_edge.link.sent import Received, Sent

__all__ = ["Link", "LinkSettings", "Received", "Sent"]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "sent" if name in ("Received", "Sent") else "link"
    return getattr(importlib.import_module(f"bitneck_edge.link.{module}"), name)
