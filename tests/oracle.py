"""A slow, exact arithmetic coder in pure Python, on the same integer tables: what the codec's lengths are held against.

The whole message is one interval of [0, 1), kept as exact integers; the code is the shortest byte string inside it.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bitneck.coding.factorized_model import TOTAL, FactorizedModel


def encode(model: FactorizedModel, s: NDArray[np.int32]) -> bytes:
    low, width = Fraction(0), Fraction(1)
    for c, row in enumerate(model.counts):
        cumulative = np.concatenate([[0], np.cumsum(row)])
        for value in s[c].ravel() - model.lo[c]:
            low += width * Fraction(int(cumulative[value]), TOTAL)
            width *= Fraction(int(row[value]), TOTAL)
    size = 0
    while True:
        scale = 256**size
        point = -((-low.numerator * scale) // low.denominator)  # low, rounded up to `size` bytes
        if Fraction(point, scale) < low + width:
            return point.to_bytes(size, "big")
        size += 1


def decode(model: FactorizedModel, data: bytes, shape: tuple[int, int, int]) -> NDArray[np.int32]:
    value = Fraction(int.from_bytes(data, "big"), 256 ** len(data))
    s = np.empty((shape[0], shape[1] * shape[2]), dtype=np.int32)
    for c, row in enumerate(model.counts):
        cumulative = np.concatenate([[0], np.cumsum(row)])
        for k in range(s.shape[1]):
            position = int(value * TOTAL)
            index = int(np.searchsorted(cumulative, position, side="right")) - 1
            s[c, k] = index + model.lo[c]
            value = (value * TOTAL - int(cumulative[index])) / int(row[index])
    return s.reshape(shape)
