"""Symbols to payload bytes and back: a range coder over the factorized model.

    s (Cr, h, w) int32  --encode-->  payload (bytes)  --decode-->  s

`bitneck.coding.range_coder` has the range coder. Shapes and tables come from the operating point, never from the
payload. A payload carries nothing that shows damage: that is what the frame's CRC is for.

One call codes a whole latent from a matrix of probabilities, which is five times faster than a call for each channel.
For this, every channel's model gets as many symbols as the widest one. The missing symbols have the frequency zero,
which the range coder raises to 2**-24. A payload that decodes to a missing symbol is refused.
"""

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.coding.range_coder import (
    FAMILY,
    check_length,
    check_padding,
    range_coded,
    range_decoder,
)
from bitneck.errors import InvalidConfig, MalformedFrame

__all__ = ["FactorizedCodec"]

_MATRIX_ENTRIES = 1 << 17
"""A latent with at most this many probabilities has one matrix of models (1 MiB); a larger one a model a channel."""


class FactorizedCodec:
    """Codes the symbols of one operating point.

    Immutable after construction; safe to share between threads.

    Args:
        tables: the operating point's factorized model.
        latent_shape: (Cr, h, w).

    Raises:
        InvalidConfig: the shape does not match the tables.
    """

    def __init__(self, tables: FactorizedModel, latent_shape: tuple[int, int, int]) -> None:
        if len(latent_shape) != 3 or min(latent_shape) < 1 or latent_shape[0] != tables.channels:
            raise InvalidConfig(f"latent shape {latent_shape} does not match tables of {tables.channels} channels")
        self.tables = tables
        self.latent_shape = latent_shape
        self.max_payload_bytes = tables.max_payload_bytes(latent_shape[1] * latent_shape[2])
        positions = latent_shape[1] * latent_shape[2]
        # A channel with one symbol needs no bits.
        self._coded = np.array([c for c, row in enumerate(tables.counts) if row.shape[0] > 1], dtype=np.intp)
        widths = np.array([tables.counts[c].shape[0] for c in self._coded], dtype=np.int32)
        self._widths = widths[:, None]
        widest = int(widths.max(initial=0))
        rows = np.zeros((len(self._coded), widest))
        if rows.size:
            rows[np.arange(widest) < self._widths] = np.concatenate([tables.counts[c] for c in self._coded]) / TOTAL
        self._matrix: NDArray[np.float64] | None = None
        self._models: list[Any] = []
        if rows.size * positions <= _MATRIX_ENTRIES:
            self._matrix = np.repeat(rows, positions, axis=0)
        else:
            self._models = [constriction.stream.model.Categorical(row, perfect=False) for row in rows]
        self._lo_column = tables.lo[:, None]
        self._sizes = np.array([len(row) for row in tables.counts], dtype=np.uint32)[:, None]

    def encode(self, s: NDArray[np.int32]) -> bytes:
        """The payload of one latent's symbols.

        Args:
            s: symbols, `latent_shape` int32, inside the tables.

        Raises:
            InvalidConfig: wrong shape or type, or a symbol outside its table.
        """
        if s.shape != self.latent_shape or s.dtype != np.int32:
            raise InvalidConfig(f"symbols are {s.shape} {s.dtype}, expected {self.latent_shape} int32")
        index = s.reshape(self.latent_shape[0], -1) - self._lo_column
        if (index.view(np.uint32) >= self._sizes).any():  # what is below lo wraps around
            raise InvalidConfig("a symbol is outside its table; quantize() clips to the tables")
        return self._write(index[self._coded])

    def encode_clipped(self, s: NDArray[np.int32]) -> bytes:
        """The same for symbols of `bitneck.coding.symbols.quantize`, which are not checked again."""
        return self._write((s.reshape(self.latent_shape[0], -1) - self._lo_column)[self._coded])

    def ideal_bits(self, s: NDArray[np.int32]) -> float:
        """Ideal code length of one latent's symbols; see `FactorizedModel.ideal_bits`."""
        return self.tables.ideal_bits(s)

    def _write(self, index: NDArray[np.int32]) -> bytes:
        """The payload of the coded channels' table indices, (coded, positions)."""
        if self._matrix is None:
            return range_coded(zip(index, self._models, strict=True))
        return range_coded([(index.ravel(), FAMILY, self._matrix)] if index.size else [])

    def decode(self, payload: bytes) -> NDArray[np.int32]:
        """The symbols of a payload.

        Most random bytes decode to random symbols. Only payloads that `encode` cannot produce are rejected.

        Args:
            payload: from `encode`.

        Returns:
            Symbols, `latent_shape` int32, each inside its table.

        Raises:
            MalformedFrame: longer than any payload of this operating point, no range code, or with bytes that no symbol
                accounts for.
        """
        check_length(payload, self.max_payload_bytes)
        positions = self.latent_shape[1] * self.latent_shape[2]
        coded = np.zeros((len(self._coded), positions), dtype=np.int32)
        with range_decoder(payload) as decoder:
            if self._matrix is None:
                for row, model in zip(coded, self._models, strict=True):
                    row[:] = decoder.decode(model, positions)
            elif coded.size:
                coded = decoder.decode(FAMILY, self._matrix).reshape(coded.shape)
        if (coded >= self._widths).any():
            raise MalformedFrame(f"payload of {len(payload)} bytes holds a symbol outside its table")
        check_padding(payload, self._write(coded))
        index = np.zeros((self.latent_shape[0], positions), dtype=np.int32)
        index[self._coded] = coded
        return (index + self._lo_column).reshape(self.latent_shape)
