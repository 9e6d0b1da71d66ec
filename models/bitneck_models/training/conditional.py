"""Fitting conditional tables: pairs of similar frames from training photographs, and three numbers for each channel.

Each photograph gives a pair of frames for each motion: still, slow and fast. The numbers are those of a small grid that
code the second frame of the motion's pairs, given the first, in the fewest bits.

Dimensions: M motions, B kernels, P pairs, Cr x h x w latent, K_c symbols of channel c.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

import bitneck
from bitneck.bundle import Bundle
from bitneck.chain import PointEncoder, SegmentChain
from bitneck.coding.conditional_codec import ConditionalCodec
from bitneck.coding.conditional_model import KEEP_TOTAL, KERNEL_TOTAL, ConditionalModel, check_conditionable
from bitneck.coding.factorized_model import TOTAL, FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck.image import load_photo, preprocess
from bitneck.manifest import InputSpec, sha256_hex
from bitneck_models.data.class_maps import mapped_photos
from bitneck_models.data.photos import split_off_validation, unlabelled_photos
from bitneck_models.data.scenes import Camera, Path2D, moving, still
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import Recipe

__all__ = ["MOTIONS", "ConditionalRecord", "Symbols", "fit_conditional", "fit_points", "pair_symbols", "scene_photos"]

MOTIONS = ("still", "slow", "fast")
_VALIDATE_EVERY = 10
_DISTANCES = 48
_DECAYS = (0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
_DEVIATIONS = (0.35, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0, 4.5)
_GAUSSIAN_FLOOR = 32
_NEAR_DECAYS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
_KEEPS = (0, 8, 16, 24, 32, 40, 48, 54, 58, 61, 63)

Symbols = dict[str, NDArray[np.int16]]
"""By operating point: (P, 2, Cr, h, w) int16, the frames of each pair. Wider tables are not conditioned."""


class ConditionalRecord(BaseModel):
    """What stands beside conditional tables: how they came to be, and what they save on photographs put aside.

    `bytes_alone` and `bytes_similar` are ideal code lengths of the second frames of the pairs, by motion.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    photos: int
    validation_photos: int
    seed: int
    code_version: str
    bytes_alone: dict[str, float]
    bytes_similar: dict[str, float]
    fitted: date
    tables_sha256: str
    conditional_sha256: str


@dataclass(frozen=True, slots=True)
class ScenePhotos:
    """Photographs to make scenes of: to fit on, and put aside."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]


def scene_photos(recipe: Recipe, data: Path, spec: InputSpec, count: int, seed: int) -> ScenePhotos:
    """Draw photographs from a recipe's folders, in proportion to their shares.

    A folder of small ones is left out: a view that moves over them would show nothing new.

    Args:
        recipe: names folders.
        data: the folder that they lie in.
        spec: the backbone's input.
        count: how many to fit on; a tenth as many are put aside.
        seed: of the drawing.

    Raises:
        ImageError: a folder that does not exist or is empty.
        InvalidConfig: no folder has photographs that are large enough.
    """
    rng = np.random.default_rng(seed)
    train: list[Path] = []
    held: list[Path] = []
    weights: list[float] = []
    for source in recipe.data:
        if source.labels and (data / source.folder / "labels").is_dir():
            photos = [photo for photo, _ in mapped_photos(data / source.folder)]
        else:
            photos = unlabelled_photos([data / source.folder])
        if min(load_photo(photos[0]).size) < min(spec.height, spec.width):
            continue
        kept, aside = split_off_validation(photos, source.validate_every or _VALIDATE_EVERY)
        held += aside
        train += kept
        weights += [source.share / max(1, len(kept))] * len(kept)
    if not train or not held:
        raise InvalidConfig(f"no folder of {recipe.name} has photographs of the input's size to make scenes of")
    p = np.array(weights) / sum(weights)
    drawn = np.sort(rng.choice(len(train), min(count, len(train)), replace=False, p=p))
    aside_drawn = np.sort(rng.choice(len(held), min(max(1, count // 10), len(held)), replace=False))
    return ScenePhotos(tuple(train[i] for i in drawn), tuple(held[i] for i in aside_drawn))


def pair(photo: Image.Image, spec: InputSpec, motion: str, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Two frames of a scene of this motion, a camera of random quality."""
    camera = Camera(noise=float(np.exp(rng.uniform(np.log(0.7), np.log(8.0)))), quality=int(rng.integers(70, 96)))
    if motion == "still":
        first, second = still(photo, spec, camera, 2, rng)
        return first, second
    if motion == "slow":
        path = Path2D(
            speed=float(rng.uniform(0.005, 0.03)),
            zoom=float(rng.uniform(0.6, 0.9)),
            growth=float(rng.uniform(-0.01, 0.01)),
        )
    else:
        path = Path2D(
            speed=float(rng.uniform(0.04, 0.2)),
            zoom=float(rng.uniform(0.5, 0.8)),
            growth=float(rng.uniform(-0.05, 0.05)),
        )
    first, second = moving(photo, spec, camera, path, 2, rng)
    return first, second


