"""The document of an answer, version 1. ``docs/answer.schema.json`` describes it, ``docs/answers.md`` explains it.

Answered --Published (number, server)--> answer_document --> JSON text, one line of ASCII
"""

import base64
import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson

from bitneck.coding.coarse_map import coarse_size
from bitneck.ids import MAX_CLIENT_CHARACTERS
from bitneck.text import clean_text
from bitneck.wire.messages import Classification, CodedMap, Output
from bitneck_cloud.answers.answered import Answered
from bitneck_cloud.answers.map_picture import png_of_coded

__all__ = ["VERSION", "MapForm", "Published", "answer_document", "document_of", "json_of", "read_json"]

VERSION = 1
"""Of the document. A new key keeps it; a key that goes, or means something else, does not."""

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
"""For documents with other characters than those of ASCII, which it escapes."""
_LAST_US = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 1_000_000
_LARGE_MAP_BYTES = 1 << 16
_BESIDE_TEXTS = 1500
"""Bytes that an answer takes in memory beside its map and its texts: the values above, with five labels."""


class MapForm(StrEnum):
    """How a class map goes into the document."""

    NONE = "none"
    """Not at all: ``map`` is null."""
    RUNS = "runs"
    """As on the wire: run lengths down the columns, as raw LZMA2; see `bitneck.coding.class_map`."""
    PNG = "png"
    """An indexed PNG: a pixel's value is its class."""


class Published:
    """An answer with its number, and its document in each form that someone asked for.

    Any thread may ask for a text. Two that ask at once both make it, and one of the equal texts is kept.

    Attributes:
        number: of this server, counting up in the order of answering.
        server: name of the server.
        answered: the answer.
        accounted: bytes that its keeper has counted for it.
    """

    __slots__ = ("_client", "_texts", "accounted", "answered", "number", "server")

    def __init__(self, number: int, server: str, answered: Answered) -> None:
        self.number = number
        self.server = server
        self.answered = answered
        self.accounted = 0
        self._client: str | None = None
        self._texts: dict[MapForm, str] = {}

    @property
    def client(self) -> str:
        """The client's name, cleaned."""
        if self._client is None:
            self._client = _clean(self.answered.origin.client)
        return self._client

    @property
    def has_map(self) -> bool:
        """Whether there is a class map."""
        return isinstance(self.answered.output, CodedMap)

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        output = self.answered.output
        coded = len(output.map) if isinstance(output, CodedMap) else 0
        return _BESIDE_TEXTS + coded + sum(map(len, list(self._texts.values())))

    def made(self, form: MapForm) -> str | None:
        """The document as JSON, if it was made before."""
        return self._texts.get(form if self.has_map else MapForm.NONE)

    def keep_bare(self, text: str) -> None:
        """Keep the document without a map, which was made elsewhere, as JSON."""
        self._texts[MapForm.NONE] = text

    def takes_long(self, form: MapForm) -> bool:
        """Whether `text` should have a thread: for a picture, and for a large map."""
        output = self.answered.output
        if form is MapForm.NONE or not isinstance(output, CodedMap):
            return False
        return form is MapForm.PNG or len(output.map) > _LARGE_MAP_BYTES

    def text(self, form: MapForm) -> str:
        """The document as JSON."""
        made = self.made(form)
        if made is None:
            form = form if self.has_map else MapForm.NONE
            made = self._texts[form] = json_of(answer_document(self, form))
        return made


def json_of(document: Mapping[str, Any]) -> str:
    """A document as one line of ASCII. Its numbers are finite: the engine answers no others."""
    try:
        written = orjson.dumps(document)
    except orjson.JSONEncodeError:  # half a surrogate pair, which bundles and clients have no more once cleaned
        return _ENCODER.encode(document)
    return written.decode() if written.isascii() else _ENCODER.encode(document)


def document_of(text: bytes) -> dict[str, Any]:
    """What `json_of` has written."""
    document: dict[str, Any] = read_json(text)
    return document


def read_json(text: bytes) -> Any:
    """JSON, also with half a surrogate pair, which orjson refuses."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def answer_document(published: Published, form: MapForm) -> dict[str, Any]:
    """The document of an answer.

    Args:
        published: the answer.
        form: of its class map.
    """
    answered = published.answered
    origin = answered.origin
    return {
        "version": VERSION,
        "server": published.server,
        "number": published.number,
        "client": published.client,
        "model": answered.model,
        "session": origin.session,
        "spool": _clean(origin.spool) or None,
        "seq": origin.seq,
        "captured": _time(origin.captured_us),
        "received": _time(origin.received_us),
        "bundle": answered.bundle,
        "point": answered.point,
        **_found(answered.output),
        "map": _map(answered.output, form),
        "payload_bytes": origin.payload_bytes,
        "link_bytes": origin.link_bytes,
        "ms": {
            "queued": answered.queued_us / 1e3,
            "decode": answered.decode_us / 1e3,
            "compute": answered.compute_us / 1e3,
        },
    }


@functools.lru_cache(maxsize=1024)
def _clean(text: str) -> str:
    return clean_text(text, MAX_CLIENT_CHARACTERS)


def _time(unix_us: int) -> str | None:
    """A moment as RFC 3339 in UTC; None if it is unknown, or beyond what can be written so."""
    if not 0 < unix_us <= _LAST_US:
        return None
    seconds, micros = divmod(unix_us, 1_000_000)
    return f"{_second(seconds)}.{micros:06d}Z"


@functools.lru_cache(maxsize=64)
def _second(unix_s: int) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%S}"


def _found(output: Output) -> dict[str, list[dict[str, Any]]]:
    if isinstance(output, Classification):
        return {
            "labels": [
                {"index": each.index, "name": each.name, "score": round(each.score, 6)} for each in output.labels
            ]
        }
    return {
        "shares": [{"index": each.index, "name": each.name, "share": round(each.share, 6)} for each in output.classes]
    }


def _map(output: Output, form: MapForm) -> dict[str, Any] | None:
    if form is MapForm.NONE or not isinstance(output, CodedMap):
        return None
    height, width = coarse_size(output.height, output.step), coarse_size(output.width, output.step)
    data = output.map if form is MapForm.RUNS else png_of_coded(output.map, height, width)
    return {"height": height, "width": width, "encoding": form.value, "data": base64.b64encode(data).decode()}
