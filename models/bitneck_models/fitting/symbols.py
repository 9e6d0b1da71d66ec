"""Symbols of one photograph at many operating points: one walk along the chain, one encoder a unit."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.coding.symbols import quantize
from bitneck.errors import InvalidConfig
from bitneck_models.zoo.entry import ZooEntry

__all__ = ["EveryPoint", "check_exported"]


def check_exported(entry: ZooEntry, bundle: Bundle, points: Sequence[str]) -> None:
    """Check that operating points of a bundle have the tables of the zoo entry.

    Raises:
        UnknownPoint: the bundle has no such point.
        InvalidConfig: the bundle was not exported from this entry, or before its last training.
    """
    own = {**entry.points(), **entry.imported()}
    for name in points:
        exported = bundle.tables(name).digest
        if name not in own:
            raise InvalidConfig(f"{name}: {entry.folder} has no such operating point; it is not what was exported")
        if entry.tables(name).digest != exported:
            raise InvalidConfig(f"{name}: the bundle's tables are not the zoo entry's; export the entry again")


class EveryPoint:
    """The edge half of several operating points.

    Args:
        bundle: gives head and encoders.
        points: ids of operating points.

    Raises:
        UnknownPoint: there is no such point.
    """

    def __init__(self, bundle: Bundle, points: Sequence[str]) -> None:
        self._chain = SegmentChain(bundle)
        ladder = bundle.manifest.ladder
        self._points = {name: ladder[name] for name in points}
        self._tables = {name: bundle.tables(name) for name in points}
        self._encoders = {point.unit: PointEncoder(bundle, point) for point in self._points.values()}
        lengths = {name: self._chain.head_length(point.split) for name, point in self._points.items()}
        self._by_length = {
            n: [k for k, length in lengths.items() if length == n] for n in sorted(set(lengths.values()))
        }

    def symbols(self, x: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.int32]]]:
        """Symbols of a photograph, (1, 3, H, W) float32, for every point: its id, and (Cr, h, w) int32."""
        f, at = x, 0
        for length, names in self._by_length.items():
            f, at = self._chain.run(f, at, length), length
            latents: dict[str, NDArray[np.float32]] = {}
            for name in names:
                point, tables = self._points[name], self._tables[name]
                if point.unit not in latents:
                    latents[point.unit] = self._encoders[point.unit].latent(f)[0]
                yield name, quantize(latents[point.unit], point.step, tables.lo, tables.hi)