def pair_symbols(
    bundle: Bundle,
    points: Sequence[str],
    photos: Sequence[Path],
    seed: int,
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[str, Symbols]:
    """The symbols of a pair of frames for each photograph and motion.

    Args:
        bundle: its head and encoders are run, as on a device.
        points: operating points.
        photos: files.
        seed: of the scenes.
        progress: called with the number of photographs done.

    Returns:
        By motion.

    Raises:
        ImageError: a photograph cannot be read.
    """
    chain = SegmentChain(bundle)
    ladder = bundle.manifest.ladder
    encoders = {name: PointEncoder(bundle, ladder[name]) for name in points}
    spec = bundle.manifest.input
    # In one piece each: small arrays that stay, between large ones that go, would scatter the heap.
    collected: dict[str, Symbols] = {
        motion: {name: np.empty((len(photos), 2, *ladder[name].latent_shape), np.int16) for name in points}
        for motion in MOTIONS
    }
    for row, path in enumerate(photos):
        photo = load_photo(path)
        rng = np.random.default_rng([seed, row])
        for motion in MOTIONS:
            for k, frame in enumerate(pair(photo, spec, motion, rng)):
                for name, s in _symbols(chain, encoders, spec, frame):
                    collected[motion][name][row, k] = s
        progress(row + 1)
    return collected


def _symbols(
    chain: SegmentChain, encoders: dict[str, PointEncoder], spec: InputSpec, frame: Image.Image
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Every point's symbols of a frame: the chain is walked once."""
    lengths = {name: chain.head_length(encoder.point.split) for name, encoder in encoders.items()}
    f, at = preprocess(frame, spec), 0
    for length in sorted(set(lengths.values())):
        f, at = chain.run(f, at, length), length
        for name, encoder in encoders.items():
            if lengths[name] == length:
                yield name, encoder.symbols(f)


def fit_conditional(tables: FactorizedModel, pairs: Sequence[NDArray[np.integer]]) -> ConditionalModel:
    """Fit a conditional model.

    Args:
        tables: the operating point's own.
        pairs: for each motion (P, 2, Cr, h, w), inside the tables.

    Raises:
        InvalidConfig: tables that are too wide to be conditioned.
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
    """The kernels to choose from, (B, D), and where those begin that a channel's table may be weighed with."""
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
    """The near kernel, like kernel and share that code one channel's cells (s', s) in the fewest bits."""
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
        entry: where they go.
        bundle: exported from it.
        points: ids.
        photos: see `scene_photos`.
        seed: of the scenes.
        progress: called with what is being done, done and all.

    Raises:
        InvalidConfig: the bundle is not the zoo entry's, or tables are too wide to be conditioned.
        ImageError: a photograph cannot be read.
    """
    for name in points:
        tables = bundle.tables(name)
        check_conditionable(tables)
        if entry.tables(entry.recipe.point(name).id).digest != tables.digest:
            raise InvalidConfig(f"{name}: the bundle's tables are not the zoo entry's; export the entry again")
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
        entry.save_conditional(name, data, records[name].model_dump_json(indent=1) + "\n")
        progress("tables", done, len(points))
    return records


def _mean(bits: Sequence[float]) -> float:
    return round(float(np.mean(bits)) / 8, 2)
