"""What a session is opened with: the files that its first frame needs, and the settings of its link."""

from bitneck.bundle import Bundle
from bitneck.coding.class_map import MAX_MAP_BYTES
from bitneck.manifest import Manifest
from bitneck.wire.messages import Answers
from bitneck_edge.bundles.supply import Progress, Supply, first_point
from bitneck_edge.link.link import LinkSettings
from bitneck_edge.link.remote import MAX_ANSWER_BYTES
from bitneck_edge.points import Wish
from bitneck_edge.settings import EdgeSettings

__all__ = ["fetch_first", "link_settings", "most_answer_bytes"]

_BESIDE_A_MAP = 1 << 16


async def fetch_first(supply: Supply, wish: Wish, *, known: bool, progress: Progress) -> None:
    """Fetch what the first frame needs: a point that is wanted by name, every point to choose from, or a small one.

    Args:
        supply: of the bundle.
        wish: what the session begins with.
        known: the wish is that of a session before, whose bundle may have had other points.
        progress: see `Supply.need`.

    Raises:
        UnknownPoint: the bundle has no such point.
        BitneckError: see `Supply.need`.
    """
    ladder = supply.bundle.manifest.ladder
    wanted = "" if known and wish.point not in ladder else wish.point
    if wish.auto:
        await supply.need([point.id for point in ladder], progress)
    elif wanted:
        await supply.need([ladder[wanted].id], progress)
    else:
        await supply.look(point.id for point in ladder)
        if not any(supply.ready(point.id) for point in ladder):
            await supply.need([first_point(supply.bundle.manifest)], progress)


def link_settings(settings: EdgeSettings, bundle: Bundle) -> LinkSettings:
    """The settings of the link of a session with a bundle."""
    return LinkSettings(
        access=settings.access,
        model=bundle.manifest.name,
        bundle_id=bundle.bundle_id,
        client=settings.client,
        connect_timeout_s=settings.connect_timeout_s,
        answer_timeout_s=settings.answer_timeout_s,
        retries=settings.retries if settings.spool is None else -1,
        patient=settings.spool is not None,
        references=settings.similar != "off" and bundle.has_conditional,
        key_every=settings.key_every,
        most_bytes=most_answer_bytes(bundle.manifest),
        answers=Answers(settings.answers),
        pack=settings.pack,
        pack_ms=settings.pack_ms,
        positions={point.id: place for place, point in enumerate(bundle.manifest.points, start=1)},
    )


def most_answer_bytes(manifest: Manifest) -> int:
    """Bytes of the largest answer that a server of this bundle has reason to send."""
    if manifest.task != "segmentation":
        return MAX_ANSWER_BYTES
    return max(MAX_ANSWER_BYTES, min(MAX_MAP_BYTES, 2 * manifest.input.pixels) + _BESIDE_A_MAP)
