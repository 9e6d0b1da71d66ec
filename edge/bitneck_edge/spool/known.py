"""The manifests of the bundles that coded a spool's frames, with the names of their classes.

    <folder>/<SHA-256 of the manifest>.manifest
    <folder>/<SHA-256 of the manifest>.labels

An answer may come long after the device has another bundle, and the cache may be gone by then. Nothing more of a bundle
is needed to understand it.
"""

import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bitneck.bundle import Bundle
from bitneck.errors import BitneckError
from bitneck.manifest import Manifest, bundle_id_of
from bitneck_edge.bundles.store import digits_of, read_regular, write_new
from bitneck_edge.link.remote import MAX_MANIFEST_BYTES

__all__ = ["KnownBundle", "KnownBundles"]


@dataclass(frozen=True, slots=True)
class KnownBundle:
    """What an answer is understood with.

    Attributes:
        bundle_id: of the bundle.
        manifest: its contents.
        labels: the names of the classes, by index.
    """

    bundle_id: str
    manifest: Manifest
    labels: tuple[str, ...]


class KnownBundles:
    """Manifests in a folder. Those of this process's own bundles are understood also when their files are gone.

    Args:
        folder: made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, KnownBundle] = {}

    def keep(self, bundle: Bundle) -> None:
        """Keep what answers to a bundle's frames are understood with.

        Raises:
            OSError: it cannot be written.
        """
        manifest, labels = self._paths(bundle.bundle_id)
        if bundle.bundle_id in self._kept and manifest.is_file() and labels.is_file():
            return
        self._kept[bundle.bundle_id] = KnownBundle(bundle.bundle_id, bundle.manifest, tuple(bundle.labels()))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._read(bundle.bundle_id) is None:
            write_new(labels, json.dumps(bundle.labels()).encode())
            write_new(manifest, bundle.manifest_json)

    def get(self, bundle_id: str) -> KnownBundle | None:
        """What was kept of a bundle; None if that is not here, or damaged."""
        return self._read(bundle_id) or self._kept.get(bundle_id)

    def _read(self, bundle_id: str) -> KnownBundle | None:
        manifest_path, labels_path = self._paths(bundle_id)
        data = read_regular(manifest_path, MAX_MANIFEST_BYTES)
        try:
            labels = json.loads(read_regular(labels_path, MAX_MANIFEST_BYTES))
            if bundle_id_of(data) != bundle_id or not all(isinstance(label, str) for label in labels):
                return None
            return KnownBundle(bundle_id, Manifest.from_json(data, str(manifest_path)), tuple(labels))
        except (ValueError, TypeError, RecursionError, BitneckError):
            return None

    def forget_others(self, bundles: Collection[str]) -> None:
        """Remove those that no frame needs."""
        needed = {digits_of(bundle_id) for bundle_id in bundles}
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.stem not in needed:
                    path.unlink(missing_ok=True)
                    self._kept.pop(f"sha256:{path.stem}", None)

    def _paths(self, bundle_id: str) -> tuple[Path, Path]:
        digits = digits_of(bundle_id)
        return self._folder / f"{digits}.manifest", self._folder / f"{digits}.labels"
