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
from typing import Literal, Self, TypeVar

from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.context_model import ContextModel
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.ids import check_relative_path
from bitneck.manifest import FileEntry, FileRole, Manifest, Precision, bundle_id_of, sha256_hex
from bitneck.text import clean_text

__all__ = ["MANIFEST_NAME", "Bundle", "BundleWriter", "verify_file"]

_MAX_LABEL = 200
"""Characters of a class's name."""

MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = _MAX_SMALL_BYTES = 8 << 20

Fitting = TypeVar("Fitting", ContextModel, ConditionalModel)
"""What goes with an operating point's tables."""


class Bundle:
    """A verified bundle, or the half of one that an edge has.

    `open` builds it, and checks every file against the manifest's size and digest. A device keeps the files of all its
    bundles together, by digest; `bitneck_edge.bundles.store` makes a bundle of these.

    Attributes:
        root: its folder.
        manifest: its contents.
        bundle_id: the digest of the manifest.
        manifest_json: the manifest's exact bytes.
        precision: of what a device runs of it.

    Args:
        locate: where a file is, if not below `root` by its name.
    """

    def __init__(
        self, root: Path, manifest: Manifest, manifest_json: bytes, locate: Callable[[FileEntry], Path] | None = None
    ) -> None:
        self._locate = locate
        self.precision: Precision = "float32"
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
            BundleCorrupt: an invalid manifest, or a file that is missing, unreadable, cut short or altered.
        """
        path = root / MANIFEST_NAME
        if not os.path.isfile(path):  # noqa: PTH113  False, and no exception, for a path that is too long
            raise InvalidConfig(
                f"{root} is not a bundle: it has no {MANIFEST_NAME}; "
                f"make one with `bitneck-models export ZOO --out {root}`"
            )
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleCorrupt(f"{path} has more than {_MAX_MANIFEST_BYTES} bytes")
        with _readable(path):
            manifest_json = path.read_bytes()
        manifest = Manifest.from_json(manifest_json, str(path))
        files = manifest.files if side == "all" else manifest.files_for(side)
        for name, entry in files.items():
            verify_file(root / name, entry)
        return cls(root, manifest, manifest_json)

    def path(self, name: str) -> Path:
        """The path of a file of the manifest.

        Raises:
            InvalidConfig: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise InvalidConfig(f"the bundle {self.manifest.name} has no file {name[:80]!r}")
        return self.root / name if self._locate is None else self._locate(self.manifest.files[name])

    def tables(self, point_id: str) -> FactorizedModel:
        """An operating point's factorized model.

        Raises:
            BundleCorrupt: unreadable, or of another number of channels than the manifest says.
        """
        entry = self.manifest.point(point_id)
        path = self.path(entry.tables)
        data = self._read(path)
        try:
            tables = FactorizedModel.from_npz(data)
        except BundleCorrupt as exc:
            raise BundleCorrupt(f"{path}: {exc}") from exc
        channels = self.manifest.unit(entry.unit).channels
        if tables.channels != channels:
            raise BundleCorrupt(f"{path} has tables of {tables.channels} channels, the manifest says {channels}")
        return tables

    def contexts(self, point_id: str, tables: FactorizedModel) -> ContextModel | None:
        """An operating point's context model; None if the bundle has none.

        Args:
            point_id: the operating point.
            tables: its factorized model.

        Raises:
            BundleCorrupt: unreadable, or it does not fit the point's tables.
        """
        return self._fitting(ContextModel, self.manifest.point(point_id).contexts, tables)

    @property
    def has_conditional(self) -> bool:
        """Whether any operating point has a conditional model."""
        return any(point.conditional in self.manifest.files for point in self.manifest.points)

    def conditional(self, point_id: str, tables: FactorizedModel | None = None) -> ConditionalModel | None:
        """An operating point's conditional model; None if the bundle has none.

        Args:
            point_id: the operating point.
            tables: its factorized model, if it has been read already.

        Raises:
            BundleCorrupt: unreadable, or it does not fit the point's tables.
        """
        name = self.manifest.point(point_id).conditional
        return self._fitting(ConditionalModel, name, tables or self.tables(point_id))

    def _fitting(self, kind: type[Fitting], name: str, tables: FactorizedModel) -> Fitting | None:
        """A model of a point that goes with its tables; None if the bundle has no such file."""
        if name not in self.manifest.files:
            return None
        path = self.path(name)
        data = self._read(path)
        try:
            model = kind.from_npz(data)
            model.check_fits(tables)
        except (BundleCorrupt, InvalidConfig) as exc:
            raise BundleCorrupt(f"{path}: {exc}") from exc
        return model

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, by index.

        Raises:
            BundleCorrupt: not a JSON list of strings.
        """
        try:
            labels = json.loads(self._read(self.path(self.manifest.labels)))
        except (ValueError, RecursionError) as exc:
            raise BundleCorrupt(f"{self.manifest.labels} is not JSON ({exc}); export the bundle again") from exc
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise BundleCorrupt(f"{self.manifest.labels} is not a list of names; export the bundle again")
        return tuple(clean_text(label, _MAX_LABEL) for label in labels)

    @staticmethod
    def _read(path: Path) -> bytes:
        """The bytes of a file of names or tables, which is small."""
        with _readable(path):
            if (size := path.stat().st_size) > _MAX_SMALL_BYTES:
                raise BundleCorrupt(f"{path} has {size} bytes, names and tables have at most {_MAX_SMALL_BYTES}")
            return path.read_bytes()


def verify_file(path: Path, entry: FileEntry) -> None:
    """Check a file against the manifest: size first, then digest.

    Raises:
        BundleCorrupt: missing, unreadable, of another size, or of another digest.
    """
    if not path.is_file():
        raise BundleCorrupt(f"{path} is missing; export or fetch the bundle again")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleCorrupt(
            f"{path} has {size} bytes, the manifest says {entry.size}; export or fetch the bundle again"
        )
    with _readable(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise BundleCorrupt(
            f"{path} has SHA-256 {digest[:16]}…, the manifest says {entry.sha256[:16]}…; "
            "export or fetch the bundle again"
        )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a failure to read an existing file into `BundleCorrupt`."""
    try:
        yield
    except OSError as exc:
        raise BundleCorrupt(f"{path} cannot be read ({exc.strerror}); check its permissions and the disk") from exc


