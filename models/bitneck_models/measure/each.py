"""What every photograph gave at one operating point, kept so that curves over the same photographs compare in pairs.

Dimensions: n photographs.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

__all__ = ["EachPhoto", "photos_crc32c"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EachPhoto:
    """One operating point, photograph by photograph, in the order of the evaluation.

    Attributes:
        payload_bytes: coded bytes, (n,) int64.
        right: the answer is the true one, (n,) bool.
        agrees: the answer is the uncompressed network's, (n,) bool.
    """

    payload_bytes: NDArray[np.int64]
    right: NDArray[np.bool_]
    agrees: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not self.payload_bytes.shape == self.right.shape == self.agrees.shape:
            raise ValueError("each photograph has bytes, and is right or not, and agrees or not")

    @classmethod
    def of(cls, rows: Sequence[tuple[int, bool, bool]]) -> Self:
        """From (payload bytes, right, agrees) of each photograph."""
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return cls(payload_bytes=columns[:, 0], right=columns[:, 1].astype(bool), agrees=columns[:, 2].astype(bool))

    def to_dict(self) -> dict[str, str]:
        """For JSON: little-endian uint32, or a bit for each photograph, through zlib and base64."""
        return {
            "payload_bytes": _packed(self.payload_bytes.astype("<u4").tobytes()),
            "right": _packed(np.packbits(self.right).tobytes()),
            "agrees": _packed(np.packbits(self.agrees).tobytes()),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, str], count: int) -> Self:
        """From `to_dict` of n photographs.

        Args:
            fields: the document's.
            count: n.

        Raises:
            KeyError, ValueError: the fields are not those of n photographs.
        """
        sizes = np.frombuffer(_unpacked(fields["payload_bytes"]), "<u4")
        bits = [np.frombuffer(_unpacked(fields[key]), np.uint8) for key in ("right", "agrees")]
        if len(sizes) != count or any(len(found) != -(-count // 8) for found in bits):
            raise ValueError(f"`each` is not of {count} photographs; measure it again")
        right, agrees = (np.unpackbits(found, count=count).astype(bool) for found in bits)
        return cls(payload_bytes=sizes.astype(np.int64), right=right, agrees=agrees)


def photos_crc32c(photos: Sequence[Path]) -> str:
    """Checksum of the photographs' names in order: documents with the same one compare photograph by photograph."""
    return f"{google_crc32c.value(chr(10).join(photo.name for photo in photos).encode()):08x}"


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except zlib.error as exc:
        raise ValueError(f"`each` is damaged ({exc}); measure it again") from exc
