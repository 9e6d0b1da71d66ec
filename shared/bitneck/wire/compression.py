"""Files and manifests, compressed on their way where that pays. Pure.

gRPC could compress messages by itself, but then a small message of a stranger may become a gigantic one before anybody
has looked at it. Here the size comes with the data, is checked first, and bounds the memory.
"""

import zlib

from bitneck.errors import ProtocolError

__all__ = ["deflated", "inflated"]

_LEVEL = 6
_WORTH = 0.97
"""Compressed data is sent if it is smaller than this share."""


def deflated(data: bytes) -> tuple[bytes, int]:
    """Compress data if that pays.

    Returns:
        What to send, and the data's size if it was compressed, else 0.
    """
    compressed = zlib.compress(data, _LEVEL)
    return (compressed, len(data)) if len(compressed) < _WORTH * len(data) else (data, 0)


def inflated(data: bytes, size: int, most: int) -> bytes:
    """The opposite of `deflated`.

    Args:
        data: what was sent.
        size: as it came with the data; 0 for data that was not compressed.
        most: bytes that are taken, at most.

    Raises:
        ProtocolError: it is larger, or no zlib stream of this size.
    """
    if max(size, len(data)) > most:
        raise ProtocolError(f"{max(size, len(data))} bytes came, at most {most} are taken")
    if not size:
        return data
    stream = zlib.decompressobj()
    try:
        result = stream.decompress(data, size + 1)
    except zlib.error as exc:
        raise ProtocolError(f"compressed data that cannot be read ({exc})") from exc
    if len(result) != size or not stream.eof or stream.unused_data:
        raise ProtocolError(f"compressed data of another size than the {size} bytes that were announced")
    return result
