"""The stream to the cloud: frames out, answers in, across reconnects."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitneck_edge.link.link import Link, LinkSettings, Received, Sent

__all__ = ["Link", "LinkSettings", "Received", "Sent"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: whoever wants `bitneck_edge.link.remote` needs no more."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bitneck_edge.link import link

    return getattr(link, name)
