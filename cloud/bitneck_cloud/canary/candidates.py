"""The folder of candidates: bundles, each in a sub-folder whose name is an id. What looks at it blocks."""

from dataclasses import dataclass
from pathlib import Path

from bitneck.bundle import MANIFEST_NAME
from bitneck.errors import BitneckError, CanaryRefused, UnknownCandidate
from bitneck.ids import check_id
from bitneck.manifest import Manifest, bundle_id_of

__all__ = ["MOST_CANDIDATES", "Candidate", "Candidates"]

MOST_CANDIDATES = 256
"""Sub-folders that are listed; the first ones by name."""
_MAX_MANIFEST_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sub-folder that may be a bundle. Its other files are checked when it is loaded.

    Attributes:
        name: of the folder.
        model: the bundle's model; empty if the manifest cannot be read, like the next one.
        bundle_id: its id.
        points: number of its operating points.
        problem: why the manifest cannot be read; empty if it can.
    """

    name: str
    model: str = ""
    bundle_id: str = ""
    points: int = 0
    problem: str = ""


class Candidates:
    """Bundles that may be tried.

    Args:
        folder: that holds them; None if the server has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, tuple[tuple[int, int], Candidate]] = {}  # by name, as it was when it was read

    def all(self) -> list[Candidate]:
        """Every sub-folder with a well-formed name, by name.

        Raises:
            CanaryRefused: the server has no such folder, or it cannot be read.
        """
        folder = self._needed()
        try:
            names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_id(path.name))
        except OSError as exc:
            raise CanaryRefused(f"the folder of candidates {folder} cannot be read ({exc.strerror})") from exc
        before, found = self._known, {}
        for name in names[:MOST_CANDIDATES]:
            version = _version(folder / name / MANIFEST_NAME)
            known = before.get(name)
            found[name] = known if known is not None and known[0] == version else (version, _candidate(folder / name))
        self._known = found
        return [candidate for _, candidate in found.values()]

    def place(self, name: str) -> Path:
        """Where a candidate is, or would be. This does not block.

        Raises:
            CanaryRefused: the server has no folder of candidates.
            InvalidConfig: the name is no id.
        """
        return self._needed() / check_id(name, "candidate")

    def folder_of(self, name: str) -> Path:
        """The folder of a candidate.

        Raises:
            CanaryRefused: the server has no folder of candidates.
            InvalidConfig: the name is no id.
            UnknownCandidate: there is no bundle of this name.
        """
        folder = self.place(name)
        if not (folder / MANIFEST_NAME).is_file():
            raise UnknownCandidate(
                f"there is no bundle {name!r} among the candidates; GET /v1/models/{{name}}/candidates lists them"
            )
        return folder

    def version(self, name: str) -> tuple[int, int]:
        """What tells a candidate's manifest from another one in its place; (0, 0) if there is none."""
        return _version(self._folder / name / MANIFEST_NAME) if self._folder is not None else (0, 0)

    def _needed(self) -> Path:
        if self._folder is None:
            raise CanaryRefused(
                "this server has no folder of candidates: start it with --candidates DIR, and export the new bundle "
                "to a folder in it"
            )
        return self._folder


def _is_id(name: str) -> bool:
    try:
        check_id(name, "candidate")
    except BitneckError:
        return False
    return True


def _version(path: Path) -> tuple[int, int]:
    """Time of the last change, in nanoseconds, and size; a file with other contents has others. (0, 0) without one."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _candidate(path: Path) -> Candidate:
    manifest_path = path / MANIFEST_NAME
    try:
        if not manifest_path.is_file():
            return Candidate(name=path.name, problem=f"it has no {MANIFEST_NAME}")
        if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
            return Candidate(name=path.name, problem=f"its {MANIFEST_NAME} has more than {_MAX_MANIFEST_BYTES} bytes")
        data = manifest_path.read_bytes()
        manifest = Manifest.from_json(data, MANIFEST_NAME)
    except OSError as exc:
        return Candidate(name=path.name, problem=f"its {MANIFEST_NAME} cannot be read ({exc.strerror})")
    except BitneckError as exc:
        return Candidate(name=path.name, problem=str(exc)[:300])
    return Candidate(name=path.name, model=manifest.name, bundle_id=bundle_id_of(data), points=len(manifest.points))
