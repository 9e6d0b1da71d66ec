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
from bitneck.coding.range_coder import FAMILY, range_decoder, range_encoder, shortest_payload
from bitneck.errors import InvalidConfig, MalformedFrame

__all__ = ["ContextCodec"]


@dataclass(slots=True, eq=False)
class _Part:
    """The symbols of one pass and band.

    Attributes:
        place: channels and positions, as indices of (Cr, positions).
        shift: the symbol that the table begins with.
        index: the symbol's place in the table; anything before it is decoded.
        probabilities: the tables, (symbols, width) float32.
    """

    place: tuple[NDArray[np.intp], ...]
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
        self.tables = tables
        self.latent_shape = latent_shape
        self._contexts = contexts
        self._lo, self._hi = tables.lo[:, None, None], tables.hi[:, None, None]
        self._positions = passes(latent_shape[1:])
        self._neighbours = [neighbours(latent_shape[1:], number, self._positions[number]) for number in (1, 2)]
        self._bands = [np.flatnonzero(contexts.band == number) for number in range(len(contexts.banks))]
        self._places = [[np.ix_(channels, positions) for channels in self._bands] for positions in self._positions]
        self._half_widths = [bank.shape[1] // 2 for bank in contexts.banks]
        self._channel = np.arange(latent_shape[0])[:, None]
        self._probabilities = [bank.astype(np.float32) / np.float32(TOTAL) for bank in contexts.banks]  # exact: 2**-16
        self._middle = contexts.middle.astype(np.int32)
        self._table = contexts.table.astype(np.intp)
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
        return self._write(list(self._parts(s)))

    def ideal_bits(self, s: NDArray[np.int32]) -> float:
        """Ideal code length of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
        """
        return -sum(
            float(np.log2(part.probabilities[np.arange(part.index.size), part.index], dtype=np.float64).sum())
            for part in self._parts(s)
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
        if len(payload) > self.max_payload_bytes:
            raise MalformedFrame(
                f"payload of {len(payload)} bytes, this operating point gives at most {self.max_payload_bytes}"
            )
        s = np.zeros(self.latent_shape, dtype=np.int32)
        parts = []
        with range_decoder(payload) as decoder:
            for part in self._parts(s):  # each pass looks at what the passes before have put into s
                part.index = decoder.decode(FAMILY, part.probabilities).astype(np.int32)
                s.reshape(len(s), -1)[part.place] = (part.index + part.shift).reshape(part.place[0].size, -1)
                parts.append(part)
        if (s < self._lo).any() or (s > self._hi).any():
            raise MalformedFrame(f"payload of {len(payload)} bytes holds a symbol outside its table")
        if len(self._write(parts)) < len(payload):
            raise MalformedFrame(
                f"payload of {len(payload)} bytes is longer than its symbols need; it was not made by this codec"
            )
        return s

    def _parts(self, s: NDArray[np.int32]) -> Iterator[_Part]:
        """What is coded, in order. Later parts depend on the symbols of earlier ones."""
        flat = s.reshape(len(s), -1)
        for number, positions in enumerate(self._positions):
            if not positions.size:
                continue
            table, middle = self._rows(flat, number)
            for band, channels in enumerate(self._bands):
                place = self._places[number][band]
                shift = middle[channels].ravel() - self._half_widths[band]
                probabilities = self._probabilities[band][table[channels].ravel()]
                yield _Part(place, shift, flat[place].ravel() - shift, probabilities)

    def _rows(self, flat: NDArray[np.int32], number: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Number and middle of the table of each symbol of a pass, (Cr, positions) each."""
        if number == 0:
            shape = (len(flat), len(self._positions[0]))
            return np.broadcast_to(self._table[0, :, None], shape), np.broadcast_to(self._middle[0, :, None], shape)
        around, contexts = self._neighbours[number - 1], self._contexts
        row = table_rows(flat, around, contexts.weights, number, contexts.reach)
        return self._table[row, self._channel], self._middle[row, self._channel]

    def _write(self, parts: Sequence[_Part]) -> bytes:
        with range_encoder() as encoder:
            for part in parts:
                encoder.encode(part.index, FAMILY, part.probabilities)
        return shortest_payload(encoder)
