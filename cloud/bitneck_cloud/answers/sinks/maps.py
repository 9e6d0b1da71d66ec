"""Class maps in queued documents: as run lengths in the queue, and in the sink's own form when they go out."""

import base64
import io
import json
import logging

from PIL import Image

from bitneck.coding.class_map import MAX_CLASSES, decode_map
from bitneck.coding.colours import colours
from bitneck.errors import BitneckError

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
    document = json.loads(body)
    coded = document["map"]
    if form == "none":
        document["map"] = None
    elif form == "png" and coded["encoding"] == "runs":
        try:
            data = _png(base64.b64decode(coded["data"]), coded["height"], coded["width"])
        except (BitneckError, ValueError) as exc:
            _LOG.warning("answer %s: its class map cannot be read and is left out: %s", document.get("number"), exc)
            document["map"] = None
        else:
            document["map"] = coded | {"encoding": "png", "data": base64.b64encode(data).decode()}
    else:
        return body
    return json.dumps(document, separators=(",", ":")).encode()


def _png(coded: bytes, height: int, width: int) -> bytes:
    picture = Image.fromarray(decode_map(coded, height=height, width=width, number=MAX_CLASSES))
    picture.putpalette(colours().tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