class BundleWriter:
    """Writes a bundle beside its destination and moves it there when it is complete.

    A process that opens the destination meanwhile sees the whole old bundle, the whole new one, or for an instant no
    bundle. It never sees a mixture.

    Use it as a context manager. A block that ends without `finish`, or by an exception, leaves no files. An existing
    bundle at the destination is replaced. Any other folder that is not empty is refused.

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
            InvalidConfig: the destination is no bundle, or cannot be written.
        """
        with _writable(self.destination):
            if self.destination.exists() and not _replaceable(self.destination):
                raise InvalidConfig(f"{self.destination} exists and is no bundle; choose another place or remove it")
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            staging = tempfile.mkdtemp(prefix=f".{self.destination.name}-", dir=self.destination.parent)
            self._staging = Path(staging)
            self._staging.chmod(0o755)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove unfinished files."""
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
            InvalidConfig: a malformed or repeated path, or the disk refuses it.
        """
        if self._staging is None:
            raise InvalidConfig("a bundle writer is used inside its `with` block")
        check_relative_path(name)
        if name in self._files:
            raise InvalidConfig(f"{name} was added twice")
        path = self._staging / name
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._files[name] = FileEntry(role=role, size=len(data), sha256=sha256_hex(data))

    def read(self, name: str) -> bytes:
        """The bytes of a file that was added.

        Raises:
            InvalidConfig: it was not.
        """
        if self._staging is None or name not in self._files:
            raise InvalidConfig(f"{name} was not added")
        return (self._staging / name).read_bytes()

    @property
    def files(self) -> dict[str, FileEntry]:
        """The files that were added, for the manifest."""
        return dict(sorted(self._files.items()))

    def finish(self, manifest: Manifest, check: Callable[[Bundle], None] = lambda _bundle: None) -> Bundle:
        """Write the manifest and move the bundle to its destination.

        Args:
            manifest: lists the files that were added.
            check: called with the complete bundle before it is moved. If it raises, nothing is moved.

        Returns:
            The bundle, opened and verified at its destination.

        Raises:
            BundleCorrupt: the manifest does not match the files.
            InvalidConfig: the destination cannot be written or replaced.
        """
        if self._staging is None:
            raise InvalidConfig("a bundle writer is used inside its `with` block")
        with _writable(self._staging):
            (self._staging / MANIFEST_NAME).write_bytes(manifest.to_json())
        check(Bundle.open(self._staging))
        with _writable(self.destination), _moved_aside(self.destination):
            self._staging.rename(self.destination)
        self._staging = None
        return Bundle.open(self.destination)


@contextlib.contextmanager
def _moved_aside(path: Path) -> Iterator[None]:
    """Rename `path` away while its successor moves in; put it back if that fails."""
    if not path.exists():
        yield
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-replaced-", dir=path.parent))
    try:
        path.rename(aside)  # over an empty folder: POSIX allows it
        try:
            yield
        except BaseException:
            aside.rename(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn a failure to write into `InvalidConfig`: another folder may work."""
    try:
        yield
    except OSError as exc:
        raise InvalidConfig(f"{path} cannot be written ({exc.strerror}); choose another place, or make room") from exc


def _replaceable(path: Path) -> bool:
    """Whether a path that exists is a bundle or an empty folder."""
    return path.is_dir() and ((path / MANIFEST_NAME).is_file() or not any(path.iterdir()))
