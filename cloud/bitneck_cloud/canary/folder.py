"""A candidate's folder while its canary runs: whether devices can still fetch the bundle from it."""

import asyncio

from bitneck.bundle import MANIFEST_NAME, Bundle

__all__ = ["CandidateFolder"]

_MOST_S = 2.0
"""A disk that has not answered for so long, such as a network's that is gone, counts as one that is away."""


class CandidateFolder:
    """The folder of a bundle that was loaded from it.

    Args:
        bundle: that it should hold.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._looking: asyncio.Task[str] | None = None

    async def look(self) -> str:
        """Why no device can fetch the bundle; empty if it can. Contents are not read again: devices verify them.

        One thread looks at a time, also if the disk does not answer; whoever asks meanwhile waits for the same look.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(asyncio.to_thread(_problem_of, self._bundle))
        looking = self._looking
        await asyncio.wait({looking}, timeout=_MOST_S)
        return looking.result() if looking.done() else f"its folder {self._bundle.root} does not answer"


def _problem_of(bundle: Bundle) -> str:
    try:
        if (bundle.root / MANIFEST_NAME).read_bytes() != bundle.manifest_json:
            return f"its folder {bundle.root} holds another bundle now, it was {bundle.bundle_id}"
        for name in bundle.manifest.files_for("edge"):
            if bundle.path(name).stat().st_size != bundle.manifest.files[name].size:
                return f"{bundle.root / name} has changed"
    except OSError as exc:
        return f"its folder {bundle.root} cannot be read ({exc.strerror or exc})"
    return ""
