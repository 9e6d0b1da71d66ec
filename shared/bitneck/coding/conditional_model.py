"""The conditional model: tables for a frame's symbols, given those of a frame before it at the same places.

A bundle has three numbers for each channel and motion. From them both machines make the same tables with integer
arithmetic. Given the symbol s' at the same place of the reference, the symbol s has the frequency

    1 + keep / 64 * near(|s - s'|) / sum near  +  (1 - keep / 64) * counts[s] * like(|s - s'|) / sum (counts * like)

in units of `TOTAL`, rounded down. The rest up to `TOTAL` goes to s = s'. The first part is for places that have not
changed. The second part is Bayes' rule: the channel's own table times the likelihood of s' given s. It moves extreme
symbols towards the middle. `near` and `like` are rows of one small list of kernels.

A *motion* is one such set of numbers for every channel, from a still scene to a fast one. A payload names the motion
that codes it best.

Dimensions: M motions, B kernels of D distances, Cr channels, K_c symbols of channel c, W the largest K_c.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.arrays import read_arrays, written_arrays
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig

__all__ = ["KEEP_TOTAL", "KERNEL_TOTAL", "MAX_ENTRIES", "ConditionalModel", "check_conditionable"]

KEEP_TOTAL = 64
KERNEL_TOTAL = 1 << 16
"""A kernel's largest weight. The products of the formula stay below 2**55."""
MAX_ENTRIES = 1 << 22
"""Largest number of frequencies of one motion's tables, sum K_c times W: 8 MiB."""

_MAX_SYMBOL = (1 << 15) - 1
_MAX_MOTIONS, _MAX_KERNELS, _MAX_DISTANCES = 16, 255, 256


@dataclass(frozen=True, slots=True, eq=False)
class ConditionalModel:
    """The numbers from which the conditional tables of one operating point are made.

    Attributes:
        kernels: weights by distance, (B, D) int64, each 0 .. `KERNEL_TOTAL` and at least 1 at the distance 0; the last
            column is for all larger distances.
        near: index of the kernel of the first part, (M, Cr) uint8.
        like: index of the kernel of the second part, (M, Cr) uint8; all its weights are >= 1.
        keep: share of the first part in 64ths, (M, Cr) uint8.
    """

    kernels: NDArray[np.int64]
    near: NDArray[np.uint8]
    like: NDArray[np.uint8]
    keep: NDArray[np.uint8]

    def __post_init__(self) -> None:
        """Check the invariants; see the class."""
        k = self.kernels
        if k.ndim != 2 or k.dtype != np.int64 or not (1 <= k.shape[0] <= _MAX_KERNELS and k.shape[1] >= 1):
            raise InvalidConfig(f"kernels are {k.shape} {k.dtype}, expected (B, D) int64 with B <= {_MAX_KERNELS}")
        if k.shape[1] > _MAX_DISTANCES or k.min() < 0 or k.max() > KERNEL_TOTAL or k[:, 0].min() < 1:
            raise InvalidConfig(
                f"kernels need at most {_MAX_DISTANCES} weights of 0 to {KERNEL_TOTAL} each, the first one at least 1"
            )
        shape = self.near.shape
        if len(shape) != 2 or not 1 <= shape[0] <= _MAX_MOTIONS or shape[1] < 1:
            raise InvalidConfig(f"near has the shape {shape}, expected (M, Cr) with 1 to {_MAX_MOTIONS} motions")
        for name, values, top in (
            ("near", self.near, len(k) - 1),
            ("like", self.like, len(k) - 1),
            ("keep", self.keep, KEEP_TOTAL),
        ):
            if values.shape != shape or values.dtype != np.uint8 or values.max() > top:
                raise InvalidConfig(f"{name} is {values.shape} {values.dtype}, expected {shape} uint8 of at most {top}")
        if k[np.unique(self.like)].min() < 1:
            raise InvalidConfig("a kernel that a channel's table is weighed with needs weights of at least 1")

    @property
    def motions(self) -> int:
        """M."""
        return len(self.near)

    @property
    def channels(self) -> int:
        """Cr."""
        return int(self.near.shape[1])

    def check_fits(self, tables: FactorizedModel) -> None:
        """Check that the model fits these tables.

        Raises:
            InvalidConfig: another number of channels, or tables too wide to be conditioned.
        """
        if self.channels != tables.channels:
            raise InvalidConfig(f"conditional tables of {self.channels} channels, the tables have {tables.channels}")
        check_conditionable(tables)

    def rows(self, tables: FactorizedModel, motion: int) -> NDArray[np.int64]:
        """Every table of one motion: a row for each channel and each symbol of the reference.

        Args:
            tables: the operating point's own.
            motion: 0 .. M-1.

        Returns:
            (sum K_c, W) int64, the channels one after another, the symbols ascending. Each row sums to `TOTAL`;
            entries beyond a channel's K_c symbols are 0.
        """
        sizes = np.array([len(row) for row in tables.counts])
        width = int(sizes.max())
        channel = np.repeat(np.arange(len(sizes)), sizes)  # (R,) of each row
        before = np.arange(len(channel)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # (R,) index of s'
        now = np.arange(width)
        inside = now < sizes[channel, None]  # (R, W)
        own = np.zeros((len(sizes), width), dtype=np.int64)
        for c, row in enumerate(tables.counts):
            own[c, : len(row)] = row
        distance = np.minimum(np.abs(now - before[:, None]), self.kernels.shape[1] - 1)
        near = np.where(inside, self.kernels[self.near[motion, channel, None], distance], 0)
        like = own[channel] * self.kernels[self.like[motion, channel, None], distance]
        keep = self.keep[motion, channel, None].astype(np.int64)
        free = TOTAL - sizes[channel, None].astype(np.int64)
        rows: NDArray[np.int64] = inside.astype(np.int64)
        rows += free * keep * near // (KEEP_TOTAL * near.sum(1, keepdims=True))
        rows += free * (KEEP_TOTAL - keep) * like // (KEEP_TOTAL * like.sum(1, keepdims=True))
        rows[np.arange(len(rows)), before] += TOTAL - rows.sum(1)
        return rows

    def to_npz(self) -> bytes:
        """The model as an ``.npz`` file: ``kernels`` int32; ``near``, ``like`` and ``keep`` uint8."""
        return written_arrays(kernels=self.kernels.astype(np.int32), near=self.near, like=self.like, keep=self.keep)

    @classmethod
    def from_npz(cls, data: bytes) -> Self:
        """Read `to_npz`'s file. Pickled contents are never loaded.

        Raises:
            BundleCorrupt: the file is unreadable or breaks an invariant.
        """
        try:
            kernels, near, like, keep = read_arrays(data, ("kernels", "near", "like", "keep"))
            return cls(kernels.astype(np.int64), near, like, keep)  # type: ignore[arg-type]  # it checks them
        except Exception as exc:  # numpy raises many kinds for a broken file
            raise BundleCorrupt(f"conditional tables are unreadable ({exc}); export or fetch the bundle again") from exc


def check_conditionable(tables: FactorizedModel) -> None:
    """Check that tables can be conditioned: they are not too wide, and their symbols are below 2**15.

    Raises:
        InvalidConfig: they cannot.
    """
    sizes = [len(row) for row in tables.counts]
    extreme = max(-int(tables.lo.min()), int(tables.hi.max()))
    if sum(sizes) * max(sizes) > MAX_ENTRIES or extreme > _MAX_SYMBOL:
        raise InvalidConfig(
            f"tables of up to {max(sizes)} symbols and of symbols up to {extreme} are too wide to be conditioned; "
            "use a larger step"
        )
