"""Symbols to payload bytes and back, given the symbols of a reference frame.

    s, reference (Cr, h, w) int32  --encode-->  payload (bytes)
    payload, reference             --decode-->  s

The payload begins with the motion; all motions have the same probability. Then the symbols follow, channel by channel.
Each is coded with the table that `ConditionalModel.rows` has for its channel and for the reference's symbol at the same
place. As in `FactorizedCodec`, shapes and tables never come from the payload, and the frame's CRC detects damage.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import constriction
import google_crc32c
import numpy as np
from numpy.typing import NDArray

from bitneck.coding.conditional_model import ConditionalModel
from bitneck.coding.factorized_model import TOTAL, TOTAL_BITS, FactorizedModel
from bitneck.coding.range_coder import (
    FAMILY,
    check_length,
    check_padding,
    range_coded,
    range_decoder,
)
from bitneck.errors import InvalidConfig, MalformedFrame

__all__ = ["ConditionalCodec", "Reference", "symbols_crc32c"]

_CHUNK_ENTRIES = 1 << 18
"""Number of probabilities that the range coder gets at once: 1 MiB."""


def symbols_crc32c(s: NDArray[np.integer]) -> int:
    """CRC-32C of symbols as little-endian int32 in C order. Edge and cloud identify a frame's symbols by it."""
    crc: int = google_crc32c.value(s.astype("<i4").tobytes())
    return crc


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The symbols of an answered frame, kept to code others against.

    Attributes:
        point: its operating point.
        symbols: (Cr, h, w), in the smallest integer type that fits the point's tables; see `ConditionalCodec.keep`.
        crc32c: `symbols_crc32c` of them.
    """

    point: str
    symbols: NDArray[np.integer]
    crc32c: int


class ConditionalCodec:
    """Codes the symbols of one operating point, given a reference's.

    Safe to share between threads. The tables of a motion are made when they are first needed.

    Args:
        point: id of the operating point.
        tables: its factorized model.
        conditional: its conditional model.
        latent_shape: (Cr, h, w).

    Raises:
        InvalidConfig: they do not match.
    """

    def __init__(
        self,
        point: str,
        tables: FactorizedModel,
        conditional: ConditionalModel,
        latent_shape: tuple[int, int, int],
    ) -> None:
        if len(latent_shape) != 3 or min(latent_shape) < 1 or latent_shape[0] != tables.channels:
            raise InvalidConfig(f"latent shape {latent_shape} does not match tables of {tables.channels} channels")
        conditional.check_fits(tables)
        self.point = point
        self.latent_shape = latent_shape
        self.motions = conditional.motions
        self._tables, self._conditional = tables, conditional
        sizes = np.array([len(row) for row in tables.counts], dtype=np.int32)
        positions = latent_shape[1] * latent_shape[2]
        coded = np.flatnonzero(sizes > 1)  # a channel with one symbol needs no bits
        self._coded = coded
        self._lo, self._sizes = tables.lo[:, None], sizes[:, None]
        self._widths = np.repeat(sizes[coded], positions)
        self._first_rows = np.repeat((np.cumsum(sizes, dtype=np.int32) - sizes)[coded], positions)
        self._chunk = max(1, _CHUNK_ENTRIES // int(sizes.max()))
        self._motion = constriction.stream.model.Uniform(self.motions) if self.motions > 1 else None
        self._rows: dict[int, NDArray[np.uint16]] = {}
        self._lock = threading.Lock()
        small = min(tables.lo.min(), -tables.hi.max()) >= -np.iinfo(np.int8).max
        self._kept_type = np.int8 if small else np.int16
        self.kept_bytes = sizes.size * positions * np.dtype(self._kept_type).itemsize
        """Of the symbols in a `Reference`."""
        count = len(coded) * positions
        self.max_payload_bytes = -(-(count * TOTAL_BITS + 4) * 101 // 800) + 4
        """An upper bound: no symbol costs more than `TOTAL_BITS`."""

    def keep(self, s: NDArray[np.int32]) -> Reference:
        """Symbols as a reference for later frames.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
        """
        return Reference(self.point, s.astype(self._kept_type), symbols_crc32c(s))

    def encode(self, s: NDArray[np.int32], reference: Reference) -> bytes:
        """The payload of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
            reference: of this operating point.

        Raises:
            InvalidConfig: wrong shape or type, a symbol outside its table, or a reference of another operating point.
        """
        if s.shape != self.latent_shape or s.dtype != np.int32:
            raise InvalidConfig(f"symbols are {s.shape} {s.dtype}, expected {self.latent_shape} int32")
        index, rows = self._indices(s), self._row_indices(reference)
        if index is None:
            raise InvalidConfig("a symbol is outside its table; quantize() clips to the tables")
        if rows is None:
            raise InvalidConfig(f"the reference is none of {self.point}")
        bits = [self._bits(motion, index, rows) for motion in range(self.motions)]
        return self._write(int(np.argmin(bits)), index, rows)

    def ideal_bits(self, s: NDArray[np.int32], reference: Reference) -> float:
        """Ideal code length of one latent's symbols, and of the best motion for them.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
            reference: of this operating point.

        Raises:
            InvalidConfig: see `encode`.
        """
        index, rows = self._indices(s), self._row_indices(reference)
        if index is None or rows is None:
            raise InvalidConfig(f"symbols or a reference that are none of {self.point}")
        return float(np.log2(self.motions)) + min(self._bits(m, index, rows) for m in range(self.motions))

    def decode(self, payload: bytes, reference: Reference) -> NDArray[np.int32]:
        """The symbols of a payload.

        Args:
            payload: what `encode` gave.
            reference: what it was given.

        Returns:
            Symbols, `latent_shape` int32, each inside its table.

        Raises:
            MalformedFrame: longer than any payload of this operating point, no range code, with bytes that no symbol
                accounts for, or a reference of another operating point.
        """
        check_length(payload, self.max_payload_bytes)
        rows = self._row_indices(reference)
        if rows is None:
            raise MalformedFrame(f"the reference is of {reference.point}, the frame of {self.point}")
        index = np.empty(rows.shape, dtype=np.int32)
        motion = 0
        with range_decoder(payload) as decoder:
            if self._motion is not None:
                motion = int(decoder.decode(self._motion))
            for start in range(0, len(rows), self._chunk):
                part = slice(start, start + self._chunk)
                index[part] = decoder.decode(FAMILY, self._probabilities(motion, rows[part]))
        if (index >= self._widths).any():
            raise MalformedFrame(f"payload of {len(payload)} bytes holds a symbol outside its table")
        check_padding(payload, self._write(motion, index, rows))
        positions = self.latent_shape[1] * self.latent_shape[2]
        s = np.zeros((self.latent_shape[0], positions), dtype=np.int32)
        s[self._coded] = index.reshape(len(self._coded), positions)
        return (s + self._lo).reshape(self.latent_shape)

    def _indices(self, s: NDArray[np.integer]) -> NDArray[np.int32] | None:
        """Table indices of the coded channels' symbols, flat; None where one is outside its table."""
        index = s.reshape(self.latent_shape[0], -1).astype(np.int32) - self._lo
        if (index < 0).any() or (index >= self._sizes).any():
            return None
        return index[self._coded].ravel()

    def _row_indices(self, reference: Reference) -> NDArray[np.int32] | None:
        """The row of `ConditionalModel.rows` for each coded symbol, flat; None for another point's reference."""
        if reference.point != self.point or reference.symbols.shape != self.latent_shape:
            return None
        index = self._indices(reference.symbols)
        if index is None:
            return None
        return index + self._first_rows

    def _counts(self, motion: int) -> NDArray[np.uint16]:
        """`ConditionalModel.rows` of a motion. `TOTAL` itself occurs only in channels that are not coded."""
        rows = self._rows.get(motion)
        if rows is None:
            with self._lock:
                rows = self._rows.get(motion)
                if rows is None:
                    rows = self._conditional.rows(self._tables, motion).astype(np.uint16)
                    self._rows[motion] = rows
        return rows

    def _probabilities(self, motion: int, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._counts(motion)[rows].astype(np.float32) * np.float32(1 / TOTAL)  # exact: 16 bits each

    def _bits(self, motion: int, index: NDArray[np.int32], rows: NDArray[np.int32]) -> float:
        counts = self._counts(motion)[rows, index].astype(np.float32)
        return TOTAL_BITS * len(counts) - float(np.log2(counts).sum(dtype=np.float64))

    def _write(self, motion: int, index: NDArray[np.int32], rows: NDArray[np.int32]) -> bytes:
        return range_coded(self._parts(motion, index, rows))

    def _parts(self, motion: int, index: NDArray[np.int32], rows: NDArray[np.int32]) -> Iterator[tuple[Any, ...]]:
        if self._motion is not None:
            yield motion, self._motion
        for start in range(0, len(rows), self._chunk):
            part = slice(start, start + self._chunk)
            yield index[part], FAMILY, self._probabilities(motion, rows[part])
