"""Fetch the edge's half of the bundle that the server has."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable

from bitneck.backoff import Backoff
from bitneck.bundle import Bundle
from bitneck.errors import BitneckError, BundleMismatch, InvalidConfig, Unavailable, Unreachable
from bitneck_edge.bundles.cache import cached_bundle, default_cache_dir, forget_old, recall, remember
from bitneck_edge.link.remote import MAX_MANIFEST_BYTES, fetch_file, fetch_manifest, stub_of
from bitneck_edge.settings import EdgeSettings

__all__ = ["fetch_bundle"]

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.6, 5.0


async def fetch_bundle(
    settings: EdgeSettings,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    *,
    offline: bool = False,
) -> Bundle:
    """The edge's half of the server's bundle, from the cache or from the server.

    Args:
        settings: server, cache and limits.
        progress: called with (bytes fetched, bytes to fetch).
        offline: if no server answers the first attempt, take the bundle that it had last, if that is in the cache.

    Raises:
        Unavailable: no server after the retries.
        BundleMismatch: the server has another bundle than `settings.bundle_id`.
        BundleCorrupt: a file arrived damaged.
        InvalidConfig: the cache cannot be written.
    """
    access = settings.access
    cache_dir = settings.cache_dir or default_cache_dir()
    async with access.channel(MAX_MANIFEST_BYTES) as channel:
        stub = stub_of(channel)
        backoff = Backoff(first_s=_FIRST_PAUSE_S, most_s=_MOST_PAUSE_S, retries=settings.retries)
        while True:
            try:
                await access.connected(channel, settings.connect_timeout_s)
                offer = await fetch_manifest(stub, settings.model, access, settings.answer_timeout_s)
                break
            except BitneckError as exc:
                if isinstance(exc, Unreachable) or exc.grpc_status not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    raise
                kept = None
                if offline:
                    kept = await asyncio.to_thread(
                        recall, cache_dir, settings.server, settings.model, pinned=settings.bundle_id
                    )
                if kept is not None and settings.bundle_id in ("", kept.bundle_id):
                    _LOG.warning(
                        "%s; starting with the bundle that it had last, %s, and trying again", exc, kept.bundle_id
                    )
                    return kept
                pause_s = backoff.failed(random.random())  # noqa: S311  no secret
                if pause_s is None:
                    raise Unavailable(f"{exc}; gave up after {backoff.failures} attempts") from exc
                await asyncio.sleep(pause_s)
        if settings.bundle_id and offer.bundle_id != settings.bundle_id:
            raise BundleMismatch(f"{settings.server} serves bundle {offer.bundle_id}, expected {settings.bundle_id}")

        def fetch(path: str) -> AsyncGenerator[bytes]:
            return fetch_file(stub, offer.model, offer.bundle_id, path, access, settings.answer_timeout_s)

        bundle = await cached_bundle(
            cache_dir, offer.manifest_json, offer.bundle_id, fetch, progress, trusted=bool(settings.bundle_id)
        )
        try:
            remember(cache_dir, settings.server, settings.model, offer.bundle_id)
        except InvalidConfig as exc:  # only a start without the server needs the note
            _LOG.warning("%s", exc)
        await asyncio.to_thread(forget_old, cache_dir, time.time())
        return bundle
