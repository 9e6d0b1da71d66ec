"""The context model: which table codes a symbol, given the symbols beside it in its channel that are coded already.

A latent is coded in three passes over its positions:

    0 2 0 2      0: alone
    2 1 2 1      1: given the four symbols diagonal to it, from pass 0
    0 2 0 2      2: given the four symbols above, below, left and right of it, from passes 0 and 1

Symbols outside of the latent count as 0. In passes 1 and 2 a symbol's *class* is a prediction in whole numbers,

    class = clip(floor((w1 s1 + w2 s2 + w3 s3 + w4 s4 + 128) / 256), -R, R)

with weights for each channel and pass. Each channel has a table for pass 0 and for each class of the others. Tables are
shared: a channel has the numbers of tables in a bank, and the symbol that the middle of each table stands for. Channels
of narrow and of wide ranges have banks of their own, the *bands*.

Everything is an integer of the file, so that all machines have the same tables. Cf. the checkerboard contexts of He et
al., 2103.15306, whose contexts come from a network.

Dimensions: Cr channels, R classes to either side, A = 1 + 2 (2 R + 1) tables of a channel, B bands.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.arrays import read_arrays, written_arrays
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig

__all__ = ["NEIGHBOURS", "WEIGHT_ONE", "ContextModel", "check_symbols", "neighbours", "passes", "table_rows"]

NEIGHBOURS = (((-1, -1), (-1, 1), (1, -1), (1, 1)), ((-1, 0), (0, -1), (0, 1), (1, 0)))
"""Rows and columns from a symbol to those that its class depends on, in passes 1 and 2."""
_WEIGHT_BITS = 8
WEIGHT_ONE = 1 << _WEIGHT_BITS
"""A weight of one class for each symbol."""

_MAX_SYMBOL = (1 << 15) - 1
_MAX_CHANNELS = 4096
_MAX_REACH = 64
_MAX_ENTRIES = 1 << 20
"""Largest number of frequencies of all banks."""
_MAX_WIDTH = (1 << 15) + 1
"""Of a table. A factorized model's have at most 2**14 symbols, and each may be a table's middle."""


@dataclass(frozen=True, slots=True, eq=False)
class ContextModel:
    """The numbers of one operating point's contexts.

    Attributes:
        weights: of the neighbours, (2, 4, Cr) int16; see `NEIGHBOURS`.
        table: which table of its band a channel has in pass 0 and in each class of the others, (A, Cr) uint16.
        middle: the symbol that the table's middle stands for, (A, Cr) int16.
        band: of each channel, (Cr,) uint8.
        banks: the tables of each band, (tables, odd width >= 3) int64; frequencies >= 1 that sum to `TOTAL`.
    """

    weights: NDArray[np.int16]
    table: NDArray[np.uint16]
    middle: NDArray[np.int16]
    band: NDArray[np.uint8]
    banks: tuple[NDArray[np.int64], ...]

    def __post_init__(self) -> None:
        """Check the invariants; see the class."""
        channels = len(self.band)
        if not 1 <= channels <= _MAX_CHANNELS or self.band.ndim != 1 or not self.banks:
            raise InvalidConfig(f"contexts of {channels} channels and {len(self.banks)} bands")
        if self.weights.shape != (2, 4, channels) or self.table.shape != self.middle.shape:
            raise InvalidConfig("the arrays of the contexts are of different numbers of channels or tables")
        rows = self.table.shape[0] if self.table.ndim == 2 else 0
        if self.table.shape[1:] != (channels,) or rows % 4 != 3 or rows > 3 + 4 * _MAX_REACH:
            raise InvalidConfig(f"tables of contexts are {self.table.shape}, expected 3 + 4 R for {channels} channels")
        if sum(bank.size for bank in self.banks) > _MAX_ENTRIES or int(self.band.max()) >= len(self.banks):
            raise InvalidConfig(f"contexts of more than {_MAX_ENTRIES} frequencies, or a band that is not there")
        for number, bank in enumerate(self.banks):
            if not (self.band == number).any():
                raise InvalidConfig(f"band {number} has no channel")
            if bank.ndim != 2 or bank.shape[1] % 2 != 1 or bank.shape[1] < 3 or bank.shape[1] > _MAX_WIDTH:
                raise InvalidConfig(
                    f"band {number}: tables are {bank.shape}, expected an odd width of 3 to {_MAX_WIDTH}"
                )
            if bank.min() < 1 or bank.max() > TOTAL or (bank.sum(1) != TOTAL).any():  # a sum may wrap around
                raise InvalidConfig(f"band {number}: tables need frequencies >= 1 that sum to {TOTAL}")
            if (self.table[:, self.band == number] >= len(bank)).any():
                raise InvalidConfig(f"band {number} has {len(bank)} tables, and a channel has a later one")

    @property
    def channels(self) -> int:
        """Cr."""
        return len(self.band)

    @property
    def reach(self) -> int:
        """R."""
        return (len(self.table) - 3) // 4

    @property
    def half_widths(self) -> NDArray[np.int64]:
        """For each channel, the largest distance from a table's middle that it covers, (Cr,)."""
        return np.array([bank.shape[1] // 2 for bank in self.banks])[self.band]

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers, in hexadecimal. It does not depend on how the file was packed."""
        parts: tuple[NDArray[np.integer], ...] = (self.weights, self.table, self.middle, self.band, *self.banks)
        shapes = repr([part.shape for part in parts]).encode()
        return hashlib.sha256(shapes + b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()

    def check_fits(self, tables: FactorizedModel) -> None:
        """Check that the contexts cover whatever the quantizer can give.

        Args:
            tables: the operating point's own, whose symbols are coded.

        Raises:
            InvalidConfig: they do not.
        """
        if self.channels != tables.channels:
            raise InvalidConfig(f"contexts of {self.channels} channels, the tables have {tables.channels}")
        lo, hi, middle = tables.lo.astype(np.int64), tables.hi.astype(np.int64), self.middle.astype(np.int64)
        check_symbols(tables)
        if (middle - self.half_widths > lo).any() or (middle + self.half_widths < hi).any():
            raise InvalidConfig("a symbol of the tables is outside of its context's table")

    def to_npz(self) -> bytes:
        """The model as an ``.npz`` file; ``banks`` (sum of tables * width) int32, ``bands`` (B, 2) their shapes."""
        return written_arrays(
            weights=self.weights,
            table=self.table,
            middle=self.middle,
            band=self.band,
            bands=np.array([bank.shape for bank in self.banks], dtype=np.int32),
            banks=np.concatenate([bank.ravel() for bank in self.banks]).astype(np.int32),
        )

    @classmethod
    def from_npz(cls, data: bytes) -> Self:
        """Read `to_npz`'s file. Pickled contents are never loaded.

        Raises:
            BundleCorrupt: the file is unreadable or breaks an invariant.
        """
        try:
            names = ("weights", "table", "middle", "band", "bands", "banks")
            weights, table, middle, band, bands, banks = read_arrays(data, names)
            if bands.ndim != 2 or bands.shape[1] != 2 or bands.size == 0 or bands.min() < 1 or bands.max() > TOTAL:
                raise InvalidConfig("the bands have no shapes")
            sizes = bands.astype(np.int64).prod(1)
            if banks.shape != (int(sizes.sum()),):
                raise InvalidConfig("the bands do not have as many frequencies as their shapes say")
            if [str(a.dtype) for a in (weights, table, middle, band)] != ["int16", "uint16", "int16", "uint8"]:
                raise InvalidConfig("an array has another type")
            parts = np.split(banks.astype(np.int64), np.cumsum(sizes)[:-1])
            shaped = tuple(part.reshape(shape) for part, shape in zip(parts, bands.tolist(), strict=True))
            return cls(weights, table, middle, band, shaped)  # type: ignore[arg-type]  # checked above
        except Exception as exc:  # numpy raises many kinds for a broken file
            raise BundleCorrupt(f"contexts are unreadable ({exc}); export or fetch the bundle again") from exc


def check_symbols(tables: FactorizedModel) -> None:
    """Check that symbols can have contexts: they are below 2**15.

    Raises:
        InvalidConfig: they cannot.
    """
    if max(-int(tables.lo.min()), int(tables.hi.max())) > _MAX_SYMBOL:
        raise InvalidConfig(f"tables with symbols beyond {_MAX_SYMBOL} take no contexts; use a larger step")


def passes(size: tuple[int, int]) -> list[NDArray[np.intp]]:
    """The positions of each pass over h x w, as flat indices."""
    rows, columns = np.indices(size) % 2
    numbers = np.where(rows != columns, 2, rows).ravel()
    return [np.flatnonzero(numbers == number) for number in range(3)]


def neighbours(size: tuple[int, int], number: int, positions: NDArray[np.intp]) -> NDArray[np.intp]:
    """The four neighbours that pass `number`, 1 or 2, looks at.

    Args:
        size: (h, w).
        number: of the pass.
        positions: of the pass, P flat indices.

    Returns:
        (4, P) flat indices; h * w for a place outside.
    """
    height, width = size
    found = []
    for down, right in NEIGHBOURS[number - 1]:
        row, column = positions // width + down, positions % width + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        found.append(np.where(inside, row * width + column, height * width))
    return np.stack(found)


def table_rows(
    s: NDArray[np.integer], around: NDArray[np.intp], weights: NDArray[np.int32], number: int, reach: int
) -> NDArray[np.intp]:
    """The row of `ContextModel.table` and `ContextModel.middle` that each symbol of pass 1 or 2 has.

    Args:
        s: symbols, (..., h * w + 1, Cr) int32; those of later passes do not matter. The last place stands for those
            outside, and holds 0.
        around: see `neighbours`, (4, P).
        weights: of the pass, (4, Cr); see `ContextModel`.
        number: of the pass.
        reach: R.

    Returns:
        (..., Cr, P), 1 .. A - 1.
    """
    total = np.einsum("kc,...kpc->...cp", weights, s.take(around, axis=-2))
    first = 1 + reach + (number - 1) * (2 * reach + 1)
    total += WEIGHT_ONE // 2
    total >>= _WEIGHT_BITS
    np.minimum(np.maximum(total, -reach, out=total), reach, out=total)  # `clip` takes twice as long
    found: NDArray[np.intp] = total + np.intp(first)
    return found
