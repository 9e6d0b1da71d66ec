"""The bundle that the server has: its manifest, and a supply of its files."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bitneck.backoff import Backoff
from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleCorrupt, BundleMismatch, InvalidConfig, Unavailable, Unreachable
from bitneck.manifest import Manifest, Precision, bundle_id_of
from bitneck.text import clean_text
from bitneck_edge.bundles.notes import noted_bundle, noted_bundles, remember
from bitneck_edge.bundles.precision import choose_precision
from bitneck_edge.bundles.store import FileStore, default_cache_dir
from bitneck_edge.bundles.supply import Progress, Supply
from bitneck_edge.link.remote import MAX_MANIFEST_BYTES, Access, Offer, fetch_file, fetch_manifest, stub_of
from bitneck_edge.settings import EdgeSettings

if TYPE_CHECKING:
    from bitneck.v2 import inference_pb2_grpc as pb_grpc

__all__ = ["fetch_bundle", "manifest_of", "open_supply", "take_bundle"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.6, 5.0
_MOST_TOLD = 3
"""Bundles of other addresses that a message names."""
MAX_BUNDLE_BYTES = 1 << 30
"""What the edge's files of a bundle may have together."""


class ServerSource:
    """The files of a server's bundle. It connects when a file is wanted.

    Args:
        access: to the server.
        model: of the offer.
        bundle_id: likewise.
        pause_s: longest wait for one chunk.
    """

    def __init__(self, access: Access, model: str, bundle_id: str, pause_s: float) -> None:
        self._access = access
        self._model, self._bundle_id, self._pause_s = model, bundle_id, pause_s
        self._stack = contextlib.AsyncExitStack()
        self._stub: pb_grpc.SplitInferenceAsyncStub | None = None

    async def fetch(self, path: str, offset: int, length: int = 0) -> AsyncGenerator[bytes]:
        """A file in chunks; see `bitneck_edge.link.remote.fetch_file`."""
        if self._stub is None:
            self._stub = stub_of(await self._stack.enter_async_context(self._access.channel(MAX_MANIFEST_BYTES)))
        chunks = fetch_file(
            self._stub, self._model, self._bundle_id, path, self._access, self._pause_s, offset=offset, length=length
        )
        async with contextlib.aclosing(chunks):
            async for data in chunks:
                yield data

    async def close(self) -> None:
        """Close the connection; another file opens it again."""
        self._stub = None
        await self._stack.aclose()


async def open_supply(settings: EdgeSettings, *, offline: bool = False, retries: int | None = None) -> Supply:
    """The server's bundle: its manifest now, its files as they are needed.

    Args:
        settings: server, cache and limits.
        offline: if no server answers the first attempt, take the bundle that it had last, or `settings.bundle_id`, if
            its manifest is here.
        retries: attempts after the first one to ask for the manifest; None for those of the settings.

    Raises:
        Unavailable: no server after the retries.
        BundleMismatch: the server has another bundle than `settings.bundle_id`, or one that its id does not fit.
        BundleCorrupt: the manifest cannot be read, or its files are too large.
        InvalidConfig: the cache cannot be written.
    """
    store = FileStore(settings.cache_dir or default_cache_dir())
    offer = await _offer(settings, store, offline, settings.retries if retries is None else retries)
    bundle = await store.run(store.bundle, offer.manifest_json)
    bundle.precision = await store.run(choose_precision, settings.precision, bundle.manifest, store.root)
    files = bundle.manifest.files_for("edge", bundle.precision)
    if (size := sum(entry.size for entry in files.values())) > MAX_BUNDLE_BYTES:
        raise BundleCorrupt(f"the server's bundle has {size} bytes for a device, at most {MAX_BUNDLE_BYTES} are taken")
    try:
        await store.run(remember, store.root, settings.server, settings.model, bundle.bundle_id)
    except InvalidConfig as exc:  # only a start without the server needs the note
        _LOG.warning("%s", exc)
    await store.run(lambda: store.forget_old(noted_bundles(store.root), time.time()))
    return Supply(
        store,
        bundle,
        ServerSource(settings.access, offer.model, offer.bundle_id, settings.answer_timeout_s),
        trusted=bool(settings.bundle_id),
        retries=settings.retries,
    )


async def fetch_bundle(
    settings: EdgeSettings,
    progress: Progress = lambda _done, _all: None,
    *,
    points: Iterable[str] | None = None,
) -> Bundle:
    """The edge's half of the server's bundle, from the cache or from the server.

    Args:
        settings: server, cache and limits.
        progress: called with (bytes that have come, bytes that are needed).
        points: fetch what these operating points need; None for all.

    Raises:
        UnknownPoint: the bundle has no such point.
        BitneckError: see `open_supply` and `Supply.need`.
    """
    supply = await open_supply(settings)
    try:
        ladder = supply.bundle.manifest.ladder
        await supply.need([ladder[name].id for name in points] if points else [p.id for p in ladder], progress)
    finally:
        await supply.close()
    return supply.bundle


