"""Fitting conditional tables, which code a frame against an earlier one: three numbers for each channel and motion.

The numbers come from a small grid. Chosen are those that code the second frame of the motion's pairs, given the first,
in the fewest bits. See `bitneck.coding.conditional_model` for what they mean.

Dimensions: M motions, B kernels, P pairs, Cr x h x w latent, K_c symbols of channel c.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

import bitneck
from bitneck.bundle import Bundle
from bitneck.coding.conditional_codec import ConditionalCodec
from bitneck.coding.conditional_model import KEEP_TOTAL, KERNEL_TOTAL, ConditionalModel, check_conditionable
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.manifest import sha256_hex
from bitneck_models.fitting.pairs import MOTIONS, ScenePhotos, pair_symbols
from bitneck_models.fitting.symbols import check_exported
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.records import ConditionalRecord

__all__ = ["fit_conditional", "fit_points"]

_DISTANCES = 48
"""Distances |s - s'| that a kernel has weights for; the last weight stands for all larger ones."""
_DECAYS = (0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
"""Like kernels that fall by this factor with each distance."""
_DEVIATIONS = (0.35, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0, 4.5)
"""Like kernels that are Gaussians with this standard deviation."""
_GAUSSIAN_FLOOR = 32
"""Least weight of a Gaussian."""
_NEAR_DECAYS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Near kernels that fall by this factor with each distance."""
_KEEPS = (0, 8, 16, 24, 32, 40, 48, 54, 58, 61, 63)
"""Shares of the near part, in units of 1 / `KEEP_TOTAL`."""


def fit_conditional(tables: FactorizedModel, pairs: Sequence[NDArray[np.integer]]) -> ConditionalModel:
    """Fit a conditional model.

    Args:
        tables: the tables of the operating point.
        pairs: symbols of pairs for each motion, (P, 2, Cr, h, w), inside the tables.

    Raises:
        InvalidConfig: the tables are too wide for a conditional model.
    """
    kernels, like_from = _kernels()
    chosen = np.zeros((3, len(pairs), tables.channels), dtype=np.int64)  # near, like, keep
    for motion, symbols in enumerate(pairs):
        for c, row in enumerate(tables.counts):
            index = symbols[:, :, c].astype(np.int64) - int(tables.lo[c])  # (P, 2, h, w)
            cells, counts = np.unique(index[:, 0] * len(row) + index[:, 1], return_counts=True)
            before, now = np.divmod(cells, len(row))
            chosen[:, motion, c] = _best(row, kernels, like_from, before, now, counts)
    used, renumbered = np.unique(chosen[:2], return_inverse=True)
    near, like = renumbered.reshape(2, len(pairs), tables.channels).astype(np.uint8)
    model = ConditionalModel(kernels[used], near, like, chosen[2].astype(np.uint8))
    model.check_fits(tables)
    return model


def _kernels() -> tuple[NDArray[np.int64], int]:
    """The kernels to choose from, (B, D): first near kernels, then, from the returned index on, like kernels."""
    d = np.arange(_DISTANCES)
    near = [np.where(d == 0, 1.0, decay ** np.maximum(d, 1)) * KERNEL_TOTAL for decay in _NEAR_DECAYS]
    like = [np.maximum(decay**d * KERNEL_TOTAL, 1.0) for decay in _DECAYS]
    like += [np.maximum(np.exp(-0.5 * (d / s) ** 2) * KERNEL_TOTAL, _GAUSSIAN_FLOOR) for s in _DEVIATIONS]
    like.append(np.full(_DISTANCES, float(KERNEL_TOTAL)))
    return np.rint(np.stack(near + like)).astype(np.int64), len(near)


def _best(
    row: NDArray[np.int64],
    kernels: NDArray[np.int64],
    like_from: int,
    before: NDArray[np.int64],
    now: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[int, int, int]:
    """The near kernel, like kernel and share that code the cells (s', s) of one channel in the fewest bits."""
    symbols = np.arange(len(row))
    starts, of_start = np.unique(before, return_inverse=True)
    distance = np.minimum(np.abs(symbols - starts[:, None]), kernels.shape[1] - 1)  # (starts, K)
    weights = kernels[:, distance].astype(np.float64)  # (B, starts, K)
    weights[like_from:] *= row
    weights /= weights.sum(2, keepdims=True)
    p = weights[:, of_start, now]  # (B, cells)
    near, like = p[:like_from], p[like_from:]
    best = (np.inf, 0, 0, 0)
    for keep in _KEEPS:
        share = keep / KEEP_TOTAL
        mixed = share * near[:, None] + (1 - share) * like[None]  # (near, like, cells)
        bits = -(np.log2(np.maximum(mixed, 1 / TOTAL)) * counts).sum(2)
        at = int(bits.argmin())
        if bits.flat[at] < best[0]:
            best = (float(bits.flat[at]), at // len(like), at % len(like) + like_from, keep)
    return best[1], best[2], best[3]


def fit_points(
    entry: ZooEntry,
    bundle: Bundle,
    points: Sequence[str],
    photos: ScenePhotos,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> dict[str, ConditionalRecord]:
    """Fit conditional tables to operating points and save them in the zoo entry.

    Args:
        entry: gets the tables.
        bundle: the bundle exported from this entry.
        points: ids of operating points.
        photos: see `bitneck_models.fitting.pairs.scene_photos`.
        seed: seed of the scenes.
        progress: called with (what is being done, done, all).

    Raises:
        InvalidConfig: the bundle was not exported from this entry, or tables are too wide for a conditional model.
        ImageError: a photograph cannot be read.
    """
    check_exported(entry, bundle, points)
    for name in points:
        check_conditionable(bundle.tables(name))
    train = pair_symbols(bundle, points, photos.train, seed, lambda done: progress("scenes", done, len(photos.train)))
    held = pair_symbols(
        bundle, points, photos.validation, seed + 1, lambda done: progress("validation", done, len(photos.validation))
    )
    records = {}
    for done, name in enumerate(points, start=1):
        tables = bundle.tables(name)
        model = fit_conditional(tables, [train[motion][name] for motion in MOTIONS])
        codec = ConditionalCodec(name, tables, model, bundle.manifest.ladder[name].latent_shape)
        frames = {m: held[m][name].astype(np.int32) for m in MOTIONS}
        alone = {m: _mean([tables.ideal_bits(s) for s in frames[m][:, 1]]) for m in MOTIONS}
        similar = {m: _mean([codec.ideal_bits(b, codec.keep(a)) for a, b in frames[m]]) for m in MOTIONS}
        data = model.to_npz()
        records[name] = ConditionalRecord(
            photos=len(photos.train),
            validation_photos=len(photos.validation),
            seed=seed,
            code_version=bitneck.__version__,
            bytes_alone=alone,
            bytes_similar=similar,
            fitted=datetime.now(tz=UTC).date(),
            tables_sha256=sha256_hex((entry.point_folder(name) / "tables.npz").read_bytes()),
            conditional_sha256=sha256_hex(data),
        )
        entry.save_conditional(name, data, records[name])
        progress("tables", done, len(points))
    return records


def _mean(bits: Sequence[float]) -> float:
    return round(float(np.mean(bits)) / 8, 2)
