"""The device itself: cache, bundle, precision, temperature."""

import shutil
import tempfile
from pathlib import Path

from bitneck.errors import BitneckError, UnknownPoint
from bitneck.manifest import FileEntry, Manifest, bundle_id_of
from bitneck.text import counted, sized
from bitneck.wire.messages import Answers
from bitneck_edge.bundles.notes import noted_bundle
from bitneck_edge.bundles.precision import choose_precision
from bitneck_edge.bundles.store import FileStore, default_cache_dir
from bitneck_edge.doctor.finding import Finding, skipped
from bitneck_edge.link.remote import Offer
from bitneck_edge.observe.temperature import temperatures_c
from bitneck_edge.settings import AUTO, EdgeSettings

__all__ = ["check_device", "check_temperature"]

_ROOM_BYTES = 100 * 1000 * 1000
_HOT_C = 85.0


def check_device(settings: EdgeSettings, offer: Offer | None) -> list[Finding]:
    """Check what is on this device.

    Args:
        settings: of the client.
        offer: of the server; None if it gave none. Then the bundle is the one that it had last.
    """
    try:
        store = FileStore(settings.cache_dir or default_cache_dir())
        found, free = _cache(store.root)
    except BitneckError as exc:
        return [Finding("cache", "failed", str(exc)), *skipped(("bundle", "precision"), "there is no cache")]
    try:
        bundle, manifest = _bundle(settings, store, offer, free)
    except (BitneckError, OSError, ValueError) as exc:
        advice = "`bitneck-edge points` lists all that the server has" if isinstance(exc, UnknownPoint) else ""
        bundle, manifest = Finding("bundle", "failed", str(exc), advice), None
    if manifest is None or found.state == "failed":
        return [found, bundle, *skipped(("precision",), "it is chosen with the bundle"), check_temperature()]
    return [found, bundle, _precision(settings, manifest, store.root), check_temperature()]


def _cache(root: Path) -> tuple[Finding, int]:
    """Whether the cache can be written, and the bytes that are free there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"\0")
        free = shutil.disk_usage(root).free
    except OSError as exc:
        advice = "give a folder that this user may write (--cache-dir)"
        return Finding("cache", "failed", f"{root} cannot be written ({exc.strerror})", advice), 0
    text = f"{root} can be written, {free / 1e9:.1f} GB are free"
    if free < _ROOM_BYTES:
        return Finding("cache", "warning", text, "make room: a bundle and a spool need it"), free
    return Finding("cache", "ok", text), free


def _bundle(
    settings: EdgeSettings, store: FileStore, offer: Offer | None, free: int
) -> tuple[Finding, Manifest | None]:
    """How much of the bundle is here, and whether it is the right one."""
    if offer is not None:
        bundle_id, data = bundle_id_of(offer.manifest_json), offer.manifest_json
        if bundle_id != offer.bundle_id:
            text = f"the server says {offer.bundle_id}, and its manifest hashes to {bundle_id}"
            return Finding("bundle", "failed", text, "do not use this server"), None
        if settings.bundle_id not in ("", bundle_id):
            text = f"the server has {bundle_id}, and {settings.bundle_id} is asked for (bundle_id)"
            return Finding("bundle", "failed", text, "try the new one, then pin it; or ask for the old one back"), None
    else:
        bundle_id = noted_bundle(store.root, settings.server, settings.model)
        known = store.known(bundle_id) if bundle_id else None
        if known is None:
            return Finding("bundle", "skipped", "the server gave none, and none of it is kept here"), None
        data = known
    manifest = Manifest.from_json(data, "the manifest")
    if settings.point not in ("", AUTO):
        manifest.ladder[settings.point]  # or it says which there are
    Answers(settings.answers).check(manifest.task)
    precision = choose_precision(settings.precision, manifest, store.root)
    files = manifest.files_for("edge", precision)
    here = {path for path, entry in files.items() if store.has(entry)}
    damaged = sum(_is_damaged(store, entry) for path, entry in files.items() if path not in here)
    missing = sum(entry.size for path, entry in files.items() if path not in here)
    points = [point.id for point in manifest.points if here.issuperset(manifest.files_of(point.id, precision))]
    text = (
        f"{manifest.name} {bundle_id[:19]}...: {len(points)} of {len(manifest.points)} operating points are here, "
        f"{sized(missing)} are missing"
    )
    if damaged:
        return Finding(
            "bundle", "warning", f"{text}, {counted(damaged, 'file is', 'files are')} damaged", "they are fetched again"
        ), manifest
    if missing > free:
        return Finding("bundle", "failed", text, "make room in the cache, or name another folder"), manifest
    if not points and offer is None:
        return Finding("bundle", "failed", text, "the device cannot begin without the server"), manifest
    if missing:
        return Finding("bundle", "ok", text, "`bitneck-edge fetch` brings them ahead of time"), manifest
    return Finding("bundle", "ok", text), manifest


def _is_damaged(store: FileStore, entry: FileEntry) -> bool:
    """Whether a file that is not whole has its final name all the same."""
    return store.path(entry).exists()


def _precision(settings: EdgeSettings, manifest: Manifest, cache: Path) -> Finding:
    try:
        chosen = choose_precision(settings.precision, manifest, cache)
    except BitneckError as exc:
        return Finding("precision", "failed", str(exc))
    if settings.precision != "auto":
        return Finding("precision", "ok", f"{chosen}, as asked for")
    why = "measured faster here" if chosen == "int8" else "int8 is not faster here, or the bundle has none"
    return Finding("precision", "ok", f"{chosen}: {why}")


def check_temperature() -> Finding:
    """How warm the device is."""
    found = temperatures_c()
    if not found:
        return Finding("temperature", "skipped", "this device does not tell it")
    text = ", ".join(f"{name} {value:.0f} C" for name, value in sorted(found.items())[:6])
    if max(found.values()) >= _HOT_C:
        return Finding("temperature", "warning", text, "it slows down when hot: cool it, or send fewer frames (--fps)")
    return Finding("temperature", "ok", text)
