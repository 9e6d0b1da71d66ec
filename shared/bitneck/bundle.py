"""Bundles on disk: read and verified, written all or nothing."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.ids import check_relative_path
from bitneck.manifest import FileEntry, FileRole, Manifest, bundle_id_of, sha256_hex
from bitneck.tables import FactorizedModel

__all__ = ["MANIFEST_NAME", "Bundle", "BundleWriter", "verify_file"]

MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 8 << 20


class Bundle:
    """A verified bundle, or the half of one that an edge has.

    Build it with `open`. Paths that it gives were checked against the manifest's sizes and digests.

    Attributes:
        root: its folder.
        manifest: what it holds.
        bundle_id: the digest of the manifest.
        manifest_json: the manifest's exact bytes.
    """

    def __init__(self, root: Path, manifest: Manifest, manifest_json: bytes) -> None:
        self.root = root
        self.manifest = manifest
        self.manifest_json = manifest_json
        self.bundle_id = bundle_id_of(manifest_json)

    @classmethod
    def open(cls, root: Path, side: Literal["edge", "cloud", "all"] = "all") -> Self:
        """Open a bundle and verify the files that one side needs.

        Args:
            root: its folder.
            side: whose files must be there; ``all`` for both.

        Raises:
            InvalidConfig: no such folder, or no manifest in it.
            BundleCorrupt: an invalid manifest, or a file that is missing, cut short or altered.
        """
        path = root / MANIFEST_NAME
        if not path.is_file():
            raise InvalidConfig(
                f"{root} is not a bundle: it has no {MANIFEST_NAME}; "
                f"make one with `bitneck-models export ZOO --out {root}`"
            )
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleCorrupt(f"{path} has more than {_MAX_MANIFEST_BYTES} bytes")
        manifest_json = path.read_bytes()
        manifest = Manifest.from_json(manifest_json, str(path))
        files = manifest.files if side == "all" else manifest.files_for(side)
        for name, entry in files.items():
            verify_file(root / name, entry)
        return cls(root, manifest, manifest_json)

    def path(self, name: str) -> Path:
        """Where a file of the manifest lies.

        Raises:
            InvalidConfig: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise InvalidConfig(f"the bundle {self.manifest.name} has no file {name[:80]!r}")
        return self.root / name

    def segment_path(self, index: int) -> Path:
        """The ONNX file of one segment."""
        return self.path(self.manifest.segments[index].file)

    def encoder_path(self, point_id: str) -> Path:
        """The ONNX file of an operating point's bottleneck encoder."""
        return self.path(f"points/{point_id}/encoder.onnx")

    def decoder_path(self, point_id: str) -> Path:
        """The ONNX file of an operating point's bottleneck decoder."""
        return self.path(f"points/{point_id}/decoder.onnx")

    def tables(self, point_id: str) -> FactorizedModel:
        """An operating point's factorized model.

        Raises:
            BundleCorrupt: unreadable, or of another number of channels than the manifest says.
        """
        tables = FactorizedModel.from_npz(self.path(f"points/{point_id}/tables.npz").read_bytes())
        channels = self.manifest.ladder[point_id].latent_shape[0]
        if tables.channels != channels:
            raise BundleCorrupt(f"tables of {point_id} have {tables.channels} channels, the manifest says {channels}")
        return tables

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, by index.

        Raises:
            BundleCorrupt: not a JSON list of strings.
        """
        try:
            labels = json.loads(self.path(self.manifest.labels).read_bytes())
        except ValueError as exc:
            raise BundleCorrupt(f"{self.manifest.labels} is not JSON ({exc}); export the bundle again") from exc
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise BundleCorrupt(f"{self.manifest.labels} is not a list of names; export the bundle again")
        return tuple(labels)


def verify_file(path: Path, entry: FileEntry) -> None:
    """Check a file against the manifest: size first, then digest.

    Raises:
        BundleCorrupt: missing, of another size, or of another digest.
    """
    if not path.is_file():
        raise BundleCorrupt(f"{path} is missing; export or fetch the bundle again")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleCorrupt(
            f"{path} has {size} bytes, the manifest says {entry.size}; export or fetch the bundle again"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise BundleCorrupt(
            f"{path} has SHA-256 {digest[:16]}…, the manifest says {entry.sha256[:16]}…; "
            "export or fetch the bundle again"
        )


class BundleWriter:
    """Writes a bundle beside its destination and moves it there in one step when it is complete.

    Use it as a context manager; leaving the block without `finish`, or by an exception, leaves nothing behind.
    An existing bundle at the destination is replaced; any other folder that is not empty is refused.

    Args:
        destination: the bundle's folder.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self._staging: Path | None = None
        self._files: dict[str, FileEntry] = {}

    def __enter__(self) -> Self:
        """Make the staging folder.

        Raises:
            InvalidConfig: the destination holds something that is not a bundle.
        """
        if self.destination.exists():
            is_folder = self.destination.is_dir()
            if not is_folder or (any(self.destination.iterdir()) and not (self.destination / MANIFEST_NAME).is_file()):
                raise InvalidConfig(f"{self.destination} exists and is no bundle; choose another place or remove it")
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f".{self.destination.name}-", dir=self.destination.parent)
        self._staging = Path(staging)
        self._staging.chmod(0o755)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what was not finished."""
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def add(self, name: str, data: bytes, role: FileRole) -> None:
        """Add one file.

        Args:
            name: its path in the bundle.
            data: its bytes.
            role: which machine needs it.

        Raises:
            InvalidConfig: a malformed or repeated path.
        """
        if self._staging is None:
            raise InvalidConfig("a bundle writer is used inside its `with` block")
        check_relative_path(name)
        if name in self._files:
            raise InvalidConfig(f"{name} was added twice")
        path = self._staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._files[name] = FileEntry(role=role, size=len(data), sha256=sha256_hex(data))

    @property
    def files(self) -> dict[str, FileEntry]:
        """What was added, for the manifest."""
        return dict(sorted(self._files.items()))

    def finish(self, manifest: Manifest, check: Callable[[Bundle], None] = lambda _bundle: None) -> Bundle:
        """Write the manifest and move the bundle to its destination.

        Args:
            manifest: of the files that were added.
            check: called with the complete bundle before it is moved; where it raises, nothing is moved.

        Returns:
            The bundle, opened and verified at its destination.
        """
        if self._staging is None:
            raise InvalidConfig("a bundle writer is used inside its `with` block")
        (self._staging / MANIFEST_NAME).write_bytes(manifest.to_json())
        check(Bundle.open(self._staging))
        with _moved_aside(self.destination):
            self._staging.rename(self.destination)
        self._staging = None
        return Bundle.open(self.destination)


@contextlib.contextmanager
def _moved_aside(path: Path) -> Iterator[None]:
    """Rename `path` away while its successor moves in; put it back if that fails."""
    if not path.exists():
        yield
        return
    aside = path.parent / f".{path.name}-replaced-{os.getpid()}"
    path.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside)
