"""The factorized model: one table of integer frequencies per latent channel.

Tables are fitted once, from a trained unit's own symbols on training photographs, and shipped as integers. They are
never computed from floats on another machine, because the range decoder needs exactly the encoder's numbers.

Dimensions: N photographs, Cr latent channels, h x w latent positions, K_c symbols of channel c.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.arrays import read_arrays, written_arrays
from bitneck.errors import BundleCorrupt, InvalidConfig

__all__ = ["TOTAL", "TOTAL_BITS", "FactorizedModel", "to_counts"]

TOTAL_BITS = 16
"""Every table's frequencies sum to 2**16: the rarest symbol costs 16 bits, and a certain one almost nothing."""
TOTAL = 1 << TOTAL_BITS

_MAX_CHANNELS = 4096
_MAX_SYMBOLS = TOTAL // 4
_MAX_READ = 1 << 22
"""Frequencies of a file, if each channel had as many as the widest one: a codec makes such a table. 16 MiB as int32."""
_MAX_SYMBOL = 1 << 30  # in magnitude; far from where int32 wraps around


@dataclass(frozen=True, slots=True, eq=False)
class FactorizedModel:
    """Frequency tables of a latent: channels are independent, and all positions of a channel share its table.

    Channel c covers the symbols ``lo[c] .. hi[c]`` and no others. Each of them has a frequency of at least 1, so every
    symbol that the quantizer can give costs a finite number of bits.

    Attributes:
        lo: smallest symbol of each channel, (Cr,) int32, at most 2**30 in magnitude.
        counts: for each channel its frequencies, (K_c,) int64, each >= 1, summing to `TOTAL`; K_c <= 2**14.
    """

    lo: NDArray[np.int32]
    counts: tuple[NDArray[np.int64], ...]

    def __post_init__(self) -> None:
        """Check the invariants; see the class."""
        if self.lo.ndim != 1 or self.lo.shape[0] != len(self.counts) or not self.counts:
            raise InvalidConfig(f"tables have {len(self.counts)} channels, lo has the shape {self.lo.shape}")
        if self.lo.dtype != np.int32 or self.lo.min() < -_MAX_SYMBOL or self.lo.max() > _MAX_SYMBOL:
            raise InvalidConfig(f"lo must be int32 within -{_MAX_SYMBOL} and {_MAX_SYMBOL}, got {self.lo.dtype}")
        for c, row in enumerate(self.counts):
            if row.ndim != 1 or not 1 <= row.shape[0] <= _MAX_SYMBOLS or row.dtype != np.int64:
                raise InvalidConfig(
                    f"table of channel {c} has the shape {row.shape} and type {row.dtype}, "
                    f"expected 1 to {_MAX_SYMBOLS} int64 frequencies"
                )
        # All channels in one call each: channel by channel, a server that reloads holds the interpreter lock too long.
        least, sums = _reduce_rows(np.minimum, self.counts), _reduce_rows(np.add, self.counts)
        most = _reduce_rows(np.maximum, self.counts)  # a sum may wrap around
        wrong = np.flatnonzero((least < 1) | (most > TOTAL) | (sums != TOTAL))
        if wrong.size:
            c = int(wrong[0])
            raise InvalidConfig(
                f"table of channel {c}: frequencies must be >= 1 and sum to {TOTAL}, "
                f"got {least[c]} to {most[c]} and a sum of {sums[c]}"
            )

    @property
    def channels(self) -> int:
        """Cr."""
        return len(self.counts)

    @property
    def hi(self) -> NDArray[np.int32]:
        """Largest symbol of each channel, (Cr,) int32."""
        return (self.lo + np.array([len(row) - 1 for row in self.counts], dtype=np.int32)).astype(np.int32)

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers, in hexadecimal. It does not depend on how the file was packed."""
        size = np.array([len(row) for row in self.counts])
        parts = (self.lo, size, np.concatenate(self.counts))
        return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()

    def ideal_bits(self, s: NDArray[np.int32]) -> float:
        """Ideal code length of one latent's symbols: ``sum -log2(counts[c][s - lo[c]] / TOTAL)``.

        Args:
            s: symbols, (Cr, h, w) int32, within the tables.

        Raises:
            InvalidConfig: wrong number of channels, or a symbol outside its table.
        """
        if s.ndim != 3 or s.shape[0] != self.channels:
            raise InvalidConfig(f"symbols of shape {s.shape} do not match tables of {self.channels} channels")
        bits = 0.0
        for c, row in enumerate(self.counts):
            index = s[c].ravel() - self.lo[c]
            if index.size and (index.min() < 0 or index.max() >= row.shape[0]):
                raise InvalidConfig(f"a symbol of channel {c} is outside its table")
            bits += float((TOTAL_BITS - np.log2(row[index])).sum())
        return bits

    def max_payload_bytes(self, positions: int) -> int:
        """An upper bound of a payload's bytes: every symbol is the rarest one of its channel.

        Args:
            positions: h * w.
        """
        worst = float((TOTAL_BITS - np.log2(_reduce_rows(np.minimum, self.counts))).sum()) * positions
        return math.ceil(worst * 1.01 / 8) + 4

    @classmethod
    def fit(cls, s: NDArray[np.int32], *, margin: int = 1, prior_weight: float = 8.0) -> Self:
        """Fit tables to symbols.

        Each table is the histogram plus a discrete two-sided geometric distribution of the same centre and spread, with
        the weight of `prior_weight` observations. It gives some frequency to symbols that the sample lacks, and takes
        little from the frequent ones.

        Args:
            s: symbols of training photographs, (N, Cr, h, w) int32.
            margin: number of symbols that a table covers beyond the smallest and the largest one seen, so that outliers
                are not clipped at once; >= 0.
            prior_weight: weight of the smooth part, in observations; > 0.

        Raises:
            InvalidConfig: no symbols, an argument out of its range, or a channel whose symbols span too wide a range
                (the step is too small).
        """
        if s.ndim != 4 or s.size == 0 or not np.issubdtype(s.dtype, np.integer):
            raise InvalidConfig(
                f"tables need integer symbols of shape (N, Cr, h, w) with N >= 1, got {s.dtype} of shape {s.shape}"
            )
        if margin < 0 or not 0 < prior_weight < math.inf:
            raise InvalidConfig(f"margin must be >= 0 and prior_weight > 0, got {margin} and {prior_weight}")
        lo, tables = [], []
        for c in range(s.shape[1]):
            values = s[:, c].ravel().astype(np.int64)
            low, high = int(values.min()) - margin, int(values.max()) + margin
            if high - low + 1 > _MAX_SYMBOLS or max(-low, high) > _MAX_SYMBOL:
                raise InvalidConfig(
                    f"channel {c} spans the {high - low + 1} symbols from {low} to {high}, "
                    f"more than {_MAX_SYMBOLS} or beyond {_MAX_SYMBOL}; use a larger step"
                )
            histogram = np.bincount(values - low, minlength=high - low + 1).astype(np.float64)
            centre = float(np.median(values))
            spread = float(np.abs(values - centre).mean()) + 1e-3
            decay = spread / (1.0 + spread)
            prior = decay ** np.abs(np.arange(low, high + 1) - centre)
            weights = histogram + prior_weight * prior / prior.sum()
            lo.append(low)
            tables.append(to_counts(weights))
        return cls(lo=np.array(lo, dtype=np.int32), counts=tuple(tables))

    def to_npz(self) -> bytes:
        """The tables as an ``.npz`` file: ``lo`` (Cr,), ``size`` (Cr,), ``counts`` (sum K_c,), all int32."""
        size = np.array([len(row) for row in self.counts], dtype=np.int32)
        counts = np.concatenate(self.counts).astype(np.int32)
        return written_arrays(lo=self.lo.astype(np.int32), size=size, counts=counts)

    @classmethod
    def from_npz(cls, data: bytes) -> Self:
        """Read `to_npz`'s file. Pickled contents are never loaded.

        Raises:
            BundleCorrupt: the file is unreadable or breaks an invariant.
        """
        try:
            lo, size, counts = read_arrays(data, ("lo", "size", "counts"))
            if lo.ndim != 1 or size.shape != lo.shape or counts.ndim != 1 or lo.shape[0] > _MAX_CHANNELS:
                raise InvalidConfig("arrays lo, size and counts do not match")
            if size.size and int(size.max()) * size.size > _MAX_READ:
                raise InvalidConfig(f"{size.size} channels of up to {size.max()} frequencies, more than {_MAX_READ}")
            if size.min(initial=1) < 1 or int(size.sum()) != counts.shape[0]:
                raise InvalidConfig("sizes do not add up to the number of frequencies")
            if lo.size and (lo.min() < -_MAX_SYMBOL or lo.max() > _MAX_SYMBOL):  # before int32 wraps around
                raise InvalidConfig(f"lo is beyond {_MAX_SYMBOL} in magnitude")
            rows = np.split(counts.astype(np.int64), np.cumsum(size)[:-1])
            return cls(lo=lo.astype(np.int32), counts=tuple(rows))
        except Exception as exc:  # numpy raises many kinds for a broken file
            raise BundleCorrupt(f"frequency tables are unreadable ({exc}); export or fetch the bundle again") from exc


def _reduce_rows(reduce: np.ufunc, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """A reduction of each channel's frequencies, (Cr,). No row may be empty: `reduceat` would give its neighbour's."""
    ends = np.cumsum([len(row) for row in rows])
    reduced: NDArray[np.int64] = reduce.reduceat(np.concatenate(rows), np.concatenate([[0], ends[:-1]]))
    return reduced


def to_counts(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integers >= 1 that sum to `TOTAL`, in proportion to weights (largest remainders).

    Args:
        weights: (K,), >= 0 and not all 0; K <= `TOTAL`.
    """
    free = TOTAL - weights.shape[0]
    exact = weights / weights.sum() * free
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    short = free - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[:short]] += 1
    counts += 1
    return counts
