"""Answers with their numbers, as the engine's passes give them, and subscriptions to them."""

from typing import Any

from bitneck.wire.messages import Classification, ClassShare, CodedMap, Label
from bitneck_cloud.answers.answered import Answered, Origin
from bitneck_cloud.answers.document import Published
from bitneck_cloud.answers.hub import Hub
from bitneck_cloud.answers.subscriptions import Subscriptions
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.observe.metrics import Metrics

__all__ = ["EPOCH", "GROUPS", "LABELS", "answered", "everything", "published", "subscriptions"]

EPOCH = "0123abcd"
GROUPS = Groups({"letters": ("[a-z]",), "digits": ("[0-9]",)})
LABELS = {"tiny": ("cat", "dog", "7"), "scene": ("sky", "road")}


def answered(seq: int = 1, *, client: str = "c", model: str = "tiny", map_bytes: int = 0) -> Answered:
    """The answer to a frame: two labels, or a class map of so many bytes."""
    output: Any = Classification((Label(1, "dog", 0.75), Label(0, "cat", 0.25)))
    if map_bytes:
        output = CodedMap(height=4, width=4, map=bytes(map_bytes), classes=(ClassShare(1, "road", 1.0),))
    origin = Origin(client=client, session="s-1", seq=seq, received_us=1_700_000_000_000_000)
    return Answered(origin=origin, model=model, bundle="sha256:0", point="p", output=output, queued_us=1, decode_us=2,
                    compute_us=3)  # fmt: skip


def published(number: int, **values: Any) -> Published:
    """It with its number; see `answered`."""
    return Published(number, "server", answered(number, **values))


def subscriptions(most: int = 100, most_bytes: int = 1 << 30) -> Subscriptions:
    """Subscriptions to a buffer within two bounds."""
    hub = Hub(EPOCH, most=most, most_bytes=most_bytes)
    return Subscriptions(hub, most=10, metrics=Metrics(), heartbeat_s=60.0, stall_s=0.0, groups=GROUPS)


def everything(_: Published) -> bool:
    """Wants each answer."""
    return True
