"""The open files of the server's process: how many connections they leave."""

import contextlib
import logging
import resource

from bitneck_cloud.api.http_server import MOST

__all__ = ["connections_for_grpc"]

_LOG = logging.getLogger(__name__)
_SPARE_DESCRIPTORS = 128
"""For files, and for what the process has open at its start."""
_GENERATIONS = 3
"""Of a model that are in memory, with their files: the newest one, the one before, and one that a session uses."""


def connections_for_grpc(wanted: int, held: int) -> int:
    """Connections that gRPC may have, after the process's soft limit of open files is raised to its hard one.

    Args:
        wanted: connections.
        held: open files of the bundles that are served; see `EdgeFiles`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others = MOST + _SPARE_DESCRIPTORS + _GENERATIONS * held
    left = wanted if limit == resource.RLIM_INFINITY else max(limit - others, 1)
    if left < wanted:
        _LOG.warning("this process may open %d files: gRPC gets %d connections, not %d", limit, left, wanted)
    return min(left, wanted)
