"""Symbols to payload bytes and back: a range coder over the context model.

    s (Cr, h, w) int32  --encode-->  payload (bytes)  --decode-->  s

Three passes over the positions; `bitneck.coding.context_model` says which, and which table codes a symbol. In a pass,
the bands follow one another, each with one call of the range coder. As in `FactorizedCodec`, shapes and tables never
come from the payload, and the frame's CRC detects damage.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.context_model import ContextModel, neighbours, passes, table_rows
from bitneck.coding.factorized_model import TOTAL, TOTAL_BITS, FactorizedModel
from bitneck.coding.range_coder import (
    FAMILY,
    check_length,
    check_padding,
    new_encoder,
    range_coded,
    range_decoder,
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
        places: of the pass, P of them in the codec's order.
        channels: of the band, likewise.
        shift: the symbol that each symbol's table begins with, (channels, P).
        index: each symbol's place in its table, flat; anything before it is decoded.
        probabilities: the tables, (symbols, width) float32.
    """

    places: slice
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
        self._lo, self._span = tables.lo[:, None, None], (tables.hi - tables.lo).astype(np.uint32)[:, None, None]
        self._reach = contexts.reach
        # Channels are coded band by band, and positions pass by pass, so that a band and a pass are slices.
        sizes = np.bincount(contexts.band)
        self._bands = [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
        positions = passes(latent_shape[1:])
        ends = np.cumsum([len(places) for places in positions])
        self._passes = [slice(end - len(places), end) for end, places in zip(ends, positions, strict=True)]
        channels, order = np.argsort(contexts.band, kind="stable"), np.concatenate(positions)
        self._order = channels * len(order) + order[:, None]  # (h * w, Cr), indices of flat symbols
        place_of = np.append(np.argsort(order), len(order))  # by position; the last one is outside
        self._around = [place_of[neighbours(latent_shape[1:], number, positions[number])] for number in (1, 2)]
        self._weights = contexts.weights[:, :, channels].astype(np.int32)
        self._table = contexts.table[:, channels].astype(np.intp).ravel()
        self._shift = (contexts.middle - contexts.half_widths)[:, channels].astype(np.int32).ravel()
        self._channel = np.arange(latent_shape[0])[:, None]
        alone = np.repeat(self._channel, len(positions[0]), axis=1)  # row 0 of each channel
        self._alone = self._table.take(alone), self._shift.take(alone)
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
        if self._outside(s):
            raise InvalidConfig("a symbol is outside its table; quantize() clips to the tables")
        return self.encode_clipped(s)

    def encode_clipped(self, s: NDArray[np.int32]) -> bytes:
        """The same for symbols of `bitneck.coding.symbols.quantize`, which are not checked again."""
        return self._write(self._parts(self._ordered(s)))

    def ideal_bits(self, s: NDArray[np.int32]) -> float:
        """Ideal code length of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.
        """
        return -sum(
            float(np.log2(part.probabilities[np.arange(part.index.size), part.index], dtype=np.float64).sum())
            for part in self._parts(self._ordered(s))
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
        ordered = np.zeros((len(self._order) + 1, self.latent_shape[0]), dtype=np.int32)
        again = new_encoder()
        with range_decoder(payload) as decoder:
            for part in self._parts(ordered):  # each pass looks at what the passes before have put into ordered
                index = decoder.decode(FAMILY, part.probabilities)
                again.encode(index, FAMILY, part.probabilities)  # while they are in the processor's cache
                ordered[part.places, part.channels] = (index.reshape(part.shift.shape) + part.shift).T
        s = np.empty(self.latent_shape, dtype=np.int32)
        s.reshape(-1)[self._order] = ordered[:-1]
        if self._outside(s):
            raise MalformedFrame(f"payload of {len(payload)} bytes holds a symbol outside its table")
        check_padding(payload, shortest_payload(again))
        return s

    def _outside(self, s: NDArray[np.int32]) -> bool:
        """Whether a symbol is outside its table; what is below lo wraps around."""
        return bool(((s - self._lo).view(np.uint32) > self._span).any())

    def _ordered(self, s: NDArray[np.int32]) -> NDArray[np.int32]:
        """Symbols in the order of coding, (h * w + 1, Cr); the last place is outside."""
        ordered = np.zeros((len(self._order) + 1, self.latent_shape[0]), dtype=np.int32)
        s.take(self._order, out=ordered[:-1])
        return ordered

    def _parts(self, ordered: NDArray[np.int32]) -> Iterator[_Part]:
        """What is coded, in order. Later parts depend on the symbols of earlier ones."""
        for number, places in enumerate(self._passes):
            if places.start == places.stop:
                continue
            table, shift = self._alone
            if number:
                row = table_rows(ordered, self._around[number - 1], self._weights[number - 1], number, self._reach)
                row *= len(self._channel)
                row += self._channel  # (Cr, P)
                table, shift = self._table.take(row), self._shift.take(row)
            index = ordered[places].T - shift
            for channels, bank in zip(self._bands, self._probabilities, strict=True):
                probabilities = bank.take(table[channels].ravel(), axis=0)
                yield _Part(places, channels, shift[channels], index[channels].ravel(), probabilities)

    def _write(self, parts: Iterable[_Part]) -> bytes:
        return range_coded((part.index, FAMILY, part.probabilities) for part in parts)
