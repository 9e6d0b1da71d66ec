"""Which bundle each server had last: for a start while it cannot be reached, and to know what is still needed.

<cache>/servers/<digest of the server's address and the model>    id of the bundle
"""

import hashlib
from pathlib import Path

from bitneck.errors import InvalidConfig
from bitneck_edge.bundles.store import read_regular, write_new

__all__ = ["noted_bundle", "noted_bundles", "remember"]

_MAX_NOTE_BYTES = 200


def remember(cache_dir: Path, server: str, model: str, bundle_id: str) -> None:
    """Note which bundle a server has.

    Args:
        cache_dir: root of the cache.
        server: HOST:PORT.
        model: as the settings name it; empty for the server's only one.
        bundle_id: of its bundle.

    Raises:
        InvalidConfig: the cache cannot be written.
    """
    note = _note(cache_dir, server, model)
    try:
        if note.is_symlink() or note.parent.is_symlink():
            raise InvalidConfig(f"{note} in the cache is a link; remove it, or choose another folder (--cache-dir)")
        if _read(note) == bundle_id:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        write_new(note, bundle_id.encode())
    except (OSError, ValueError) as exc:
        raise InvalidConfig(f"the cache {cache_dir} cannot be written ({exc}); choose another folder") from exc


def noted_bundle(cache_dir: Path, server: str, model: str) -> str:
    """The id of the bundle that a server had last, as the note says; empty if there is none.

    Args:
        cache_dir: root of the cache.
        server: HOST:PORT.
        model: as for `remember`.
    """
    note = _note(cache_dir, server, model)
    return "" if note.parent.is_symlink() else _read(note)


def noted_bundles(cache_dir: Path) -> set[str]:
    """The ids of the bundles that any server had last."""
    try:
        return {_read(note) for note in (cache_dir / "servers").iterdir()}
    except OSError:
        return set()


def _note(cache_dir: Path, server: str, model: str) -> Path:
    return cache_dir / "servers" / hashlib.sha256(f"{server}\n{model}".encode()).hexdigest()[:32]


def _read(note: Path) -> str:
    """What a note says; empty if there is none."""
    return read_regular(note, _MAX_NOTE_BYTES).decode(errors="replace")
