"""The quantizer: latent to symbols at the edge, symbols to latent in the cloud.

    s = clip(round(y / Q), lo, hi)        y_hat = Q * s

Dimensions: Cr latent channels, h x w latent positions. Rounding is half to even, as in torch, so that training
and deployment agree.
"""

import numpy as np
from numpy.typing import NDArray

from bitneck.errors import InvalidConfig, ModelFailure

__all__ = ["dequantize", "quantize"]

# A step that float32 rounds to zero or to infinity would give a latent that is not finite.
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
_LARGEST_STEP = float(np.finfo(np.float32).max)

_FAR = 1.5 * 2**30
"""Beyond the symbols of any table; int32 holds it, even if a division has rounded it up."""


def quantize(y: NDArray[np.float32], step: float, lo: NDArray[np.int32], hi: NDArray[np.int32]) -> NDArray[np.int32]:
    """Quantize a latent to the symbols that its tables cover.

    Args:
        y: latent, (Cr, h, w) float32.
        step: the quantizer step Q, > 0, in the latent's unit; used as float32.
        lo: smallest symbol of each channel, (Cr,) int32.
        hi: largest symbol of each channel, (Cr,) int32.

    Returns:
        Symbols, (Cr, h, w) int32, with ``lo[c] <= s[c] <= hi[c]``.

    Raises:
        InvalidConfig: the step is not positive and finite in float32, or the channel counts differ.
        ModelFailure: the latent is not finite.
    """
    if not _SMALLEST_STEP <= step <= _LARGEST_STEP:  # also refuses NaN
        raise InvalidConfig(f"quantizer step {step} is not a positive number that float32 holds")
    if y.ndim != 3 or lo.shape != (y.shape[0],) or hi.shape != lo.shape:
        raise InvalidConfig(f"latent of shape {y.shape} does not match tables of {lo.shape[0]} channels")
    most = min(_FAR * step, _LARGEST_STEP)
    least, largest = np.minimum.reduce(y, None), np.maximum.reduce(y, None)  # NaN if one of them is
    if not (-most <= least and largest <= most):
        if not np.isfinite(y).all():
            raise ModelFailure(
                "the bottleneck encoder gave a latent that is not finite; check the photograph and the bundle"
            )
        y = y.clip(-most, most)
    y = y / np.float32(step)
    s: NDArray[np.int32] = np.rint(y, out=y).astype(np.int32)  # (Cr, h, w)
    np.maximum(s, lo[:, None, None], out=s)
    return np.minimum(s, hi[:, None, None], out=s)


def dequantize(s: NDArray[np.int32], step: float) -> NDArray[np.float32]:
    """The latent that the bottleneck decoder gets.

    Args:
        s: symbols, (Cr, h, w) int32.
        step: the quantizer step Q.

    Returns:
        ``Q * s``, (Cr, h, w) float32.
    """
    return s.astype(np.float32) * np.float32(step)
