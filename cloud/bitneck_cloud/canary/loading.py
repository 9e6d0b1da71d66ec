"""Candidates are verified and loaded beside the bundle that is served. Everything here blocks."""

from bitneck.bundle import Bundle
from bitneck.errors import BundleError, CanaryRefused, InvalidConfig, ModelFailure
from bitneck.runtime import ModulePool, return_freed_memory
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.sessions.registry import Registry

__all__ = ["CandidateLoader", "hold_files"]


class CandidateLoader:
    """Loads candidates.

    Args:
        registry: has the bundles that are served.
        candidates: bundles that may be tried.
        pool: shares the ONNX files that several bundles have.
        threads: see `ServedModel`.
    """

    def __init__(self, registry: Registry, candidates: Candidates, pool: ModulePool, threads: int) -> None:
        self._registry = registry
        self._candidates = candidates
        self._pool = pool
        self._threads = threads

    def load(self, name: str, current: ServedModel, expected: str = "") -> ServedModel:
        """Verify and load a candidate, beside the bundle that is served.

        Args:
            name: of the candidate.
            current: the bundle that is served; equal files are shared.
            expected: the id that it must have; empty for any.

        Raises:
            UnknownCandidate: there is no such candidate.
            CanaryRefused: the server has no candidates, or this one cannot be served as one of this model.
        """
        folder = self._candidates.folder_of(name)
        try:
            bundle = Bundle.open(folder)
            if bundle.manifest.name != current.name:
                raise CanaryRefused(
                    f"the candidate {folder.name} is a bundle of {bundle.manifest.name!r}, expected {current.name!r}"
                )
            if expected and bundle.bundle_id != expected:
                raise CanaryRefused(f"the candidate {folder.name} is {bundle.bundle_id} now, it was {expected}")
            if bundle.bundle_id == current.bundle.bundle_id:
                raise CanaryRefused(f"the candidate {folder.name} is the bundle that is served, {bundle.bundle_id}")
            before = self._registry.still_served(current.name, bundle.bundle_id)
            if before is not None and before.bundle.root == bundle.root:  # sessions that use it count with the others
                served = before
            else:
                served = ServedModel(bundle, threads=self._threads, pool=self._pool, before=current)
        except (BundleError, ModelFailure, InvalidConfig) as exc:
            raise CanaryRefused(f"the candidate {folder.name} cannot be served: {exc}") from exc
        return_freed_memory()
        return served


def hold_files(served: ServedModel) -> None:
    """Let devices have a bundle's files from now on, whatever becomes of its folder.

    Raises:
        CanaryRefused: its folder is gone, or holds something else.
    """
    bundle = served.bundle
    try:
        found = Bundle.open(bundle.root).bundle_id
        if found != bundle.bundle_id:
            raise CanaryRefused(f"the candidate {bundle.root.name} is {found} now, it was {bundle.bundle_id}")
        served.files.hold()
    except (BundleError, InvalidConfig) as exc:
        raise CanaryRefused(f"no device could fetch the candidate {bundle.root.name} any more: {exc}") from exc
