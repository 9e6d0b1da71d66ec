"""Class maps in queued documents: as run lengths in the queue, and in the sink's own form when they go out."""

import base64
import logging

from bitneck.errors import BitneckError
from bitneck_cloud.answers.document import document_of, json_of
from bitneck_cloud.answers.map_picture import png_of_coded

__all__ = ["with_map"]

_LOG = logging.getLogger(__name__)


def with_map(body: bytes, form: str) -> bytes:
    """A document with its map in another form.

    Args:
        body: JSON without spaces. Its map is null, or has run lengths as `bitneck.coding.class_map` codes them.
        form: ``none``, ``runs``, or ``png``: an indexed picture in which a pixel's value is its class.
    """
    # Inside of a text, a quotation mark has a backslash before it: this is the key, and nothing else.
    if b'"map":{' not in body:
        return body
    document = document_of(body)
    coded = document["map"]
    if form == "none":
        document["map"] = None
    elif form == "png" and coded["encoding"] == "runs":
        try:
            data = png_of_coded(base64.b64decode(coded["data"]), coded["height"], coded["width"])
        except (BitneckError, ValueError) as exc:
            _LOG.warning("answer %s: its class map cannot be read and is left out: %s", document.get("number"), exc)
            document["map"] = None
        else:
            document["map"] = coded | {"encoding": "png", "data": base64.b64encode(data).decode()}
    else:
        return body
    return json_of(document).encode()