async def manifest_of(settings: EdgeSettings) -> tuple[str, Manifest]:
    """The id and the manifest of the server's bundle; no other file is fetched.

    Raises:
        BitneckError: see `open_supply`.
    """
    supply = await open_supply(settings)
    await supply.close()
    return supply.bundle.bundle_id, supply.bundle.manifest


def take_bundle(folder: Path, settings: EdgeSettings, points: Iterable[str] | None = None) -> Bundle:
    """Take the files of a bundle from a disk, so that a client of `settings.server` need not fetch them.

    Args:
        folder: of a bundle.
        settings: server, cache and precision.
        points: take what these operating points need; None for all.

    Raises:
        UnknownPoint: the bundle has no such point.
        BundleCorrupt: a file is missing or damaged.
        InvalidConfig: no bundle there, or the cache cannot be written.
    """
    store = FileStore(settings.cache_dir or default_cache_dir())
    source = Bundle.open(folder, side="edge")
    bundle = store.bundle(source.manifest_json)
    manifest = bundle.manifest
    bundle.precision = choose_precision(settings.precision, manifest, store.root)
    chosen = [manifest.ladder[name].id for name in points] if points else [p.id for p in manifest.ladder]
    for name in dict.fromkeys(name for point in chosen for name in manifest.files_of(point, bundle.precision)):
        store.add(source.path(name), manifest.files[name])
    remember(store.root, settings.server, settings.model, bundle.bundle_id)
    return bundle


async def _offer(settings: EdgeSettings, store: FileStore, offline: bool, retries: int) -> Offer:
    """What the server offers, checked; or what it had last."""
    access = settings.access
    async with access.channel(MAX_MANIFEST_BYTES) as channel:
        stub = stub_of(channel)
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=retries)
        while True:
            try:
                patient = settings.spool is not None
                await access.connected(channel, settings.connect_timeout_s, patient=patient)
                offer = await fetch_manifest(stub, settings.model, access, settings.answer_timeout_s, settings.client)
                break
            except BitneckError as exc:
                if not exc.transient and not (offline and settings.spool is not None and isinstance(exc, Unreachable)):
                    raise
                kept = await store.run(_last, settings, store) if offline else None
                if kept is not None:
                    _LOG.warning(
                        "%s; starting with the bundle %s from the cache, and trying again", exc, kept.bundle_id
                    )
                    return kept
                if not exc.transient:
                    raise
                pause_s = backoff.failed(random.random())  # noqa: S311  no secret
                if pause_s is None:
                    told = offline and isinstance(exc, Unavailable)
                    others = await store.run(_others, settings, store) if told else ""
                    if not retries and not others:
                        raise
                    after = f"; gave up after {backoff.failures} attempts" if retries else ""
                    raise Unavailable(f"{exc}{after}{others}") from exc
                await asyncio.sleep(pause_s)
    if settings.bundle_id and offer.bundle_id != settings.bundle_id:
        raise BundleMismatch(f"{settings.server} serves bundle {offer.bundle_id}, expected {settings.bundle_id}")
    if (real := bundle_id_of(offer.manifest_json)) != offer.bundle_id:
        raise BundleMismatch(
            f"the server says its bundle is {clean_text(offer.bundle_id, 80)}, its manifest hashes to {real}"
        )
    return offer


def _last(settings: EdgeSettings, store: FileStore) -> Offer | None:
    """The bundle that is asked for, or that the server had last, if anything of it can be used."""
    return _kept(settings, store, settings.bundle_id or noted_bundle(store.root, settings.server, settings.model))


def _kept(settings: EdgeSettings, store: FileStore, bundle_id: str) -> Offer | None:
    """A bundle of the cache, if anything of it can be used."""
    try:
        manifest_json = store.known(bundle_id)
        if manifest_json is None:
            return None
        manifest = Manifest.from_json(manifest_json, "the kept manifest")
        if not any(
            all(store.has(manifest.files[path]) for path in manifest.files_of(point.id, precision))
            for point in manifest.points
            for precision in _PRECISIONS
        ):
            return None
    except (OSError, ValueError, BitneckError):
        return None
    return Offer(model=settings.model or manifest.name, bundle_id=bundle_id, manifest_json=manifest_json)


def _others(settings: EdgeSettings, store: FileStore) -> str:
    """What to say about bundles that other addresses had last; empty if there are none, or one is asked for."""
    if settings.bundle_id:
        return ""
    noted = sorted(noted_bundles(store.root))
    found = [offer for bundle_id in noted if (offer := _kept(settings, store, bundle_id)) is not None]
    if not found:
        return ""
    names = ", ".join(f"{clean_text(offer.model, 80)} {offer.bundle_id}" for offer in found[:_MOST_TOLD])
    return (
        f"; the cache has nothing of this address, but bundles of others: {names}. If the server has one of them, "
        "start with it: --bundle-id sha256:..."
    )


_PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
