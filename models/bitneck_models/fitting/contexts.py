"""Fitting context models, which code a symbol given its neighbours in the channel.

A least-squares prediction of a symbol from its four neighbours is cut into classes. Each channel's symbols of a class
have a histogram; Lloyd's algorithm finds a few tables that code all histograms of a band in the fewest bits. See
`bitneck.coding.context_model` for what the numbers mean.

Dimensions: N photographs, Cr x h x w latent, R classes to either side, A tables of a channel, J histograms, W width.
"""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import bitneck
from bitneck.bundle import Bundle
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.context_model import WEIGHT_ONE, ContextModel, check_symbols, neighbours, passes, table_rows
from bitneck.coding.factorized_model import TOTAL, FactorizedModel, to_counts
from bitneck.errors import InvalidConfig
from bitneck.image import load_photo, preprocess
from bitneck.manifest import sha256_hex
from bitneck_models.fitting.symbols import EveryPoint, check_exported
from bitneck_models.training.photo_sets import PhotoSets, sampled_photos
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.records import ContextRecord

__all__ = ["REACH", "fit_contexts", "fit_points"]

REACH = 5
_TABLES = 96
"""Largest number of tables of a band."""
_ITERATIONS = 12
_LEAST_SAVED = 0.03
"""Contexts that save less of the bytes are not kept: they cost time, and a file."""
_HALF_WIDTHS = (4, 12)
"""Channels whose tables need at most this half width form a band."""
_PRIOR = 6.0
"""Weight of the channel's own table in each of its histograms, in observations."""
_RIDGE = 1e-3
_MOST_WEIGHT = np.iinfo(np.int16).max
_WIDEST = 3.0
"""Standard deviations of a prediction that the classes cover."""


def fit_contexts(tables: FactorizedModel, s: NDArray[np.integer]) -> ContextModel:
    """Fit a context model.

    Args:
        tables: the operating point's factorized model.
        s: symbols of training photographs, (N, Cr, h, w), inside the tables.

    Raises:
        InvalidConfig: symbols too wide for contexts.
    """
    channels, size = s.shape[1], (s.shape[2], s.shape[3])
    flat = s.reshape(len(s), channels, -1)
    places = passes(size)
    around = [neighbours(size, number, places[number]) for number in (1, 2)]
    weights = _weights(flat, places, around)
    count = 3 + 4 * REACH
    row_of = np.zeros(flat.shape, np.uint8)  # of the channel's tables, by symbol
    padded = np.pad(flat.astype(np.int32).swapaxes(1, 2), [(0, 0), (0, 1), (0, 0)])  # (N, h * w + 1, Cr)
    for number in (1, 2):
        weight = weights[number - 1].astype(np.int32)
        row_of[:, :, places[number]] = table_rows(padded, around[number - 1], weight, number, REACH)
    middle = np.empty((count, channels), np.int64)
    histograms = []
    for c, own in enumerate(tables.counts):
        index = flat[:, c].astype(np.int64) - int(tables.lo[c])
        cells = np.bincount((row_of[:, c].astype(np.int64) * len(own) + index).ravel(), minlength=count * len(own))
        smooth = cells.reshape(count, len(own)) + _PRIOR * own / TOTAL
        middle[:, c] = np.rint((smooth @ (np.arange(len(own)) + int(tables.lo[c]))) / smooth.sum(1))
        histograms.append(smooth)
    reach = np.maximum(middle.max(0) - tables.lo, tables.hi - middle.min(0))  # half width that a channel needs
    band = np.searchsorted(_HALF_WIDTHS, reach).astype(np.uint8)
    band = np.unique(band, return_inverse=True)[1].astype(np.uint8)
    table = np.zeros((count, tables.channels), np.uint16)
    banks = []
    for number in range(int(band.max()) + 1):
        channels = np.flatnonzero(band == number)
        half = max(1, int(reach[channels].max()))
        centred = np.zeros((count, len(channels), 2 * half + 1))
        for k, channel in enumerate(channels.tolist()):
            for a in range(count):
                start = int(tables.lo[channel]) - int(middle[a, channel]) + half
                centred[a, k, start : start + len(tables.counts[channel])] = histograms[channel][a]
        bank, chosen = _bank(centred.reshape(-1, 2 * half + 1))
        table[:, channels] = chosen.reshape(count, len(channels))
        banks.append(bank)
    model = ContextModel(weights, table, middle.astype(np.int16), band, tuple(banks))
    model.check_fits(tables)
    return model


