"""Symbols to payload bytes and back: a range coder over the context model.

    s (Cr, h, w) int32  --encode-->  payload (bytes)  --decode-->  s

Three passes over the positions; `bitneck.coding.context_model` says which, and which table codes a symbol. In a pass,
the bands follow one another, each with one call of the range coder. As in `FactorizedCodec`, shapes and tables never
come from the payload, and the frame's CRC detects damage.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.context_model import ContextModel, neighbours, passes, table_rows
from bitneck.coding.factorized_model import TOTAL, TOTAL_BITS, FactorizedModel
from bitneck.coding.range_coder import (
    FAMILY,
    check_length,
    check_padding,
    range_decoder,
    range_encoder,
    shortest_payload,
)
from bitneck.errors import InvalidConfig, MalformedFrame

__all__ = ["ContextCodec"]

_MAX_GATHERED = 1 << 24
"""Frequencies that the symbols of one latent look up: 64 MiB."""


@dataclass(slots=True, eq=False)
class _Part:
    """The symbols of one pass and band.

    Attributes:
        positions: of the pass, P flat indices.
        channels: of the band, in the codec's order.
        shift: the symbol that each symbol's table begins with, (channels, P).
        index: each symbol's place in its table, flat; anything before it is decoded.
        probabilities: the tables, (symbols, width) float32.
    """

    positions: NDArray[np.intp]
    channels: slice
    shift: NDArray[np.int32]
    index: NDArray[np.int32]
    probabilities: NDArray[np.float32]


class ContextCodec:
    """Codes the symbols of one operating point.

    Immutable after construction; safe to share between threads.

    Args:
        tables: the operating point's factorized model: the range of its symbols.
        contexts: its context model.
        latent_shape: (Cr, h, w).

    Raises:
        InvalidConfig: they do not match.
    """

    def __init__(self, tables: FactorizedModel, contexts: ContextModel, latent_shape: tuple[int, int, int]) -> None:
        if len(latent_shape) != 3 or min(latent_shape) < 1 or latent_shape[0] != tables.channels:
            raise InvalidConfig(f"latent shape {latent_shape} does not match tables of {tables.channels} channels")
        contexts.check_fits(tables)
        gathered = int((2 * contexts.half_widths + 1).sum()) * latent_shape[1] * latent_shape[2]
        if gathered > _MAX_GATHERED:
            raise InvalidConfig(
                f"contexts look up {gathered} frequencies for a latent of {latent_shape}, more than {_MAX_GATHERED}: "
                "use a larger step"
            )
        self.tables = tables
        self.latent_shape = latent_shape
        self._lo, self._hi = tables.lo[:, None, None], tables.hi[:, None, None]
        self._reach = contexts.reach
        # Channels are coded band by band, so that a band is a slice.
        self._order = np.argsort(contexts.band, kind="stable")
        ends = np.cumsum(np.bincount(contexts.band))
        self._bands = [slice(end - size, end) for end, size in zip(ends, np.bincount(contexts.band), strict=True)]
        self._weights = np.ascontiguousarray(contexts.weights[:, :, self._order])
        self._table = contexts.table[:, self._order].astype(np.intp).ravel()
        self._shift = (contexts.middle - contexts.half_widths)[:, self._order].astype(np.int32).ravel()
        self._channel = np.arange(latent_shape[0])[:, None]
        self._positions = passes(latent_shape[1:])
        self._neighbours = [neighbours(latent_shape[1:], number, self._positions[number]) for number in (1, 2)]
        self._alone = np.repeat(self._channel, len(self._positions[0]), axis=1)  # row 0 of each channel
        self._probabilities = [bank.astype(np.float32) / np.float32(TOTAL) for bank in contexts.banks]  # exact: 2**-16
        count = latent_shape[0] * latent_shape[1] * latent_shape[2]
        self.max_payload_bytes = -(-count * TOTAL_BITS * 101 // 800) + 4
        """An upper bound: no symbol costs more than `TOTAL_BITS`."""

    def encode(self, s: NDArray[np.int32]) -> bytes:
        """The payload of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.

        Raises:
            InvalidConfig: wrong shape or type, or a symbol outside its table.
        """
        if s.shape != self.latent_shape or s.dtype != np.int32:
            raise InvalidConfig(f"symbols are {s.shape} {s.dtype}, expected {self.latent_shape} int32")
        if (s < self._lo).any() or (s > self._hi).any():
            raise InvalidConfig("a symbol is outside its table; quantize() clips to the tables")
        return self._write(list(self._parts(self._flat(s))))

    def ideal_bits(self, s: NDArray[np.int32]) -> float:
        """Ideal code length of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
        """
        return -sum(
            float(np.log2(part.probabilities[np.arange(part.index.size), part.index], dtype=np.float64).sum())
            for part in self._parts(self._flat(s))
        )

    def decode(self, payload: bytes) -> NDArray[np.int32]:
        """The symbols of a payload.

        Args:
            payload: from `encode`.

        Returns:
            Symbols, `latent_shape` int32, each inside its table.

        Raises:
            MalformedFrame: longer than any payload of this operating point, no range code, or with bytes that no symbol
                accounts for.
        """
        check_length(payload, self.max_payload_bytes)
        flat = np.zeros((self.latent_shape[0], self.latent_shape[1] * self.latent_shape[2]), dtype=np.int32)
        parts = []
        with range_decoder(payload) as decoder:
            for part in self._parts(flat):  # each pass looks at what the passes before have put into flat
                part.index = decoder.decode(FAMILY, part.probabilities).astype(np.int32)
                flat[part.channels, part.positions] = part.index.reshape(part.shift.shape) + part.shift
                parts.append(part)
        s = np.empty_like(flat)
        s[self._order] = flat
        s = s.reshape(self.latent_shape)
        if (s < self._lo).any() or (s > self._hi).any():
            raise MalformedFrame(f"payload of {len(payload)} bytes holds a symbol outside its table")
        check_padding(payload, self._write(parts))
        return s

    def _flat(self, s: NDArray[np.int32]) -> NDArray[np.int32]:
        """Symbols in the codec's order of channels, (Cr, h * w)."""
        return s.reshape(len(s), -1)[self._order]

    def _parts(self, flat: NDArray[np.int32]) -> Iterator[_Part]:
        """What is coded, in order. Later parts depend on the symbols of earlier ones."""
        for number, positions in enumerate(self._positions):
            if not positions.size:
                continue
            places = self._alone
            if number:
                around = self._neighbours[number - 1]
                row = table_rows(flat, around, self._weights, number, self._reach)
                places = row * len(flat) + self._channel
            table, shift = np.take(self._table, places), np.take(self._shift, places)
            index = np.take(flat, positions, axis=1) - shift
            for channels, bank in zip(self._bands, self._probabilities, strict=True):
                probabilities = np.take(bank, table[channels].ravel(), axis=0)
                yield _Part(positions, channels, shift[channels], index[channels].ravel(), probabilities)

    def _write(self, parts: Sequence[_Part]) -> bytes:
        with range_encoder() as encoder:
            for part in parts:
                encoder.encode(part.index, FAMILY, part.probabilities)
        return shortest_payload(encoder)
