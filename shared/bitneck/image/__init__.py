"""Photographs: read within limits, and made into the backbone's input."""

from bitneck.image.exact import MAX_PIXELS, RESAMPLING, crop, normalize, preprocess, resized_size
from bitneck.image.read import (
    MAX_ASPECT,
    MAX_SCANS,
    PHOTO_FORMATS,
    PHOTO_SUFFIXES,
    find_photos,
    load_photo,
    opened_photo,
    opened_reduced,
)
from bitneck.image.sharing import MAX_DECODED_BYTES
from bitneck.image.view import to_input, view

__all__ = [
    "MAX_ASPECT",
    "MAX_DECODED_BYTES",
    "MAX_PIXELS",
    "MAX_SCANS",
    "PHOTO_FORMATS",
    "PHOTO_SUFFIXES",
    "RESAMPLING",
    "crop",
    "find_photos",
    "load_photo",
    "normalize",
    "opened_photo",
    "opened_reduced",
    "preprocess",
    "resized_size",
    "to_input",
    "view",
]
