"""Documents of answers, as the server makes them."""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.class_map import encode_map

__all__ = ["answer", "answers", "coded_map"]


def answer(number: int, **other: Any) -> dict[str, Any]:
    """The document of one answer to a classification; frame `number` of its session. No file of it is ever old.

    Args:
        number: of the answer.
        **other: values of keys that differ.
    """
    return {
        "version": 1,
        "server": "cloud-1",
        "number": number,
        "client": "cam-1",
        "model": "tiny",
        "session": "s-1",
        "spool": None,
        "seq": number,
        "captured": None,
        "received": f"2099-01-01T00:00:{number % 60:02d}.000000Z",
        "bundle": "sha256:" + "0" * 64,
        "point": "s1-r1",
        "labels": [{"index": 3, "name": "class 3", "score": 0.75}, {"index": 1, "name": "class 1", "score": 0.25}],
        "map": None,
        "payload_bytes": 28,
        "link_bytes": 210,
        "ms": {"queued": 0.1, "decode": 0.2, "compute": 3.0},
    } | other


def answers(first: int, last: int, **other: Any) -> list[dict[str, Any]]:
    """Documents with these numbers; see `answer`."""
    return [answer(number, **other) for number in range(first, last + 1)]


def coded_map(classes: NDArray[np.uint8]) -> dict[str, Any]:
    """A class map (H, W) uint8 as the key ``map`` has it."""
    height, width = classes.shape
    data = base64.b64encode(encode_map(classes)).decode()
    return {"height": height, "width": width, "encoding": "runs", "data": data}