def fit_points(
    entry: ZooEntry,
    bundle: Bundle,
    points: Sequence[str],
    sets: PhotoSets,
    count: int,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> tuple[dict[str, ContextRecord], dict[str, str]]:
    """Fit contexts to operating points, and save them in the zoo entry where they save enough.

    Args:
        entry: gets the contexts.
        bundle: the bundle exported from this entry.
        points: ids of operating points.
        sets: the photographs of the recipe.
        count: number of training photographs to fit to.
        progress: called with (what is being done, done, all).

    Returns:
        How they were fitted, by point, and why other points cannot have contexts.

    Raises:
        UnknownPoint: the bundle has no such point.
        InvalidConfig: the bundle was not exported from this entry.
        ImageError: a photograph cannot be read.
    """
    ladder = bundle.manifest.ladder
    shapes = {name: ladder[name].latent_shape for name in points}  # each once
    check_exported(entry, bundle, list(shapes))
    left_out, imported = {}, entry.imported()
    for name, shape in shapes.items():
        if name in imported:
            left_out[name] = "an imported point"
        elif math.prod(shape[1:]) == 1:
            left_out[name] = "its latent has one position, and so no neighbours"
        else:
            try:
                check_symbols(bundle.tables(name))
            except InvalidConfig as exc:
                left_out[name] = str(exc)
    points = [name for name in shapes if name not in left_out]
    if not points:
        return {}, left_out
    chosen = [sets.train[k][0] for k in sampled_photos(sets, count, seed=2)]
    train = _symbols(bundle, points, chosen, lambda done: progress("photographs", done, len(chosen)))
    held = _symbols(bundle, points, sets.validation, lambda done: progress("validation", done, len(sets.validation)))
    records = {}
    for done, name in enumerate(points, start=1):
        tables = bundle.tables(name)
        contexts = fit_contexts(tables, train.pop(name))
        try:
            codec = ContextCodec(tables, contexts, shapes[name])
        except InvalidConfig as exc:  # they would take too much memory
            left_out[name] = str(exc)
            continue
        frames = [s.astype(np.int32) for s in held[name]]
        alone, given = (float(np.mean([bits(s) for s in frames])) / 8 for bits in (tables.ideal_bits, codec.ideal_bits))
        data = contexts.to_npz() if given <= (1 - _LEAST_SAVED) * alone else None
        records[name] = ContextRecord(
            photos=len(chosen),
            validation_photos=len(frames),
            code_version=bitneck.__version__,
            bytes_factorized=round(alone, 2),
            bytes_contexts=round(given, 2),
            fitted=datetime.now(tz=UTC).date(),
            tables_sha256=sha256_hex((entry.point_folder(name) / "tables.npz").read_bytes()),
            contexts_sha256=sha256_hex(data) if data is not None else "",
        )
        entry.save_contexts(name, data, records[name])
        progress("tables", done, len(points))
    return records, left_out


def _symbols(
    bundle: Bundle, points: Sequence[str], photos: Sequence[Path], progress: Callable[[int], None]
) -> dict[str, NDArray[np.int16]]:
    """Symbols of photographs for each point, (N, Cr, h, w) int16."""
    every, ladder, spec = EveryPoint(bundle, points), bundle.manifest.ladder, bundle.manifest.input
    found = {name: np.empty((len(photos), *ladder[name].latent_shape), np.int16) for name in points}
    for row, path in enumerate(photos):
        for name, s in every.symbols(preprocess(load_photo(path), spec)):
            found[name][row] = s
        progress(row + 1)
    return found


def _weights(
    flat: NDArray[np.integer], places: list[NDArray[np.intp]], around: list[NDArray[np.intp]]
) -> NDArray[np.int16]:
    """Least-squares weights of the neighbours, in classes, (2, 4, Cr)."""
    channels = flat.shape[1]
    weights = np.zeros((2, 4, channels), np.int16)
    for c in range(channels):
        padded = np.pad(flat[:, c].astype(np.float64), [(0, 0), (0, 1)])  # (N, h * w + 1)
        for number in (1, 2):
            target = padded[:, places[number]].ravel()
            if not target.size:
                continue
            beside = padded[:, around[number - 1]].transpose(1, 0, 2).reshape(4, -1)
            gram = beside @ beside.T
            gram += (_RIDGE * np.trace(gram) + 1e-6) * np.eye(4)
            solved = np.linalg.solve(gram, beside @ target)
            spread = math.sqrt(solved @ gram @ solved / target.size)  # of the prediction
            scaled = solved * (WEIGHT_ONE * (REACH + 0.5) / max(_WIDEST * spread, 1e-3))
            weights[number - 1, :, c] = np.clip(np.rint(scaled), -_MOST_WEIGHT, _MOST_WEIGHT)
    return weights


def _bank(histograms: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Tables for histograms (J, W): the tables (tables, W), and which one each histogram has, (J,)."""
    total = histograms.sum(1)
    p = histograms / total[:, None]
    entropy = -(p * np.log2(np.maximum(p, 1 / TOTAL))).sum(1)
    count = min(_TABLES, len(histograms))
    chosen = np.empty(len(histograms), np.intp)
    chosen[np.argsort(entropy, kind="stable")] = np.arange(len(histograms)) * count // len(histograms)
    for _ in range(_ITERATIONS):
        sums = np.zeros((count, histograms.shape[1]))
        np.add.at(sums, chosen, histograms)
        used = sums[np.unique(chosen)]
        bank = np.stack([to_counts(row + row.sum() * 1e-6) for row in used])
        chosen = (histograms @ -np.log2(bank / TOTAL).T).argmin(1)
        count = len(bank)
    used_rows, renumbered = np.unique(chosen, return_inverse=True)
    return bank[used_rows], renumbered
